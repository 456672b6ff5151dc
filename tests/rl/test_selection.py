"""Tokens that Clip-Cov and KL-Cov treat apart, on one rank, against sorting by hand. Several ranks: test_shaping_runs.py."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
import torch

from megatron_vp2o.config.schema import GRPOConfig, PolicyLoss
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl.selection import select_tokens
from megatron_vp2o.rl.types import TrainBatch
from tests.rl.fakes import groups_of, rollouts_of


@pytest.fixture
def groups() -> Iterator[Groups]:
    with groups_of() as made:
        yield made


def batch_of(seed: int, rows: int = 10) -> TrainBatch:
    generator = torch.Generator().manual_seed(seed)
    rollouts = rollouts_of(generator, rows)
    return TrainBatch(
        rollouts.tokens_NS,
        rollouts.total_len_N,
        rollouts.response_mask_NS(),
        behaviour_logprobs_NS=rollouts.model_logprobs_NS * 4,
        advantages_N=torch.randn(rows, generator=generator),
        row_N=torch.randperm(rows, generator=generator),
    )


def covariances(batch: TrainBatch) -> dict[tuple[int, int], float]:
    """Each token's part of the covariance, by (row, position)."""
    assert batch.behaviour_logprobs_NS is not None and batch.advantages_N is not None
    places = [(int(n), int(s)) for n, s in batch.loss_mask_NS.nonzero()]
    logprob = {place: float(batch.behaviour_logprobs_NS[place]) for place in places}
    advantage = {(n, s): float(batch.advantages_N[n]) for n, s in places}
    mean_l, mean_a = (sum(values.values()) / len(places) for values in (logprob, advantage))
    return {place: (logprob[place] - mean_l) * (advantage[place] - mean_a) for place in places}


def selected(batch: TrainBatch, settings: GRPOConfig, groups: Groups, seed: int = 0) -> set[tuple[int, int]]:
    chosen_NS = select_tokens(batch, settings, groups, seed=seed)
    assert chosen_NS is not None and chosen_NS.dtype is torch.bool
    return {(int(n), int(s)) for n, s in chosen_NS.nonzero()}


@pytest.mark.parametrize("fraction", [1e-4, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_kl_cov_takes_the_largest(groups: Groups, seed: int, fraction: float) -> None:
    batch = batch_of(seed)
    found = selected(batch, GRPOConfig(objective=PolicyLoss.kl_cov, covariance_fraction=fraction), groups)
    ordered = sorted(covariances(batch).items(), key=lambda item: -item[1])
    assert found == {place for place, _ in ordered[: max(1, int(fraction * len(ordered)))]}


@pytest.mark.parametrize("seed", range(4))
def test_clip_cov_draws_among_those_inside_its_bounds(groups: Groups, seed: int) -> None:
    batch = batch_of(seed)
    of_each = covariances(batch)
    low, high = sorted(Random(seed).sample(sorted(of_each.values()), 2))
    inside = {place for place, value in of_each.items() if low < value < high}
    settings = GRPOConfig(
        objective=PolicyLoss.clip_cov, covariance_fraction=0.2, covariance_low=low, covariance_high=high
    )
    wanted = min(len(inside), max(1, int(0.2 * len(of_each))))
    draws = [selected(batch, settings, groups, seed=draw) for draw in range(4)]
    assert all(len(draw) == wanted and draw <= inside for draw in draws)
    assert draws[0] == selected(batch, settings, groups, seed=0)
    if 0 < wanted < len(inside) - 2:
        assert any(draw != draws[0] for draw in draws[1:])
    # a row's draw follows from its number, wherever it lies
    order = torch.randperm(len(batch.length_N), generator=torch.Generator().manual_seed(seed))
    moved = selected(batch.rows(order), settings, groups, seed=0)
    assert {(int(order[n]), s) for n, s in moved} == draws[0]


def test_the_other_objectives_have_none(groups: Groups) -> None:
    for objective in set(PolicyLoss) - {PolicyLoss.kl_cov, PolicyLoss.clip_cov}:
        assert select_tokens(batch_of(0), GRPOConfig(objective=objective), groups, seed=0) is None

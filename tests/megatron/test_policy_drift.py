"""The policy's drift against a plain forward pass of the same rows; measuring it changes nothing.

That it does not depend on the layout, with ranks that have no row, is in test_uneven_ranks.py; that a step rejected for it leaves
no trace, in test_steps.py.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl.drift import SampledDrift, sampled_rows
from megatron_vp2o.rl.objectives import next_token
from megatron_vp2o.rl.types import TrainBatch
from tests.megatron.control_job import MegatronPolicy, world
from tests.megatron.stein_job import ROWS, VOCAB, global_batch, small_config


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    torch.set_num_threads(1)
    config = small_config()
    yield world.start(config.parallel, config.seed)
    world.stop()


@pytest.fixture(scope="module")
def policy(groups: Groups) -> Any:
    return MegatronPolicy(small_config(), groups, vocab_size=VOCAB, optimizer_steps=20)


def batch_of(seed: int) -> TrainBatch:
    """Rows in any order, with any numbers."""
    batch = global_batch(seed, range(ROWS))
    generator = torch.Generator().manual_seed(seed)
    batch.row_N = torch.randperm(500, generator=generator)[:ROWS]
    batch.behaviour_logprobs_NS = -4 * torch.rand(batch.tokens_NS.shape, generator=generator)
    return batch


@torch.no_grad()
def by_hand(policy: Any, batch: TrainBatch, row_N: list[int]) -> float:
    """The mean over these rows' tokens, one row after another, from the model's logits."""
    changes: list[float] = []
    for row in row_N:
        assert batch.row_N is not None and batch.behaviour_logprobs_NS is not None
        n = batch.row_N.tolist().index(row)
        tokens_1S = batch.tokens_NS[n : n + 1, : int(batch.length_N[n])]
        policy.model.eval()
        logits_SV = policy.model(tokens_1S, torch.arange(tokens_1S.shape[1])[None], None)[0, :, :VOCAB].double()
        policy.model.train()
        for s in range(1, tokens_1S.shape[1]):
            if batch.loss_mask_NS[n, s]:
                logprob = logits_SV[s - 1].log_softmax(0)[tokens_1S[0, s]]
                changes.append(abs(float(logprob) - float(batch.behaviour_logprobs_NS[n, s])))
    return sum(changes) / len(changes)


@pytest.mark.parametrize(("share", "rows"), [(1.0, 16), (0.25, 4), (0.1, 2), (1e-6, 1)])
def test_drift_is_that_of_a_plain_forward_pass(policy: Any, groups: Groups, share: float, rows: int) -> None:
    found = set()
    for seed in range(3):
        batch = batch_of(seed)
        meter = SampledDrift(policy, groups, share=share, micro_batch_size=3)
        meter.observe(batch)
        assert batch.row_N is not None
        chosen = batch.row_N[sampled_rows(batch.row_N, share, groups)].tolist()
        assert rows - 1 <= len(chosen) <= rows and chosen
        before = meter.measure().read()
        assert before == pytest.approx(by_hand(policy, batch, chosen), rel=1e-5)
        policy.forward_backward(batch, next_token, micro_batch_size=16)
        policy.optimizer_step(1)
        after = meter.measure().read()
        assert after == pytest.approx(by_hand(policy, batch, chosen), rel=1e-5) and after != before
        found.add(after)
    assert len(found) == 3


def test_a_policy_that_is_the_actors_has_no_drift(policy: Any, groups: Groups) -> None:
    batch = batch_of(5)
    batch.behaviour_logprobs_NS = policy.log_probs(batch, 16)
    meter = SampledDrift(policy, groups, share=0.5, micro_batch_size=3)
    meter.observe(batch)
    assert meter.measure().read() < 1e-6
    # what is outside of the responses does not count, and a log-probability that is no number does
    batch.behaviour_logprobs_NS[~batch.loss_mask_NS] = float("nan")
    meter.observe(batch)
    assert meter.measure().read() < 1e-6
    batch.behaviour_logprobs_NS[:] = float("nan")
    meter.observe(batch)
    assert meter.measure().read() != meter.measure().read()


def test_measuring_changes_nothing(policy: Any, groups: Groups) -> None:
    batch = batch_of(6)
    policy.forward_backward(batch, next_token, micro_batch_size=3)

    def state() -> list[torch.Tensor]:
        model = policy.model
        tensors = [*model.parameters(), *(p.main_grad for p in model.parameters()), *model.buffers()]
        return [torch.get_rng_state(), *(tensor.detach().clone() for tensor in tensors)]

    before = state()
    meter = SampledDrift(policy, groups, share=1.0, micro_batch_size=3)
    meter.observe(batch)
    meter.measure().read()
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert all(module.training for module in policy.model.modules())


@pytest.mark.parametrize("seed", range(20))
def test_the_sample_follows_from_the_rows_alone(groups: Groups, seed: int) -> None:
    """Whatever their order; as large as was asked for, spread over the rows' numbers; none only where there are none."""
    dice = random.Random(seed)
    rows = dice.sample(range(1000), dice.randint(1, 60))
    share = dice.choice([0.03, 0.1, 0.5, 1.0])
    stride = max(1, min(len(rows), round(1 / share)))
    chosen = []
    for _ in range(2):
        dice.shuffle(rows)
        row_N = torch.tensor(rows)
        chosen.append(sorted(row_N[sampled_rows(row_N, share, groups)].tolist()))
    assert chosen[0] == chosen[1] and set(chosen[0]) <= set(rows)
    assert len(rows) // stride <= len(chosen[0]) <= -(-len(rows) // stride)
    places = [sorted(rows).index(row) for row in chosen[0]]
    assert all(b - a == stride for a, b in itertools.pairwise(places))
    assert not sampled_rows(torch.zeros(0, dtype=torch.int64), share, groups).numel()


def test_rows_with_nothing_to_train_on(policy: Any, groups: Groups) -> None:
    meter = SampledDrift(policy, groups, share=0.5, micro_batch_size=3)
    meter.observe(batch_of(7).rows(torch.arange(0)))
    assert meter.measure().read() == 0.0

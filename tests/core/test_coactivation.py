"""Co-activation scores and masks against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vp2o.core.coactivation import (
    active_experts,
    attraction_mask,
    coactivation_counts,
    coactivation_scores,
    repulsion_mask,
    update_average,
)


def routing(tokens: int, experts: int, topk: int, seed: int = 0) -> torch.Tensor:
    scores_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, scores_TE.topk(topk, dim=1).indices, True)


def test_counts_are_those_of_a_loop() -> None:
    map_TE, valid_T = routing(50, 6, 3), torch.arange(50) % 4 != 0
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for t in range(50):
        for i in range(6):
            for j in range(6):
                expected[i, j] += valid_T[t] and map_TE[t, i] and map_TE[t, j]
    assert torch.equal(coactivation_counts(map_TE, valid_T), expected)
    scores_EE = coactivation_scores(expected, int(valid_T.sum()))
    assert torch.equal(scores_EE, scores_EE.t()) and scores_EE.max() <= 1
    assert scores_EE.diagonal().sum().item() == pytest.approx(3.0)  # k experts a token


def test_counts_of_parts_add_up() -> None:
    map_TE = routing(64, 8, 2)
    parts = sum(coactivation_counts(part) for part in map_TE.split(7))
    assert torch.equal(coactivation_counts(map_TE), parts)  # type: ignore[arg-type]


def test_no_token_at_all() -> None:
    counts_EE = coactivation_counts(routing(5, 4, 2), torch.zeros(5, dtype=torch.bool))
    assert not coactivation_scores(counts_EE, 0).any() and not active_experts(counts_EE).any()
    mask_EE = attraction_mask(counts_EE, active_experts(counts_EE), neighbours=2)
    assert not mask_EE.any() and not repulsion_mask(mask_EE, active_experts(counts_EE)).any()


def test_average() -> None:
    first, second = torch.full((2, 2), 1.0), torch.full((2, 2), 3.0)
    average = update_average(None, first, 0.9)
    assert torch.equal(average, first) and average is not first
    assert torch.allclose(update_average(average, second, 0.9), torch.full((2, 2), 1.2))
    assert torch.equal(update_average(average, second, 0.0), second)
    with pytest.raises(ValueError, match=r"decay=1.0: choose 0"):
        update_average(None, first, 1.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(0, 9), st.integers(0, 10_000))
def test_masks_are_those_of_a_loop(experts: int, neighbours: int, seed: int) -> None:
    counts_EE = coactivation_counts(routing(6, experts, min(2, experts), seed))
    active_E = active_experts(counts_EE)
    near_EE = attraction_mask(counts_EE, active_E, neighbours=neighbours)
    far_EE = repulsion_mask(near_EE, active_E)
    for i in range(experts):
        others = [j for j in range(experts) if j != i and active_E[j] and counts_EE[i, j] > 0]
        best = sorted(others, key=lambda j: (-counts_EE[i, j].item(), j))[:neighbours]
        expected = set(best) | {i} if active_E[i] else set()
        assert set(near_EE[i].nonzero().flatten().tolist()) == expected
        away = {j for j in range(experts) if j != i and active_E[i] and active_E[j] and j not in expected}
        assert set(far_EE[i].nonzero().flatten().tolist()) == away


def test_threshold() -> None:
    scores_EE = torch.tensor([[0.5, 0.2, 0.0], [0.2, 0.6, 0.1], [0.0, 0.1, 0.3]])
    near_EE = attraction_mask(scores_EE, torch.ones(3).bool(), threshold=0.15)
    assert near_EE.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    # a moving average remembers an expert that has no token now: it takes no part
    near_EE = attraction_mask(scores_EE, torch.tensor([True, False, True]), threshold=0.05)
    assert near_EE.tolist() == [[True, False, False], [False, False, False], [False, False, True]]


@pytest.mark.parametrize("given_", [{}, {"neighbours": 2, "threshold": 0.1}, {"neighbours": -1}])
def test_bad_masks(given_: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="neighbours="):
        attraction_mask(torch.eye(3), torch.ones(3).bool(), **given_)  # type: ignore[arg-type]

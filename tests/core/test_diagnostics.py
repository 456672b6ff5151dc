"""Diagnostics against loops and known values.

Shape legend: L layers, E experts, T tokens, K experts of a token, D hidden size.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vp2o.core.diagnostics import (
    coactivation_sparsity,
    effective_experts,
    expert_utilisation,
    load_violation,
    output_overlap,
    prototype_overlap,
    repulsion_ratio,
    router_entropy,
    self_weight,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def test_router_entropy() -> None:
    probabilities_TE = normal(6, 4).softmax(-1)
    probabilities_TE[5] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    expected = [-sum(p * math.log(p) for p in row if p > 0) for row in probabilities_TE.tolist()]
    total, count = router_entropy(probabilities_TE)
    assert total.item() == pytest.approx(sum(expected)) and count == 6 and expected[5] == 0
    valid_T = torch.tensor([True, True, False, False, True, True])
    probabilities_TE[2] = torch.nan
    total, count = router_entropy(probabilities_TE, valid_T)
    assert total.item() == pytest.approx(sum(expected[t] for t in (0, 1, 4, 5))) and count == 4
    assert router_entropy(probabilities_TE, torch.zeros(6, dtype=torch.bool)) == (0, 0)
    uniform, _ = router_entropy(torch.full((1, 8), 0.125))
    assert uniform.item() == pytest.approx(math.log(8))


@given(st.lists(st.lists(st.integers(0, 20), min_size=4, max_size=4), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_loads(loads: list[list[int]]) -> None:
    for loads_LE in (torch.tensor(loads), torch.tensor(loads, dtype=torch.float64)):
        used, effective, violation = expert_utilisation(loads_LE), effective_experts(loads_LE), load_violation(loads_LE)
        for layer, row in enumerate(loads):
            total = sum(row)
            shares = [load / total for load in row if load] if total else []
            entropy = -sum(share * math.log(share) for share in shares)
            assert used[layer].item() == pytest.approx(sum(load > 0 for load in row) / 4)
            assert effective[layer].item() == pytest.approx(math.exp(entropy) / 4 if total else 0.0)
            assert violation[layer].item() == pytest.approx(max(row) / (total / 4) - 1 if total else 0.0)


def test_loads_at_their_extremes() -> None:
    loads_LE = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]])
    assert expert_utilisation(loads_LE).tolist() == [1.0, 0.25]
    assert effective_experts(loads_LE).tolist() == pytest.approx([1.0, 0.25])
    assert load_violation(loads_LE).tolist() == pytest.approx([0.0, 3.0])
    assert effective_experts(torch.tensor([7])).item() == 1 and load_violation(torch.tensor([7])).item() == 0


def test_prototype_overlap_is_that_of_a_loop() -> None:
    prototypes_LED = unit(3, 5, 4)
    overlap = prototype_overlap(prototypes_LED)
    for layer in range(3):
        squares = [
            float((prototypes_LED[layer, i] * prototypes_LED[layer, j]).sum()) ** 2
            for i in range(5)
            for j in range(5)
            if i != j
        ]
        assert overlap.mean[layer].item() == pytest.approx(sum(squares) / 20)
        assert overlap.maximum[layer].item() == pytest.approx(max(squares))
        values = torch.linalg.svdvals(prototypes_LED[layer]).square()  # another route to the Gram matrix's eigenvalues
        shares = [value / values.sum().item() for value in values.tolist()]
        rank = math.exp(-sum(share * math.log(share) for share in shares))
        assert overlap.effective_rank[layer].item() == pytest.approx(rank)


def test_prototype_overlap_at_its_extremes() -> None:
    orthonormal, same = torch.eye(4, 6), torch.eye(4, 6)[:1].expand(4, 6)
    apart, together = prototype_overlap(orthonormal), prototype_overlap(same)
    assert (apart.mean.item(), apart.maximum.item()) == (0, 0) and apart.effective_rank.item() == pytest.approx(4)
    assert (together.mean.item(), together.maximum.item()) == pytest.approx((1, 1))
    assert together.effective_rank.item() == pytest.approx(1)
    one = prototype_overlap(unit(2, 1, 6))
    assert one.mean.tolist() == one.maximum.tolist() == [0, 0] and one.effective_rank.tolist() == pytest.approx([1, 1])


def test_overlap_ignores_signs() -> None:
    prototypes_ED = unit(5, 4)
    signs_E1 = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])[:, None]
    for one, other in zip(prototype_overlap(prototypes_ED), prototype_overlap(prototypes_ED * signs_E1), strict=True):
        assert one.item() == pytest.approx(other.item())


@pytest.mark.parametrize("K", [1, 2, 4])
def test_output_overlap_is_that_of_a_loop(K: int) -> None:
    outputs_TKD, present_TK = normal(7, K, 5), normal(7, K, seed=1) > -0.5
    outputs_TKD[3, 0] = 0
    total, pairs = 0.0, 0
    for t in range(7):
        for j in range(K):
            for k in range(j):
                if present_TK[t, j] and present_TK[t, k]:
                    a, b = outputs_TKD[t, j], outputs_TKD[t, k]
                    scale = float(a.norm() * b.norm())
                    total += (float((a * b).sum()) / scale) ** 2 if scale else 0.0
                    pairs += 1
    got, count = output_overlap(outputs_TKD, present_TK)
    assert got.item() == pytest.approx(total) and count == pairs
    scaled, _ = output_overlap(outputs_TKD * 37.0, present_TK)
    assert scaled.item() == pytest.approx(total)


def test_coactivation_sparsity() -> None:
    counts_LEE = torch.zeros(2, 3, 3)
    counts_LEE[0, 0, 1] = counts_LEE[0, 1, 0] = 4
    counts_LEE[0, 0, 0] = 9
    counts_LEE[1] = 1
    assert coactivation_sparsity(counts_LEE).tolist() == pytest.approx([4 / 6, 0])
    assert coactivation_sparsity(torch.zeros(1, 1)).item() == 0


def test_self_weight() -> None:
    weights_LEE = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.8, 0.0], [0.0, 0.0, 0.0]], torch.zeros(3, 3).tolist()])
    active_LE = torch.tensor([[True, True, False], [False, False, False]])
    assert self_weight(weights_LEE, active_LE).tolist() == pytest.approx([0.65, 0.0])


def test_repulsion_ratio() -> None:
    ratio = repulsion_ratio(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[6.0, 8.0], [0.0, 0.0]]))
    assert ratio.tolist() == pytest.approx([0.5, 0.0])

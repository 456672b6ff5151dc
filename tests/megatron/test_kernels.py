"""The arithmetic that replaces Megatron's on the CPU, each piece against autograd or torch's own.

Shape legend: T rows, E experts, D hidden, F intermediate; b sequences, n heads, g key/value heads, t keys, d head width.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.megatron.model import attention, experts, norm  # noqa: E402

SIZES_E = [3, 0, 5, 1]  # one expert has no row
D, HIDDEN_F = 6, 4


def _expert_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    fc1, fc2 = [random(2 * HIDDEN_F, D) for _ in SIZES_E], [random(D, HIDDEN_F) for _ in SIZES_E]
    return random(sum(SIZES_E), D), random(sum(SIZES_E)), fc1 + fc2


def _one_by_one(x_TD: Tensor, probs_T: Tensor, weights: list[Tensor]) -> Tensor:
    rows, start = [], 0
    for e, size in enumerate(SIZES_E):
        for row in range(start, start + size):
            gate_F, up_F = (weights[e] @ x_TD[row]).chunk(2)
            rows.append(weights[len(SIZES_E) + e] @ (F.silu(gate_F) * up_F) * probs_T[row])
        start += size
    return torch.stack(rows)


@pytest.mark.parametrize("in_cache", [0, 2**20])
def test_experts_equal_row_by_row_and_their_gradients_autograd(monkeypatch: pytest.MonkeyPatch, in_cache: int) -> None:
    monkeypatch.setattr(experts, "_IN_CACHE", in_cache)
    x_TD, probs_T, weights = _expert_inputs(torch.float64)
    leaves = [x_TD, probs_T, *weights]
    for leaf in leaves:
        leaf.requires_grad_()
    found_TD = experts._SwiGLUExperts.apply(x_TD, probs_T, SIZES_E, *weights)
    expected_TD = _one_by_one(x_TD, probs_T, weights)
    torch.testing.assert_close(found_TD, expected_TD, rtol=1e-12, atol=1e-12)
    seed_TD = torch.randn(found_TD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(expected_TD, leaves, seed_TD, allow_unused=True)
    for mine, theirs in zip(torch.autograd.grad(found_TD, leaves, seed_TD), expected, strict=True):
        wanted = torch.zeros_like(mine) if theirs is None else theirs  # the expert without rows
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("sizes", [SIZES_E, [0, 0, 0, 9], [9, 0, 0, 0], [0, 0, 0, 0]])
def test_grouped_experts_equal_one_by_one(sizes: list[int], accumulate: bool) -> None:
    """In float32 with widths that grouped products like, against the node that walks over the experts; empty ones, too."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    fc1_E2FD, fc2_EDF = random(4, 32, 32), random(4, 32, 16)
    x_TD, probs_T, weights = random(sum(sizes), 32), random(sum(sizes)), [*fc1_E2FD, *fc2_EDF]
    leaves = [leaf.detach().requires_grad_() for leaf in (x_TD, probs_T, *weights)]
    expected_TD = experts._SwiGLUExperts.apply(leaves[0], leaves[1], sizes, *leaves[2:])
    seed_TD = random(*expected_TD.shape)
    expected = torch.autograd.grad(expected_TD, leaves, seed_TD)
    sums: list[Tensor] = []
    ends_E = torch.tensor(sizes).cumsum(0).to(torch.int32)
    found_TD = experts._GroupedSwiGLUExperts.apply(
        leaves[0],
        leaves[1],
        ends_E,
        fc1_E2FD,
        fc2_EDF,
        (lambda *gradients: sums.extend(g for stack in gradients for g in stack)) if accumulate else None,
        *leaves[2:],
    )
    torch.testing.assert_close(found_TD, expected_TD)
    inputs = leaves[:2] if accumulate else leaves
    found = [*torch.autograd.grad(found_TD, inputs, seed_TD), *sums]
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_experts_together_and_one_at_a_time_are_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD, probs_T, weights = _expert_inputs(torch.float32)
    together = experts._swiglu_experts(x_TD, probs_T, SIZES_E, weights)
    monkeypatch.setattr(experts, "_IN_CACHE", 0)
    one_by_one = experts._swiglu_experts(x_TD, probs_T, SIZES_E, weights)
    assert torch.equal(together[0], one_by_one[0]) and torch.equal(together[1], one_by_one[1])


def test_norm_equals_torch_s_and_is_the_same_without_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x_D = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_D = torch.randn(8, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm._RMSNorm.apply(x_D, weight_D, 1e-6), F.rms_norm(x_D, (8,), weight_D, 1e-6))
    assert torch.autograd.gradcheck(lambda x, w: norm._RMSNorm.apply(x, w, 1e-6), (x_D, weight_D))
    module = norm.RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 8, eps=1e-6)
    with torch.no_grad():
        module.weight.copy_(weight_D)
    trained = module(x_D.float())
    with torch.no_grad():
        assert torch.equal(module(x_D.float()), trained.detach())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_from_one_position_equals_torch_s(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query_bn1d = torch.randn(3, 4, 1, 8, generator=generator)
    key_bgtd, value_bgtd = torch.randn(2, 3, groups, 7, 8, generator=generator)[
        ..., :6, :
    ]  # a cache is longer than its keys
    allowed_b11t = (torch.arange(6) < torch.tensor([[1], [4], [6]]))[:, None, None]
    found_1bn = attention._attend(query_bn1d, key_bgtd, value_bgtd, allowed_b11t)
    expected_bn1d = F.scaled_dot_product_attention(
        query_bn1d, key_bgtd, value_bgtd, attn_mask=allowed_b11t, enable_gqa=True
    )
    torch.testing.assert_close(found_1bn, expected_bn1d.permute(2, 0, 1, 3).flatten(2))
    assert torch.equal(found_1bn[0, 0].view(4, 8)[0], value_bgtd[0, 0, 0])  # sees one key: takes its value

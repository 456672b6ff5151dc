"""Specialisation losses against loops over tokens and pairs.

Shape legend: T tokens, K experts of a token, E experts, D hidden size.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vp2o.core.choices import Orthogonality
from megatron_vp2o.core.specialization import gated_orthogonality_loss, orthogonality_loss, score_sums, variance_loss

EPSILON = 1e-8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped(outputs_TKD: Tensor, kind: Orthogonality, valid_T: Tensor, present_TK: Tensor) -> float:
    total = 0.0
    for t, slots in enumerate(outputs_TKD):
        for j, first in enumerate(slots):
            for k, second in enumerate(slots):
                if j == k or not valid_T[t] or not present_TK[t, j] or not present_TK[t, k]:
                    continue
                inner, own, other = (
                    float((a * b).sum()) for a, b in ((first, second), (first, first), (second, second))
                )
                if kind is Orthogonality.projection:
                    total += inner**2 / (other + EPSILON)
                else:
                    total += inner**2 / (own * other + EPSILON**2)
    return total


@pytest.mark.parametrize("kind", Orthogonality)
@given(T=st.integers(0, 5), K=st.integers(1, 4), D=st.integers(1, 6), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_orthogonality_is_that_of_a_loop(kind: Orthogonality, T: int, K: int, D: int, seed: int) -> None:
    outputs_TKD = normal(T, K, D, seed=seed)
    valid_T, present_TK = normal(T, seed=seed + 1) > -0.5, normal(T, K, seed=seed + 2) > -0.5
    total, count = orthogonality_loss(outputs_TKD, kind=kind, valid_T=valid_T, present_TK=present_TK)
    assert total.item() == pytest.approx(looped(outputs_TKD, kind, valid_T, present_TK), rel=1e-10, abs=1e-14)
    assert count == valid_T.sum()
    everything, tokens = orthogonality_loss(outputs_TKD, kind=kind)
    full = looped(outputs_TKD, kind, torch.ones(T).bool(), torch.ones(T, K).bool())
    assert everything.item() == pytest.approx(full, rel=1e-10, abs=1e-14) and tokens == T


@pytest.mark.parametrize("kind", Orthogonality)
def test_orthogonality_gradient(kind: Orthogonality) -> None:
    outputs_TKD = normal(4, 3, 5).requires_grad_()
    valid_T, present_TK = torch.tensor([True, True, False, True]), torch.ones(4, 3, dtype=torch.bool)
    present_TK[0, 1] = False

    def loss(outputs_TKD: Tensor) -> Tensor:
        return orthogonality_loss(outputs_TKD, kind=kind, valid_T=valid_T, present_TK=present_TK)[0]

    assert torch.autograd.gradcheck(loss, (outputs_TKD,))
    (gradient,) = torch.autograd.grad(loss(outputs_TKD), outputs_TKD)
    assert not gradient[2].any() and not gradient[0, 1].any() and gradient[0, 0].any()


@pytest.mark.parametrize("kind", Orthogonality)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_outputs_overlap_with_nothing(kind: Orthogonality, dtype: torch.dtype) -> None:
    for silent in (slice(0, 1), slice(0, 3)):  # one of three, all
        outputs_TKD = normal(2, 3, 4).to(dtype)
        outputs_TKD[:, silent] = 0
        outputs_TKD.requires_grad_()
        total, _ = orthogonality_loss(outputs_TKD, kind=kind)
        rest, _ = orthogonality_loss(outputs_TKD[:, silent.stop :], kind=kind)
        assert total.item() == pytest.approx(rest.item(), rel=1e-6)
        (gradient,) = torch.autograd.grad(total, outputs_TKD)
        assert gradient.isfinite().all() and not gradient[:, silent].any()


@pytest.mark.parametrize("kind", Orthogonality)
def test_what_does_not_count_may_overflow(kind: Orthogonality) -> None:
    clean_TKD = normal(3, 3, 4).float()
    valid_T, present_TK = torch.tensor([True, False, True]), torch.ones(3, 3, dtype=torch.bool)
    present_TK[0, 2] = False
    dirty_TKD = clean_TKD.clone()
    dirty_TKD[1], dirty_TKD[0, 2] = 1e30, 1e30
    results = []
    for outputs_TKD in (clean_TKD, dirty_TKD):
        outputs_TKD.requires_grad_()
        total, _ = orthogonality_loss(outputs_TKD, kind=kind, valid_T=valid_T, present_TK=present_TK)
        results.append((total, *torch.autograd.grad(total, outputs_TKD)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_known_values() -> None:
    """Two outputs at 60 degrees, lengths 2 and 3: projections of length 1 and 1.5."""
    outputs_TKD = torch.tensor([[[2.0, 0.0], [1.5, 1.5 * 3**0.5]]], dtype=torch.float64)
    projection, _ = orthogonality_loss(outputs_TKD, kind=Orthogonality.projection)
    cosine, _ = orthogonality_loss(outputs_TKD, kind=Orthogonality.cosine)
    assert projection.item() == pytest.approx(1 + 2.25)
    assert cosine.item() == pytest.approx(2 * 0.25)
    larger, _ = orthogonality_loss(7 * outputs_TKD, kind=Orthogonality.cosine)
    assert larger.item() == pytest.approx(cosine.item())


@pytest.mark.parametrize("kind", Orthogonality)
def test_only_gram_matrices_are_kept_for_the_gradient(kind: Orthogonality) -> None:
    """Besides the outputs themselves, nothing as large as they are."""
    outputs_TKD = normal(8, 2, 256).requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        orthogonality_loss(outputs_TKD, kind=kind, present_TK=torch.ones(8, 2, dtype=torch.bool))
    large = {tensor.untyped_storage().data_ptr() for tensor in saved if tensor.numel() >= outputs_TKD.numel()}
    assert large == {outputs_TKD.untyped_storage().data_ptr()}


def test_bfloat16_outputs_are_compared_in_float32() -> None:
    total, _ = orthogonality_loss(normal(4, 2, 8).bfloat16(), kind=Orthogonality.cosine)
    assert total.dtype is torch.float32


def looped_variance(scores_TE: Tensor, valid_T: Tensor, mean: list[float] | None = None) -> float:
    tokens = [t for t in range(len(scores_TE)) if valid_T[t]]
    experts = scores_TE.shape[1]
    total = 0.0
    for j in range(experts):
        centre = mean[j] if mean else sum(scores_TE[t, j].item() for t in tokens) / max(len(tokens), 1)
        total -= sum((scores_TE[t, j].item() - centre) ** 2 for t in tokens) / experts
    return total


@given(T=st.integers(0, 8), E=st.integers(1, 5), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_variance_is_that_of_a_loop(T: int, E: int, seed: int) -> None:
    scores_TE, valid_T, mean_E = normal(T, E, seed=seed), normal(T, seed=seed + 1) > 0, normal(E, seed=seed + 2)
    total, count = variance_loss(scores_TE, valid_T)
    assert total.item() == pytest.approx(looped_variance(scores_TE, valid_T), abs=1e-12) and count == valid_T.sum()
    given_mean, _ = variance_loss(scores_TE, valid_T, mean_E)
    assert given_mean.item() == pytest.approx(looped_variance(scores_TE, valid_T, mean_E.tolist()), abs=1e-12)


def test_variance_of_parts_with_the_common_mean_is_that_of_the_whole() -> None:
    """Value and gradient; the gradient of the whole is autograd's through the mean too."""
    scores_TE, valid_T = normal(20, 6).requires_grad_(), torch.arange(20) % 3 != 0
    kept_TE = scores_TE[valid_T]
    whole = -(kept_TE - kept_TE.mean(0)).square().mean(1).sum()
    (expected,) = torch.autograd.grad(whole, scores_TE)
    parts = list(zip(scores_TE.split(7), valid_T.split(7), strict=True))
    sums_E, tokens = (sum(values) for values in zip(*(score_sums(*part) for part in parts), strict=True))
    losses = [variance_loss(scores, valid, sums_E / tokens)[0] for scores, valid in parts]
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), scores_TE)
    assert torch.stack(losses).sum().item() == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-14)
    (alone,) = torch.autograd.grad(variance_loss(scores_TE, valid_T)[0], scores_TE)
    assert torch.allclose(alone, expected, rtol=1e-10, atol=1e-14)
    within = sum(variance_loss(scores, valid)[0].item() for scores, valid in parts)
    assert abs(within) < abs(whole.item())


def test_scores_that_do_not_count_may_be_anything() -> None:
    scores_TE, valid_T = normal(5, 3), torch.tensor([True, False, True, True, False])
    expected, _ = variance_loss(scores_TE[valid_T])
    scores_TE[~valid_T] = torch.nan
    scores_TE.requires_grad_()
    total, _ = variance_loss(scores_TE, valid_T)
    (gradient,) = torch.autograd.grad(total, scores_TE)
    assert torch.allclose(total, expected) and gradient.isfinite().all() and not gradient[~valid_T].any()


def test_no_token_that_counts() -> None:
    nobody = torch.zeros(3, dtype=torch.bool)
    for total, count in (
        orthogonality_loss(normal(3, 2, 4), kind=Orthogonality.cosine, valid_T=nobody),
        variance_loss(normal(3, 4), nobody),
    ):
        assert total == 0 and count == 0


@pytest.mark.parametrize("kind", list(Orthogonality))
@pytest.mark.parametrize("seed", range(6))
def test_gated_outputs_give_the_loss_and_gradients_of_outputs_divided_by_gates(kind: Orthogonality, seed: int) -> None:
    """Against autograd through the division, with empty slots and tokens that do not count."""
    generator = torch.Generator().manual_seed(seed)
    tokens, topk, width = 7, 3, 5
    present_TK = torch.rand(tokens, topk, generator=generator) > 0.3
    count = int(present_TK.sum())
    rows_TK = torch.zeros(tokens, topk, dtype=torch.long)
    rows_TK[present_TK] = torch.randperm(count, generator=generator)
    valid_T = torch.rand(tokens, generator=generator) > 0.2
    output_RD = torch.randn(count, width, generator=generator, dtype=torch.float64).requires_grad_()
    gates_TK = (torch.rand(tokens, topk, generator=generator, dtype=torch.float64) + 0.1).requires_grad_()
    found, tokens_found = gated_orthogonality_loss(output_RD, rows_TK, gates_TK, present_TK, kind=kind, valid_T=valid_T)
    outputs_TKD = output_RD[rows_TK] / torch.where(present_TK, gates_TK, 1.0)[..., None]
    expected, tokens_expected = orthogonality_loss(outputs_TKD, kind=kind, valid_T=valid_T, present_TK=present_TK)
    torch.testing.assert_close(found, expected)
    assert tokens_found == tokens_expected
    leaves = [output_RD, gates_TK]
    assert float(expected) > 0
    for mine, theirs in zip(
        torch.autograd.grad(found * 2, leaves), torch.autograd.grad(expected * 2, leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs)

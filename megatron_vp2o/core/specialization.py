"""Expert specialisation losses (Guo et al., arXiv 2505.22323), as sums over tokens.

Callers divide by the tokens of all ranks and micro-batches, so that the mean does not depend on how they were dealt.

Shape legend: T tokens, K experts a token is routed to, E experts, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vp2o.core.choices import Orthogonality

_EPSILON = 1e-8
"""Squared length that counts as none: outputs much shorter than 1e-4 fade out of both kinds of overlap."""


def orthogonality_loss(
    outputs_TKD: Tensor,
    *,
    kind: Orthogonality,
    valid_T: Tensor | None = None,
    present_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """L_o before its division by T: overlap of the outputs of each token's experts, over ordered pairs j != k.

        projection:  <y_j, y_k>^2 / (<y_k, y_k> + eps), the squared length of y_j's projection on y_k (the paper's Eq. 5)
        cosine:      <y_j, y_k>^2 / (<y_j, y_j> <y_k, y_k> + eps^2)

    A zero output overlaps with nothing; its gradient is zero. Only Gram matrices [T, K, K] are made, in float32 at least,
    and the gradient is a product of one with the outputs.

    Args:
        outputs_TKD: outputs before they are weighted by gates and added up; finite everywhere, in empty slots too.
        kind: which of the two.
        valid_T: True for tokens that count, or how often each counts.
        present_TK: True where the slot holds an expert's output (a token may have fewer than K, or lost one to a full
            expert).

    Returns:
        (sum over the tokens that count, how many these are: whether or not they have a pair).

    Example:
        >>> outputs_TKD = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])  # one parallel pair, one orthogonal
        >>> [part.item() for part in orthogonality_loss(outputs_TKD, kind=Orthogonality.cosine)]
        [2.0, 2.0]
    """
    gram_TKK = _gram(outputs_TKD)
    return _overlap(gram_TKK, kind, valid_T, present_TK), _count(outputs_TKD, valid_T)


def gated_orthogonality_loss(
    output_RD: Tensor,
    rows_TK: Tensor,
    gates_TK: Tensor,
    present_TK: Tensor,
    *,
    kind: Orthogonality,
    valid_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`orthogonality_loss` of the outputs y = output_RD[rows] / gate, without making them.

    Gates scale the Gram matrices, which are small. Neither the gathered rows [T, K, D] nor a float32 copy of them stays
    alive: the backward pass gathers them again, and their gradient is one product with a [T, K, K] matrix.

    Args:
        output_RD: outputs of experts, each multiplied by its token's gate; any float type.
        rows_TK: which row is the output of a token's k-th expert; anything where `present` is False.
        gates_TK: the gates, not zero where `present` is True.
        present_TK: True where the slot holds an expert's output; no row is present twice.
        kind: which overlap.
        valid_T: True for tokens that count, or how often each counts.

    Returns:
        (sum over the tokens that count, how many these are).

    Example:
        >>> output_RD, gates_TK = torch.tensor([[0.75, 0.0], [0.25, 0.0]]), torch.tensor([[0.75, 0.25]])
        >>> slots = {"rows_TK": torch.tensor([[0, 1]]), "present_TK": torch.tensor([[True, True]])}
        >>> loss, tokens = gated_orthogonality_loss(output_RD, gates_TK=gates_TK, kind=Orthogonality.projection, **slots)
        >>> round(loss.item(), 6), tokens.item()  # both outputs are (1, 0): two ordered pairs of overlap 1
        (2.0, 1.0)
    """
    total = _GatedOrthogonality.apply(output_RD, rows_TK, gates_TK, present_TK, kind, valid_T)
    return total, _count(gates_TK, valid_T)


class _GatedOrthogonality(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output_RD: Tensor,
        rows_TK: Tensor,
        gates_TK: Tensor,
        present_TK: Tensor,
        kind: Orthogonality,
        valid_T: Tensor | None,
    ) -> Tensor:
        raw_TKK = _gram(output_RD[rows_TK])
        inverse_TK = torch.where(present_TK, gates_TK, 1.0).to(raw_TKK.dtype).reciprocal()
        scale_TKK = inverse_TK[:, :, None] * inverse_TK[:, None, :]
        with torch.enable_grad():
            gram_TKK = (raw_TKK * scale_TKK).requires_grad_()
            total = _overlap(gram_TKK, kind, valid_T, present_TK)
            (slope_TKK,) = torch.autograd.grad(total, gram_TKK)
        both_TKK = slope_TKK + slope_TKK.transpose(1, 2)
        # y_j = o_j / g_j: the derivative by a gate is -1 / g_j times that of scaling y_j
        dgates_TK = -(both_TKK * gram_TKK.detach()).sum(-1) * inverse_TK * present_TK
        ctx.save_for_backward(output_RD, rows_TK, present_TK, both_TKK * scale_TKK, dgates_TK.to(gates_TK.dtype))
        return total.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        output_RD, rows_TK, present_TK, mix_TKK, dgates_TK = ctx.saved_tensors
        rows_TKD = output_RD[rows_TK]
        mix_TKK = mix_TKK * grad
        if rows_TKD.is_cuda:
            doutput_TKD = torch.bmm(mix_TKK.to(rows_TKD.dtype), rows_TKD)
        else:
            doutput_TKD = torch.bmm(mix_TKK, rows_TKD.to(mix_TKK.dtype)).to(output_RD.dtype)
        rows = output_RD.shape[0]
        doutput_RD = output_RD.new_zeros(rows + 1, output_RD.shape[1])  # empty slots go to a row of their own
        target_TK = torch.where(present_TK, rows_TK, rows)
        doutput_RD.index_copy_(0, target_TK.flatten(), doutput_TKD.flatten(0, 1))
        doutput_RD = doutput_RD[:rows]
        return doutput_RD, None, dgates_TK * grad, None, None, None


def _gram(rows_TKD: Tensor) -> Tensor:
    """Inner products of each token's rows, [T, K, K], in float32 at least."""
    wanted = torch.promote_types(rows_TKD.dtype, torch.float32)
    if rows_TKD.is_cuda and rows_TKD.dtype is not wanted and not rows_TKD.requires_grad:
        return torch.bmm(rows_TKD, rows_TKD.transpose(1, 2), out_dtype=wanted)
    rows_TKD = rows_TKD.to(wanted)
    return rows_TKD @ rows_TKD.transpose(1, 2)


def _overlap(gram_TKK: Tensor, kind: Orthogonality, valid_T: Tensor | None, present_TK: Tensor | None) -> Tensor:
    """The sum of overlaps over ordered pairs."""
    keep_TKK = _kept(gram_TKK, valid_T, present_TK)
    # Left out before anything is squared or divided: what overflows in a slot that does not count has gradient 0, not NaN.
    gram_TKK = torch.where(keep_TKK, gram_TKK, 0.0)
    square_TK = gram_TKK.diagonal(dim1=1, dim2=2)
    if kind is Orthogonality.projection:
        divisor_TKK = (square_TK + _EPSILON)[:, None, :]
    else:
        divisor_TKK = square_TK[:, :, None] * square_TK[:, None, :] + _EPSILON**2
    other_KK = ~torch.eye(gram_TKK.shape[-1], dtype=torch.bool, device=gram_TKK.device)
    overlap_TKK = gram_TKK.square() / divisor_TKK * other_KK
    if valid_T is not None and valid_T.is_floating_point():
        return (overlap_TKK.sum((1, 2)) * valid_T).sum()
    return overlap_TKK.sum()


def variance_loss(
    scores_TE: Tensor, valid_T: Tensor | None = None, mean_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """L_v before its division by T: -(1/E) sum_j (s_tj - mean_t s_j)^2, summed over tokens (the paper's Eq. 6).

    Tokens may be dealt out over ranks and micro-batches: with the mean of all of them as `mean_E` (`score_sums`, added up)
    the parts add up to the whole, and so do their gradients. The mean carries none: through it, the whole's derivative is
    zero. With each part's own mean (the default) the parts add up to the variance within parts, which is smaller.

    Args:
        scores_TE: the router's scores of all experts.
        valid_T: True for tokens that count, or how often each counts.
        mean_E: mean of each expert's score over all tokens, where these are more than are here.

    Returns:
        (sum over the tokens that count, how many these are).

    Example:
        >>> [part.item() for part in variance_loss(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))]  # each of two tokens: -0.5^2
        [-0.5, 2.0]
    """
    if mean_E is None:
        sums_E, tokens = score_sums(scores_TE, valid_T)
        mean_E = sums_E / tokens.clamp(min=1)
    deviation_TE = scores_TE - mean_E.detach()
    if valid_T is not None:
        deviation_TE = torch.where(valid_T[:, None] > 0, deviation_TE, 0.0)
    return -_sum(deviation_TE.square().mean(1), valid_T), _count(scores_TE, valid_T)


def score_sums(scores_TE: Tensor, valid_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the mean score of each expert is made of: (sums [E] over the tokens that count, how many), no gradient.

    Example:
        >>> sums_E, tokens = score_sums(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        >>> sums_E.tolist(), tokens.item()
        ([1.5, 0.5], 2.0)
    """
    scores_TE = scores_TE.detach()
    if valid_T is not None:
        scores_TE = torch.where(valid_T[:, None] > 0, scores_TE, 0.0)
    return _sum(scores_TE, valid_T), _count(scores_TE, valid_T)


def _kept(gram_TKK: Tensor, valid_T: Tensor | None, present_TK: Tensor | None) -> Tensor:
    """True between two slots of a token that counts, both of which hold an output. [T, K, K]."""
    keep_TKK = torch.ones_like(gram_TKK, dtype=torch.bool)
    if present_TK is not None:
        keep_TKK = keep_TKK & present_TK[:, :, None] & present_TK[:, None, :]
    if valid_T is not None:
        keep_TKK = keep_TKK & (valid_T > 0)[:, None, None]
    return keep_TKK


def _sum(values: Tensor, valid_T: Tensor | None) -> Tensor:
    """Over tokens, each as often as it counts; what does not count is 0 in `values` already."""
    if valid_T is None or not valid_T.is_floating_point():
        return values.sum(0)
    return torch.einsum("t...,t->...", values, valid_T)


def _count(values: Tensor, valid_T: Tensor | None) -> Tensor:
    if valid_T is None:
        return torch.full((), float(len(values)), device=values.device)
    return valid_T.sum().float()

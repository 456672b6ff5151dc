"""Expert specialisation losses (Guo et al., arXiv 2505.22323), as sums over tokens.

Callers divide by the tokens of all ranks and micro-batches, so that the mean does not depend on how they were dealt.

Shape legend: T tokens, K experts a token is routed to, E experts, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vp2o.core.choices import Orthogonality

_EPSILON = 1e-8


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

    A zero output overlaps with nothing; its gradient is zero.

    Args:
        outputs_TKD: outputs before they are weighted by gates and added up.
        valid_T: True for tokens that count.
        present_TK: True where the slot holds an expert's output.

    Returns:
        (sum over the tokens that count, how many these are).
    """
    gram_TKK = outputs_TKD @ outputs_TKD.transpose(1, 2)
    square_TK = gram_TKK.diagonal(dim1=1, dim2=2)
    if kind is Orthogonality.projection:
        divisor_TKK = (square_TK + _EPSILON)[:, None, :]
    else:
        divisor_TKK = square_TK[:, :, None] * square_TK[:, None, :] + _EPSILON**2
    overlap_TKK = _pairs(gram_TKK.square() / divisor_TKK, valid_T, present_TK)
    return overlap_TKK.sum(), _count(outputs_TKD, valid_T)


def variance_loss(
    scores_TE: Tensor, valid_T: Tensor | None = None, mean_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """L_v before its division by T: -(1/E) sum_j (s_tj - mean_t s_j)^2, summed over tokens (the paper's Eq. 6).

    The mean carries no gradient: through it, the derivative is zero anyway.

    Args:
        scores_TE: the router's scores of all experts.
        valid_T: True for tokens that count.
        mean_E: mean of each expert's score over all tokens, where these are more than are here.

    Returns:
        (sum over the tokens that count, how many these are).
    """
    count = _count(scores_TE, valid_T)
    weight_T1 = torch.ones_like(scores_TE[:, :1]) if valid_T is None else valid_T[:, None].to(scores_TE.dtype)
    if mean_E is None:
        mean_E = (scores_TE.detach() * weight_T1).sum(0) / count.clamp(min=1)
    return -((scores_TE - mean_E).square() * weight_T1).mean(1).sum(), count


def _pairs(values_TKK: Tensor, valid_T: Tensor | None, present_TK: Tensor | None) -> Tensor:
    """Zero on the diagonal and where a token does not count or a slot is empty."""
    slots = values_TKK.shape[-1]
    keep_TKK = ~torch.eye(slots, dtype=torch.bool, device=values_TKK.device).expand_as(values_TKK)
    if present_TK is not None:
        keep_TKK = keep_TKK & present_TK[:, :, None] & present_TK[:, None, :]
    if valid_T is not None:
        keep_TKK = keep_TKK & valid_T[:, None, None]
    return torch.where(keep_TKK, values_TKK, 0.0)


def _count(values: Tensor, valid_T: Tensor | None) -> Tensor:
    return torch.tensor(float(len(values)), device=values.device) if valid_T is None else valid_T.sum().float()

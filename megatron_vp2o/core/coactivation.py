"""Which experts work together: co-activation scores and the masks of the Stein field.

Shape legend: T tokens, E experts, `...` any leading dimensions (layers).
"""

from __future__ import annotations

import torch
from torch import Tensor


def coactivation_counts(selected_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """How many tokens were routed to both of two experts; the numerator of C (VP2O Eq. 6).

    Counts of micro-batches and ranks add up; `scores` divides by the tokens once.

    Args:
        selected_TE: the routing map, 1 (or True) where a token goes to an expert.
        valid_T: True for tokens that count (padding does not), or how often each counts.

    Returns:
        [E, E] float64, symmetric; the diagonal holds each expert's tokens.

    Example:
        >>> coactivation_counts(torch.tensor([[1, 1, 0], [1, 0, 1]])).tolist()
        [[2.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    """
    chosen_TE = selected_TE.float()  # whole numbers: products are exact, sums to 2^24
    counted_TE = chosen_TE if valid_T is None else chosen_TE * valid_T[:, None]
    return (chosen_TE.t() @ counted_TE).double()


def coactivation_scores(counts_EE: Tensor, tokens: Tensor | float) -> Tensor:
    """C_ij = (1/T) sum_t m_i(t) m_j(t) (VP2O Eq. 6): in [0, 1]; zero where no token was counted.

    Args:
        counts_EE: [..., E, E] counts over all ranks.
        tokens: T, a number or [...].

    Example:
        >>> coactivation_scores(torch.tensor([[2.0, 1.0], [1.0, 1.0]]), tokens=2).tolist()
        [[1.0, 0.5], [0.5, 0.5]]
    """
    tokens = torch.as_tensor(tokens, dtype=counts_EE.dtype, device=counts_EE.device)
    return counts_EE / tokens.clamp(min=1.0)[..., None, None]


def update_average(average_EE: Tensor | None, current_EE: Tensor, decay: float) -> Tensor:
    """Exponential moving average of C over steps; the first step starts it.

    Raises:
        ValueError: for a decay outside [0, 1).

    Example:
        >>> update_average(torch.tensor([[1.0]]), torch.tensor([[0.0]]), decay=0.75).tolist()
        [[0.75]]
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay={decay}: choose 0 (no average) up to, but not including, 1")
    return current_EE.clone() if average_EE is None else decay * average_EE + (1.0 - decay) * current_EE


def active_experts(counts_EE: Tensor) -> Tensor:
    """A_B, the experts with at least one routed token: [..., E] bool.

    Example:
        >>> active_experts(torch.tensor([[2.0, 0.0], [0.0, 0.0]])).tolist()
        [True, False]
    """
    return counts_EE.diagonal(dim1=-2, dim2=-1) > 0


def attraction_mask(
    scores_EE: Tensor,
    active_E: Tensor,
    *,
    neighbours: int | None = None,
    threshold: float | None = None,
) -> Tensor:
    """A+, the co-active neighbours of each active expert (VP2O section 3.2): [..., E, E] bool, row i speaks of expert i.

    An active expert is always its own neighbour, as in SVGD's sum; without that it would lose its own gradient. Rows and
    columns of inactive experts are empty: they have no gradient, and a moving average must not let them dilute others'.

    Args:
        scores_EE: C, [..., E, E].
        active_E: [..., E] bool.
        neighbours: m, keep the m other experts with the largest C_ij > 0 (ties: the lower index).
        threshold: rho, keep all with C_ij >= rho and C_ij > 0. Exactly one of the two is given.

    Raises:
        ValueError: if both or none of neighbours and threshold are given, or one is out of bounds.

    Example:
        >>> scores_EE = torch.tensor([[0.9, 0.5, 0.2], [0.5, 0.9, 0.1], [0.2, 0.1, 0.9]])
        >>> attraction_mask(scores_EE, torch.ones(3, dtype=torch.bool), neighbours=1).int().tolist()
        [[1, 1, 0], [1, 1, 0], [1, 0, 1]]
    """
    if (neighbours is None) == (threshold is None):
        raise ValueError(f"neighbours={neighbours}, threshold={threshold}: give exactly one of them")
    experts = scores_EE.shape[-1]
    own_EE = torch.eye(experts, dtype=torch.bool, device=scores_EE.device)
    other_EE = scores_EE.masked_fill(own_EE | ~active_E[..., None, :], 0.0)
    if threshold is not None:
        near_EE = (other_EE >= threshold) & (other_EE > 0)
    else:
        assert neighbours is not None
        if neighbours < 0:
            raise ValueError(f"neighbours={neighbours}: choose 0 or more")
        order_EE = other_EE.argsort(dim=-1, descending=True, stable=True)
        near_EE = torch.zeros_like(other_EE, dtype=torch.bool)
        near_EE.scatter_(-1, order_EE[..., :neighbours], True)
        near_EE &= other_EE > 0
    return (near_EE | own_EE) & active_E[..., :, None] & active_E[..., None, :]


def repulsion_mask(attraction_EE: Tensor, active_E: Tensor) -> Tensor:
    """A-, the active experts that are no neighbours (VP2O section 3.2): 1 - A+ off the diagonal. [..., E, E] bool.

    Example:
        >>> attraction_EE = torch.tensor([[True, True, False], [True, True, False], [True, False, True]])
        >>> repulsion_mask(attraction_EE, torch.ones(3, dtype=torch.bool)).int().tolist()
        [[0, 0, 1], [0, 0, 1], [0, 1, 0]]
    """
    own_EE = torch.eye(attraction_EE.shape[-1], dtype=torch.bool, device=attraction_EE.device)
    return ~attraction_EE & ~own_EE & active_E[..., :, None] & active_E[..., None, :]

"""What one would like to see of experts, router and prototypes, and the VP2O paper says it did not report.

Shape legend: L layers (any leading dimensions, `...`), E experts, T tokens, K experts of a token, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def router_entropy(probabilities_TE: Tensor, valid_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Entropy (nats) of the router's distribution over experts: (sum over the tokens that count, how many these are).

    Args:
        probabilities_TE: each row adds up to 1; a probability of 0 contributes nothing.
        valid_T: True for tokens that count, or how often each counts.

    Example:
        >>> total, tokens = router_entropy(torch.full((3, 4), 0.25))  # all of four experts alike
        >>> round((total / tokens).exp().item(), 3)
        4.0
    """
    entropy_T = -torch.xlogy(probabilities_TE, probabilities_TE).sum(-1)
    if valid_T is None:
        valid_T = torch.ones_like(entropy_T, dtype=torch.bool)
    return torch.where(valid_T > 0, entropy_T * valid_T, 0.0).sum(), valid_T.sum()


def expert_utilisation(loads_LE: Tensor) -> Tensor:
    """Fraction of experts with at least one token: [...].

    Example:
        >>> expert_utilisation(torch.tensor([3, 0, 1, 0])).item()
        0.5
    """
    return (loads_LE > 0).to(torch.float32).mean(-1)


def effective_experts(loads_LE: Tensor) -> Tensor:
    """exp(H) / E of the load distribution: 1 when all experts are equally loaded, 1/E when one has everything. [...].

    No token at all: 0. Loads are tokens an expert, of any numeric type.

    Example:
        >>> round(effective_experts(torch.tensor([2, 2, 0, 0])).item(), 6)
        0.5
    """
    loads_LE = loads_LE.double()
    total = loads_LE.sum(-1, keepdim=True)
    share_LE = loads_LE / total.clamp(min=torch.finfo(loads_LE.dtype).tiny)
    entropy = -torch.xlogy(share_LE, share_LE).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp() / loads_LE.shape[-1], 0.0)


def load_violation(loads_LE: Tensor) -> Tensor:
    """Maximal load violation, max load / mean load - 1 (MaxVio of Wang et al., arXiv 2408.15664): [...].

    0 when all experts are equally loaded, E - 1 when one has everything, 0 without any token.

    Example:
        >>> load_violation(torch.tensor([3, 1, 0, 0])).item()
        2.0
    """
    loads_LE = loads_LE.double()
    mean = loads_LE.mean(-1)
    return torch.where(mean > 0, loads_LE.amax(-1) / mean.clamp(min=torch.finfo(loads_LE.dtype).tiny) - 1.0, 0.0)


class Overlap(NamedTuple):
    """How alike prototypes are; each [...].

    Example:
        >>> overlap = prototype_overlap(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # one line, twice
        >>> (overlap.mean.item(), overlap.maximum.item(), round(overlap.effective_rank.item(), 6))
        (1.0, 1.0, 1.0)
    """

    mean: Tensor
    """Mean squared cosine of two different experts' prototypes."""
    maximum: Tensor
    """The largest."""
    effective_rank: Tensor
    """exp of the entropy of the Gram matrix's normalised eigenvalues: the number of directions in use, 1 to min(E, D)."""


def prototype_overlap(prototypes_LED: Tensor) -> Overlap:
    """Off-diagonal squared overlaps and effective rank (Roy & Vetterli 2007) of unit prototypes. One expert: 0, 0, 1.

    Example:
        >>> overlap = prototype_overlap(torch.eye(3))
        >>> (overlap.mean.item(), overlap.maximum.item(), round(overlap.effective_rank.item(), 6))
        (0.0, 0.0, 3.0)
    """
    square_LEE = squared_overlaps(prototypes_LED)
    return Overlap(mean_overlap(square_LEE), square_LEE.amax((-1, -2)), effective_rank(gram(prototypes_LED)))


def gram(prototypes_LED: Tensor) -> Tensor:
    """Cosines of all pairs of unit prototypes: [..., E, E].

    Example:
        >>> gram(torch.tensor([[1.0, 0.0], [0.6, 0.8]])).tolist()[0]
        [1.0, 0.6000000238418579]
    """
    return prototypes_LED @ prototypes_LED.transpose(-1, -2)


def squared_overlaps(prototypes_LED: Tensor) -> Tensor:
    """Squared cosines of different experts' prototypes, 0 on the diagonal: [..., E, E].

    Example:
        >>> squared_overlaps(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    square_LEE = gram(prototypes_LED).square()
    square_LEE.diagonal(dim1=-2, dim2=-1).zero_()
    return square_LEE


def mean_overlap(square_LEE: Tensor) -> Tensor:
    """Mean of `squared_overlaps` over pairs of different experts: [...]; 0 for one expert.

    Example:
        >>> mean_overlap(torch.tensor([[0.0, 0.25], [0.25, 0.0]])).item()
        0.25
    """
    experts = square_LEE.shape[-1]
    return square_LEE.sum((-1, -2)) / max(experts * (experts - 1), 1)


def effective_rank(gram_LEE: Tensor) -> Tensor:
    """exp of the entropy of the Gram matrix's normalised eigenvalues: [...]. On a GPU the host waits for it, and a stack of
    matrices makes it wait as often as one does.

    Example:
        >>> round(effective_rank(torch.eye(3)).item(), 6)
        3.0
    """
    share_LE = torch.linalg.eigvalsh(gram_LEE.double()).clamp(min=0.0)
    share_LE = share_LE / share_LE.sum(-1, keepdim=True)
    return (-torch.xlogy(share_LE, share_LE).sum(-1)).exp()


def output_overlap(outputs_TKD: Tensor, present_TK: Tensor, weight_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Squared cosines of the outputs of each token's experts: (sum over unordered pairs, number of pairs).

    Args:
        outputs_TKD: outputs, in any scale.
        present_TK: True where the slot holds an output that counts.
        weight_T: how often each token counts; None: once.

    Example:
        >>> outputs_TKD = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]])  # one of three pairs is parallel, two are orthogonal
        >>> [part.item() for part in output_overlap(outputs_TKD, torch.ones(1, 3, dtype=torch.bool))]
        [1.0, 3]
    """
    unit_TKD = torch.nn.functional.normalize(outputs_TKD, dim=-1)
    square_TKK = (unit_TKD @ unit_TKD.transpose(1, 2)).square()
    upper_TKK = torch.ones_like(square_TKK, dtype=torch.bool).triu(1) & present_TK[:, :, None] & present_TK[:, None, :]
    square_TKK = torch.where(upper_TKK, square_TKK, 0.0)
    if weight_T is None:
        return square_TKK.sum(), upper_TKK.sum()
    return (square_TKK.sum((1, 2)) * weight_T).sum(), (upper_TKK.sum((1, 2)) * weight_T).sum()


def coactivation_sparsity(counts_LEE: Tensor) -> Tensor:
    """Fraction of pairs of experts that share no token: [...]. One expert: 0.

    Example:
        >>> coactivation_sparsity(torch.tensor([[5, 0], [0, 2]])).item()
        1.0
    """
    experts = counts_LEE.shape[-1]
    empty_LEE = counts_LEE == 0
    own_L = empty_LEE.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (empty_LEE.sum((-1, -2)) - own_L).float() / max(experts * (experts - 1), 1)


def self_weight(attraction_LEE: Tensor, active_LE: Tensor) -> Tensor:
    """Mean of w+_ii over active experts: 1 when nobody takes from a neighbour. [...].

    Example:
        >>> self_weight(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([True, True])).item()
        0.75
    """
    own_LE = attraction_LEE.diagonal(dim1=-2, dim2=-1)
    return (own_LE * active_LE).sum(-1) / active_LE.sum(-1).clamp(min=1)


def repulsion_ratio(repulsion_LE: Tensor, attraction_LE: Tensor) -> Tensor:
    """|repulsion| / |attraction| of a layer, norms over all its experts: [...]; 0 where there is no attraction.

    Example:
        >>> repulsion_ratio(torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])).item()
        0.5
    """
    attraction = attraction_LE.square().sum(-1).sqrt()
    repulsion = repulsion_LE.square().sum(-1).sqrt()
    return torch.where(attraction > 0, repulsion / attraction.clamp(min=torch.finfo(attraction.dtype).tiny), 0.0)

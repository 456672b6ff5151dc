"""Correcting for a rollout engine that computes other log-probabilities than the trainer does with the same weights.

A token was drawn from the engine's distribution mu; the trainer, with the weights that the engine had, says pi_old. The
objective is then taken on pi / pi_old, and each token's part of it is weighted by pi_old / mu, truncated or masked:

    tis      min(w, high)                   Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
                                            training"; high = 2
    mis      w where w <= high, else 0      Liu et al. 2025, "When speed kills stability"; high = 2
    icepop   w where low <= w <= high,      Ling team 2025, "Every step evolves" (arXiv 2510.18855), equation of M(k);
             else 0                         low = 0.5, high = 5

w is a token's ratio, or its response's: the product over tokens, or their geometric mean.

Shape legend: N sequences, S positions, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vp2o.core.choices import MismatchCorrection, MismatchLevel
from megatron_vp2o.core.prior import MAX_LOG_RATIO, k3

LITERATURE: dict[MismatchCorrection, tuple[float, float]] = {
    MismatchCorrection.tis: (0.0, 2.0),
    MismatchCorrection.mis: (0.0, 2.0),
    MismatchCorrection.icepop: (0.5, 5.0),
}
"""Lower and upper bound of the ratio where the settings name none."""

_DECADES, _PER_DECADE, _LOWEST = 12, 40, 1e-10
BINS = _DECADES * _PER_DECADE + 2
"""Bins of the histogram of absolute differences: equal ones in their logarithm from 1e-10 to 100 nats, and one beyond each end."""


@dataclass(frozen=True)
class Weights:
    """What each token's part of the objective is multiplied by, and where a bound decided that.

    Example:
        >>> log_ratio_NS, mask_NS = torch.tensor([[4.0, 1.0]]).log(), torch.tensor([[True, True]])
        >>> bounds = {"correction": MismatchCorrection.mis, "level": MismatchLevel.token, "low": 0.0, "high": 2.0}
        >>> weights = mismatch_weights(log_ratio_NS, mask_NS, **bounds)
        >>> (weights.weight_NS.tolist(), weights.cut_NS.tolist())
        ([[0.0, 1.0]], [[True, False]])
    """

    weight_NS: Tensor  # float32, 0 outside the mask
    cut_NS: Tensor  # bool: truncated or masked


def mismatch_weights(
    log_ratio_NS: Tensor,
    mask_NS: Tensor,
    *,
    correction: MismatchCorrection,
    level: MismatchLevel,
    low: float,
    high: float,
) -> Weights:
    """Weights of tokens that count.

    Args:
        log_ratio_NS: log pi_old - log mu of each token, nats; ignored outside the mask, whatever it is.
        low: of the ratio; icepop only.
        high: of the ratio.

    Example:
        >>> log_ratio_NS, mask_NS = torch.tensor([[4.0, 1.0]]).log(), torch.tensor([[True, True]])
        >>> bounds = {"correction": MismatchCorrection.tis, "level": MismatchLevel.token, "low": 0.0, "high": 2.0}
        >>> mismatch_weights(log_ratio_NS, mask_NS, **bounds).weight_NS.tolist()
        [[2.0, 1.0]]
    """
    log_ratio_NS = torch.where(mask_NS, log_ratio_NS.detach().float(), 0.0)
    if level is not MismatchLevel.token:
        total_N1 = log_ratio_NS.sum(dim=1, keepdim=True)
        if level is MismatchLevel.geometric:
            total_N1 = total_N1 / mask_NS.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio_NS = total_N1.expand_as(mask_NS)
    ratio_NS = log_ratio_NS.clamp(max=MAX_LOG_RATIO).exp()
    if correction is MismatchCorrection.none:
        return Weights(mask_NS.float(), torch.zeros_like(mask_NS))
    cut_NS = ratio_NS > high
    if correction is MismatchCorrection.icepop:
        cut_NS = cut_NS | (ratio_NS < low)
    replaced = high if correction is MismatchCorrection.tis else 0.0
    weight_NS = torch.where(cut_NS, torch.full_like(ratio_NS, replaced), ratio_NS)
    return Weights(torch.where(mask_NS, weight_NS, 0.0), cut_NS & mask_NS)


def mismatch_sums(log_ratio_NS: Tensor, mask_NS: Tensor) -> Tensor:
    """What a batch's log-ratios come to, to be added up over ranks. [3 + BINS] float64.

    Sum of |log-ratio|, sum of the k3 estimate of KL(mu || pi_old), number of tokens, and the histogram of |log-ratio|. A
    log-ratio that is not a number makes the first two so.

    Example:
        >>> sums = mismatch_sums(torch.tensor([[0.0, 0.5, -0.5]]), torch.tensor([[True, True, True]]))
        >>> (sums[0].item(), sums[2].item(), sums[3:].sum().item())
        (1.0, 3.0, 3.0)
    """
    log_ratio_T = log_ratio_NS[mask_NS].double()
    absolute_T = log_ratio_T.abs()
    edges = _edges(absolute_T.device)
    index_T = torch.bucketize(absolute_T, edges)
    counts_B = torch.bincount(index_T.clamp(max=BINS - 1), minlength=BINS).double()
    return torch.cat([torch.stack([absolute_T.sum(), k3(log_ratio_T).sum(), counts_B.sum()]), counts_B])


@dataclass(frozen=True)
class Mismatch:
    """How far an engine's log-probabilities are from the trainer's under the same weights, over a rollout batch.

    Example:
        >>> mismatch(mismatch_sums(torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool)))  # the engine agrees
        Mismatch(tokens=5, mean=0.0, kl=0.0, p99=0.0, p999=0.0)
    """

    tokens: int
    mean: float  # of |log-ratio|, nats
    kl: float  # KL(mu || pi_old) of a token, nats: mean of the k3 estimate
    p99: float  # quantiles of |log-ratio|, at most 6 % too large
    p999: float


def mismatch(sums: Tensor) -> Mismatch | None:
    """Read what `mismatch_sums` said, added up over ranks; None where there was no token.

    Example:
        >>> found = mismatch(mismatch_sums(torch.tensor([[0.0, 0.5, -0.5, 1.0]]), torch.ones(1, 4, dtype=torch.bool)))
        >>> (found.tokens, found.mean, 1.0 <= found.p99 <= 1.06)
        (4, 0.5, True)
    """
    absolute, kl, tokens = sums[:3].tolist()
    if not tokens:
        return None
    counts_B = sums[3:]
    return Mismatch(int(tokens), absolute / tokens, kl / tokens, _quantile(counts_B, 0.99), _quantile(counts_B, 0.999))


def _edges(device: torch.device) -> Tensor:
    return _LOWEST * 10 ** (torch.arange(BINS - 1, device=device, dtype=torch.float64) / _PER_DECADE)


def _quantile(counts_B: Tensor, share: float) -> float:
    """Upper edge of the bin in which the quantile is; 0 for differences below the lowest edge."""
    cumulated_B = counts_B.cumsum(0)
    index = int(torch.searchsorted(cumulated_B, share * cumulated_B[-1]))
    if index == 0:
        return 0.0
    edges = _edges(counts_B.device)
    return float(edges[index]) if index < len(edges) else float("inf")

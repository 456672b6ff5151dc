"""The on-policy budget: how far the learner has drifted from the actors that generated its data (VP2O Eq. 11).

For a response s with behaviour log-probabilities log mu: l_s = mean_t (log pi - log mu), drift = mean_s |l_s|, and with
tempered ratios r_s = exp(lambda l_s), ESS = (sum r)^2 / (N sum r^2), between 1/N and 1.

Everything is kept in a form that ranks can combine exactly, and finite for log-ratios of any size.

Shape legend: N sequences, S positions, R ranks (any further dimension).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vp2o.core.choices import RatioLength


class RefreshReason(enum.Enum):
    """Why actors get new weights."""

    start = "start"
    interval = "interval"
    drift = "drift"
    ess = "ess"
    rejected = "rejected"
    max_age = "max_age"


def sequence_log_ratios(
    logprobs_NS: Tensor, behaviour_NS: Tensor, mask_NS: Tensor, length: RatioLength
) -> tuple[Tensor, Tensor]:
    """l_s of each sequence: ([N] float64, [N] whether it has a token at all).

    Args:
        logprobs_NS: log pi of the learner.
        behaviour_NS: log mu of the actor, under its sampling distribution.
        mask_NS: response tokens; what lies elsewhere is ignored, whatever it is.
        length: mean over tokens (as GSPO, arXiv 2507.18071), or their sum.
    """
    ratio_N = torch.where(mask_NS, logprobs_NS.double() - behaviour_NS.double(), 0.0).sum(-1)
    tokens_N = mask_NS.sum(-1)
    return (ratio_N / tokens_N.clamp(min=1) if length is RatioLength.mean else ratio_N), tokens_N > 0


def partial_sums(log_ratio_N: Tensor, present_N: Tensor, temper: float) -> Tensor:
    """What a rank contributes: [4] float64: count, sum |l|, log sum exp(lambda l), log sum exp(2 lambda l)."""
    kept_N = log_ratio_N[present_N].double()
    return torch.stack(
        [
            torch.tensor(float(len(kept_N)), dtype=torch.float64, device=kept_N.device),
            kept_N.abs().sum(),
            torch.logsumexp(temper * kept_N, dim=0),
            torch.logsumexp(2.0 * temper * kept_N, dim=0),
        ]
    )


@dataclass(frozen=True)
class Budget:
    """Drift and effective sample size over all ranks."""

    drift: float
    """mean |l_s|, nats."""
    ess: float
    """Tempered effective sample size as a fraction of N, in (0, 1]; 1 where there is no sequence."""

    def reason(self, *, max_drift: float, min_ess: float) -> RefreshReason | None:
        """Why the actors need new weights now, if they do. What is no number counts as exceeding."""
        if not self.drift <= max_drift:
            return RefreshReason.drift
        return RefreshReason.ess if not self.ess >= min_ess else None


def combine(parts_R4: Tensor) -> Budget:
    """The budget from all ranks' `partial_sums`."""
    count = parts_R4[:, 0].sum().item()
    if count == 0:
        return Budget(0.0, 1.0)
    first, second = torch.logsumexp(parts_R4[:, 2], 0).item(), torch.logsumexp(parts_R4[:, 3], 0).item()
    return Budget(parts_R4[:, 1].sum().item() / count, math.exp(2.0 * first - second - math.log(count)))

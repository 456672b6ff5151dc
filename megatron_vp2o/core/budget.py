"""The on-policy budget: how far the learner's policy is from the actors', and when these need its weights.

From the log-ratio l_s = log pi - log mu of each response s that the actors generated (VP2O Eq. 11):

    drift = mean_s |l_s|         ESS = (sum_s r_s)^2 / (N sum_s r_s^2),  r_s = exp(lambda l_s)

Both are made of four numbers that ranks can combine exactly. Everything is float64 and in log space: log-ratios of 1e4
stay finite, and equal ones give an ESS of 1 to twelve digits, where float32 would keep three.

Shape legend: N sequences, S positions, R ranks or parts.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor

BUDGET_SUMS = 4
"""Length of what `budget_sums` returns."""


def sequence_log_ratios(
    logprobs_NS: Tensor, behaviour_logprobs_NS: Tensor, mask_NS: Tensor, *, normalise_by_length: bool
) -> tuple[Tensor, Tensor]:
    """l_s: mean or sum over a response's tokens of log pi - log mu (nats).

    Args:
        logprobs_NS: log pi of each token under the learner.
        behaviour_logprobs_NS: log mu, logged by the actor that generated it.
        mask_NS: bool, tokens that count; values elsewhere are ignored, whatever they are.
        normalise_by_length: mean, as in GSPO (Zheng et al., arXiv 2507.18071), so that long responses are not farther away
            for being long; false: sum, the log of the true ratio of sequence probabilities.

    Returns:
        (l [N] float64 without gradient, bool [N]: whether the sequence has a token that counts). l is 0 where it has none.

    Example:
        >>> pi_NS, mu_NS, mask_NS = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -4.0]]), torch.tensor([[True, True]])
        >>> [part.tolist() for part in sequence_log_ratios(pi_NS, mu_NS, mask_NS, normalise_by_length=True)]
        [[1.5], [True]]
    """
    difference_NS = logprobs_NS.detach().double() - behaviour_logprobs_NS.detach().double()
    log_ratio_N = torch.where(mask_NS, difference_NS, 0.0).sum(1)
    tokens_N = mask_NS.sum(1)
    if normalise_by_length:
        log_ratio_N = log_ratio_N / tokens_N.clamp(min=1)
    return log_ratio_N, tokens_N > 0


def budget_sums(log_ratios_N: Tensor, *, temper: float, valid_N: Tensor | None = None) -> Tensor:
    """What drift and ESS are made of, for the sequences of one rank or micro-batch. Parts are put together by `combine`.

    Args:
        log_ratios_N: l_s.
        temper: lambda; 1 is the plain ratio, smaller is more lenient with long sequences, 0 makes every ratio 1.
        valid_N: sequences that count.

    Returns:
        [4] float64: N, sum |l|, log sum exp(lambda l), log sum exp(2 lambda l); the logarithms are -inf for no sequence.

    Raises:
        ValueError: for a negative `temper`.

    Example:
        >>> budget_sums(torch.tensor([1.0, -3.0]), temper=0.0).round(decimals=2).tolist()  # two ratios of 1; log 2 is 0.69
        [2.0, 4.0, 0.69, 0.69]
    """
    if not temper >= 0:
        raise ValueError(f"temper={temper}: choose 0 or more (1 is the plain ratio)")
    log_ratios_N = log_ratios_N.detach().double()
    if valid_N is None:
        valid_N = torch.ones_like(log_ratios_N, dtype=torch.bool)
    tempered_N = torch.where(valid_N, temper * log_ratios_N, -torch.inf)
    return torch.stack(
        [
            valid_N.sum(dtype=torch.float64),
            torch.where(valid_N, log_ratios_N.abs(), 0.0).sum(),
            tempered_N.logsumexp(0),
            (2.0 * tempered_N).logsumexp(0),
        ]
    )


def combine(parts_R4: Tensor) -> Tensor:
    """`budget_sums` of several parts as that of all their sequences together: [R, 4] to [4]. Parts may be empty.

    Example:
        >>> parts = [budget_sums(torch.tensor(log_ratios), temper=1.0) for log_ratios in ([1.0], [-3.0, 2.0])]
        >>> combine(torch.stack(parts))[:2].tolist()  # 3 sequences, |1| + |-3| + |2|
        [3.0, 6.0]
    """
    counts, absolutes, ratios, squares = parts_R4.unbind(1)
    return torch.stack([counts.sum(), absolutes.sum(), ratios.logsumexp(0), squares.logsumexp(0)])


class Budget(NamedTuple):
    """How much of the budget is spent.

    Example:
        >>> budget(budget_sums(torch.zeros(2), temper=1.0))  # on-policy
        Budget(drift=0.0, ess=1.0, sequences=2)
    """

    drift: float
    """mean |l_s|, nats; 0 is on-policy."""
    ess: float
    """Effective sample size over N, in (0, 1]; 1 when all ratios are equal, 1/N when one dominates."""
    sequences: int
    """N."""


def budget(sums_4: Tensor) -> Budget:
    """Drift and ESS (VP2O Eq. 11) from `budget_sums`. Without a sequence nothing is spent: drift 0, ESS 1.

    Example:
        >>> budget(budget_sums(torch.tensor([0.0, 100.0]), temper=1.0))  # the second has all the weight
        Budget(drift=50.0, ess=0.5, sequences=2)
    """
    sums_4 = sums_4.cpu()  # once; what follows needs no device
    count, absolute = sums_4[:2].tolist()
    if count == 0:
        return Budget(0.0, 1.0, 0)
    # At most 1 by Cauchy-Schwarz; rounding may exceed it in the last digit. What is no number stays so.
    ess = ((2.0 * sums_4[2] - sums_4[3]).exp() / count).clamp(max=1.0).item()
    return Budget(absolute / count, ess, int(count))


class RefreshReason(enum.Enum):
    """Why the actors get the learner's weights."""

    start = "start"  # they have none yet
    interval = "interval"  # a fixed number of rollout batches has passed, where no budget decides
    rejected = "rejected"  # the trust region rejected a step: a new anchor is needed
    drift = "drift"
    ess = "ess"
    max_age = "max_age"


def refresh_reasons(
    spent: Budget | None,
    *,
    max_drift: float,
    min_ess: float,
    age: int | None,
    max_age: int | None,
    rejected: bool,
) -> tuple[RefreshReason, ...]:
    """All the reasons to refresh the actors now, the most pressing one first; empty: they keep their weights.

    A drift or an ESS that is no number is a reason: it is not known to be within its bound.

    Args:
        spent: the budget as measured on the last rollouts; None if there is none, and no reason.
        max_drift: epsilon_drift; refresh above it.
        min_ess: rho_ess; refresh below it.
        age: rollout batches that the actors generated with their weights; None before they have any.
        max_age: refresh at this age; None: never for age alone.
        rejected: whether the last step was rejected.

    Example:
        >>> spent = Budget(drift=0.3, ess=0.4, sequences=64)
        >>> reasons = refresh_reasons(spent, max_drift=0.1, min_ess=0.5, age=1, max_age=None, rejected=False)
        >>> [reason.value for reason in reasons]
        ['drift', 'ess']
    """
    if age is None:
        return (RefreshReason.start,)
    reasons = []
    if rejected:
        reasons.append(RefreshReason.rejected)
    if spent is not None and not spent.drift <= max_drift:
        reasons.append(RefreshReason.drift)
    if spent is not None and not spent.ess >= min_ess:
        reasons.append(RefreshReason.ess)
    if max_age is not None and age >= max_age:
        reasons.append(RefreshReason.max_age)
    return tuple(reasons)

"""Objectives that others have proposed, as baselines. Each differs from GRPO's in its surrogate only.

All are sums over tokens, divided by the caller by the tokens of all ranks, whatever normalisation their papers have.

Shape legend: N sequences, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vp2o.core.objective import MAX_LOG_RATIO, GRPOObjective, PolicyInputs, RatioObjective, clipped


@dataclass(frozen=True, kw_only=True)
class GSPOObjective(GRPOObjective):
    """Clipped surrogate on the response's ratio `s = exp(mean_t log r_t)`, every token of it with gradient s A (Zheng et al., arXiv
    2507.18071, equations 5 and 7; clip ranges there are 3e-4 and 4e-4).

    The paper means over a response's tokens, then over responses. Here tokens are meant over, so a response weighs by its length.

    Example:
        >>> objective = GSPOObjective(kl_coef=0.0, entropy_coef=0.0, clip_epsilon_low=0.2, clip_epsilon_high=0.2)
        >>> pi_NS, mu_NS = torch.tensor([[0.5, 0.25]]), torch.tensor([[0.25, 0.5]])  # ratios 2 and 1/2, geometric mean 1
        >>> inputs = PolicyInputs(pi_NS.log(), mu_NS.log(), torch.ones(1), torch.ones(1, 2, dtype=torch.bool))
        >>> round(objective(inputs)[0].item(), 6)
        -2.0
    """

    def surrogate(self, log_ratio_NS: Tensor, advantages_NS: Tensor, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
        """See the class."""
        length_N1 = inputs.mask_NS.sum(dim=1, keepdim=True).clamp(min=1)
        mean_N1 = torch.where(inputs.mask_NS, log_ratio_NS, 0.0).sum(dim=1, keepdim=True) / length_N1
        # the value is s, the gradient that of the token's own log-probability
        ratio_NS = (mean_N1.detach() + log_ratio_NS - log_ratio_NS.detach()).clamp(max=MAX_LOG_RATIO).exp()
        return clipped(ratio_NS, advantages_NS, self.clip_epsilon_low, self.clip_epsilon_high)


@dataclass(frozen=True, kw_only=True)
class CISPOObjective(GRPOObjective):
    """`sg(clip(r, 1 - clip_epsilon_low, 1 + clip_epsilon_high)) A log pi`: the clip bounds a token's weight and stops no gradient
    (MiniMax, arXiv 2506.13585, equations 4 and 5).

    Example:
        >>> objective = CISPOObjective(kl_coef=0.0, entropy_coef=0.0, clip_epsilon_low=0.5, clip_epsilon_high=0.5)
        >>> pi_NS, mu_NS = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -1.0]])  # ratios e and 1/e, clipped to 1.5 and 0.5
        >>> objective(PolicyInputs(pi_NS, mu_NS, torch.ones(1), torch.ones(1, 2, dtype=torch.bool)))[0].item()
        2.5
    """

    def surrogate(self, log_ratio_NS: Tensor, advantages_NS: Tensor, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
        """See the class."""
        weight_NS = log_ratio_NS.detach().exp().clamp(1.0 - self.clip_epsilon_low, 1.0 + self.clip_epsilon_high)
        logprobs_NS = torch.where(inputs.mask_NS, inputs.logprobs_NS.float(), 0.0)
        return weight_NS * advantages_NS * logprobs_NS, torch.zeros_like(inputs.mask_NS)


@dataclass(frozen=True, kw_only=True)
class ClipCovObjective(GRPOObjective):
    """GRPO's surrogate without the gradient of the selected tokens (Cui et al., arXiv 2505.22617, equations 10 and 11).

    Example:
        >>> objective = ClipCovObjective(kl_coef=0.0, entropy_coef=0.0, clip_epsilon_low=0.2, clip_epsilon_high=0.2)
        >>> pi_NS, mask_NS = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.ones(1, 2, dtype=torch.bool)
        >>> selected_NS = torch.tensor([[True, False]])
        >>> objective(PolicyInputs(pi_NS, pi_NS.detach(), torch.ones(1), mask_NS, selected_NS=selected_NS))[0].backward()
        >>> pi_NS.grad.tolist()
        [[0.0, -1.0]]
    """

    def surrogate(self, log_ratio_NS: Tensor, advantages_NS: Tensor, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
        """See the class. Raises ValueError without a selection."""
        selected_NS = _selected(inputs)
        surrogate_NS, stopped_NS = super().surrogate(log_ratio_NS, advantages_NS, inputs)
        return torch.where(selected_NS, surrogate_NS.detach(), surrogate_NS), stopped_NS | selected_NS


@dataclass(frozen=True, kw_only=True)
class KLCovObjective(RatioObjective):
    """`r A`, less `penalty |log r|` at the selected tokens (Cui et al., arXiv 2505.22617, equation 13, with the estimate of the KL
    that its code takes).

    Example:
        >>> objective = KLCovObjective(kl_coef=0.0, entropy_coef=0.0, penalty=0.5)
        >>> pi_NS, mu_NS, mask_NS = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-3.0, -4.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> selected_NS = torch.tensor([[True, False]])  # |log r| is 2 at both, and A = 0 leaves the penalty alone
        >>> objective(PolicyInputs(pi_NS, mu_NS, torch.zeros(1), mask_NS, selected_NS=selected_NS))[0].item()
        1.0
    """

    penalty: float

    def surrogate(self, log_ratio_NS: Tensor, advantages_NS: Tensor, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
        """See the class. Raises ValueError without a selection."""
        penalty_NS = torch.where(_selected(inputs), self.penalty * log_ratio_NS.abs(), 0.0)
        return log_ratio_NS.exp() * advantages_NS - penalty_NS, torch.zeros_like(inputs.mask_NS)


def _selected(inputs: PolicyInputs) -> Tensor:
    if inputs.selected_NS is None:
        raise ValueError("Clip-Cov and KL-Cov need the tokens that they treat apart")
    return inputs.selected_NS


def covariance(
    logprobs_NS: Tensor, advantages_N: Tensor, mask_NS: Tensor, mean_logprob: float, mean_advantage: float
) -> Tensor:
    """`(log pi - mean log pi) (A - mean A)` of each token, its part of their covariance; -inf outside the mask. float64 [N, S].

    Args:
        mean_logprob: over the tokens of all ranks; so is `mean_advantage`.

    Example:
        >>> logprobs_NS, mask_NS = torch.tensor([[-1.0, -3.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> covariance(logprobs_NS, torch.tensor([2.0]), mask_NS, mean_logprob=-2.0, mean_advantage=1.0).tolist()
        [[1.0, -1.0]]
    """
    product_NS = (logprobs_NS.double() - mean_logprob) * (advantages_N.double() - mean_advantage)[:, None]
    return torch.where(mask_NS, product_NS, -torch.inf)

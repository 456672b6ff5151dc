"""Policy and supervised objectives: tensors in, (sum over tokens, sums for metrics) out.

Everything is a SUM over the tokens that count; the caller divides by their number over all ranks and micro-batches, so
that every token weighs the same wherever it was computed. Shape legend: N sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vp2o.core.choices import KLEstimator
from megatron_vp2o.core.prior import MAX_LOG_RATIO as MAX_LOG_RATIO
from megatron_vp2o.core.prior import k3, token_kl_loss


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy objective may look at. Values outside `mask_NS` are ignored, whatever they are (NaN included).

    Example:
        >>> mask_NS = torch.tensor([[True, False]])
        >>> inputs = PolicyInputs(torch.tensor([[-1.0, torch.nan]]), torch.tensor([[-1.0, -1.0]]), torch.tensor([3.0]), mask_NS)
        >>> VP2OObjective(kl_coef=0.0, entropy_coef=0.0)(inputs)[0].item()
        -3.0
    """

    logprobs_NS: Tensor  # log pi of each token, with gradient
    behaviour_logprobs_NS: Tensor  # log mu, of the actor that generated it, at its temperature
    advantages_N: Tensor  # one per sequence
    mask_NS: Tensor  # bool, tokens that count
    reference_logprobs_NS: Tensor | None = None  # log pi_ref
    # Of the distribution that each token came from; with gradient for an entropy bonus.
    entropy_NS: Tensor | None = None
    selected_NS: Tensor | None = None  # bool: tokens that Clip-Cov and KL-Cov treat apart
    weight_NS: Tensor | None = None  # of each token's surrogate, without gradient (core/mismatch.py)


PolicyObjective = Callable[[PolicyInputs], tuple[Tensor, dict[str, Tensor]]]
"""Returns the loss and metrics, float32 scalar SUMS over tokens; a metric whose name ends in `_max` is a maximum."""


def _masked_sum(values_NS: Tensor, mask_NS: Tensor) -> Tensor:
    return torch.where(mask_NS, values_NS, 0.0).sum(dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class RatioObjective:
    """What objectives on importance ratios share: `-surrogate(r, A) + kl_coef KL(pi || prior) - entropy_coef H`.

    `r = pi / mu`. Log-ratios above MAX_LOG_RATIO count as that and have no gradient; below there is no bound (r -> 0).

    Example:
        >>> class LogRatio(RatioObjective):
        ...     def surrogate(self, log_ratio_NS, advantages_NS, inputs):
        ...         return log_ratio_NS * advantages_NS, torch.zeros_like(inputs.mask_NS)
        >>> inputs = PolicyInputs(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), torch.ones(1), torch.tensor([[True]]))
        >>> LogRatio(kl_coef=0.0, entropy_coef=0.0)(inputs)[0].item()
        -2.0
    """

    kl_coef: float
    entropy_coef: float
    kl_estimator: KLEstimator = KLEstimator.k3
    """Estimator of a KL that is part of the loss; one that is part of the reward has `kl_coef` 0 here."""

    def surrogate(self, log_ratio_NS: Tensor, advantages_NS: Tensor, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
        """What is maximised, of each token, and where that has no gradient because of a clip.

        Args:
            log_ratio_NS: log r, at most MAX_LOG_RATIO, 0 outside the mask.
        """
        raise NotImplementedError

    def __call__(self, inputs: PolicyInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and the metrics `loss`, `ratio`, `ratio_max`, `clip_fraction` (tokens whose gradient a clip
        stops), `approx_kl` (KL(mu || pi), k3), and, where given, `entropy` and `kl_reference` (k3).

        Raises:
            ValueError: if `kl_coef` or `entropy_coef` is not 0 and what it weighs is missing or has no gradient.
        """
        self._check(inputs)
        mask_NS = inputs.mask_NS
        logprobs_NS = inputs.logprobs_NS.float()
        advantages_NS = inputs.advantages_N.float()[:, None].expand_as(mask_NS)

        # A token that does not count gets ratio 1 here, before anything can overflow: its gradient is 0, not 0 * inf.
        log_ratio_NS = torch.where(mask_NS, logprobs_NS - inputs.behaviour_logprobs_NS.float(), 0.0)
        surrogate_NS, stopped_NS = self.surrogate(log_ratio_NS.clamp(max=MAX_LOG_RATIO), advantages_NS, inputs)
        if inputs.weight_NS is not None:
            surrogate_NS = inputs.weight_NS.detach() * surrogate_NS
        loss = -_masked_sum(surrogate_NS, mask_NS)

        with torch.no_grad():
            ratio_NS = log_ratio_NS.clamp(max=MAX_LOG_RATIO).exp()
            metrics = {
                "ratio": _masked_sum(ratio_NS, mask_NS),
                "ratio_max": torch.where(mask_NS, ratio_NS, 0.0).amax() if mask_NS.numel() else ratio_NS.new_zeros(()),
                "clip_fraction": _masked_sum(stopped_NS.float(), mask_NS),
                "approx_kl": _masked_sum(k3(log_ratio_NS), mask_NS),
            }
        if inputs.reference_logprobs_NS is not None:
            reference_ratio_NS = torch.where(mask_NS, inputs.reference_logprobs_NS.float() - logprobs_NS, 0.0)
            metrics["kl_reference"] = _masked_sum(k3(reference_ratio_NS.detach()), mask_NS)
            if self.kl_coef:
                loss = loss + self.kl_coef * _masked_sum(token_kl_loss(reference_ratio_NS, self.kl_estimator), mask_NS)
        if inputs.entropy_NS is not None:
            entropy = _masked_sum(inputs.entropy_NS.float(), mask_NS)
            metrics["entropy"] = entropy.detach()
            if self.entropy_coef:
                loss = loss - self.entropy_coef * entropy
        return loss, {"loss": loss.detach(), **metrics}

    def _check(self, inputs: PolicyInputs) -> None:
        if self.kl_coef and inputs.reference_logprobs_NS is None:
            raise ValueError(f"kl_coef is {self.kl_coef} but there are no reference log-probabilities")
        if self.entropy_coef:
            entropy_NS = inputs.entropy_NS
            if entropy_NS is None:
                raise ValueError(f"entropy_coef is {self.entropy_coef} but there is no entropy")
            if torch.is_grad_enabled() and inputs.logprobs_NS.requires_grad and not entropy_NS.requires_grad:
                raise ValueError(
                    f"entropy_coef is {self.entropy_coef} but the entropy has no gradient: it would do nothing"
                )


def clipped(ratio_NS: Tensor, advantages_NS: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """`min(r A, clip(r, 1 - low, 1 + high) A)`, and where the second is the smaller.

    Example:
        >>> ratio_NS, advantages_NS = torch.tensor([[2.0, 0.25]]), torch.ones(1, 2)
        >>> [part.tolist() for part in clipped(ratio_NS, advantages_NS, low=0.5, high=0.5)]
        [[[1.5, 0.25]], [[True, False]]]
    """
    free_NS, clipped_NS = ratio_NS * advantages_NS, ratio_NS.clamp(1.0 - low, 1.0 + high) * advantages_NS
    return torch.minimum(free_NS, clipped_NS), clipped_NS < free_NS


@dataclass(frozen=True, kw_only=True)
class GRPOObjective(RatioObjective):
    """Clipped surrogate with group-relative advantages (Shao et al., arXiv 2402.03300, equation 3):

    `min(r A, clip(r, 1 - clip_epsilon_low, 1 + clip_epsilon_high) A)`.

    Example:
        >>> objective = GRPOObjective(kl_coef=0.0, entropy_coef=0.0, clip_epsilon_low=0.5, clip_epsilon_high=0.5)
        >>> pi_NS, mu_NS = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.5]])  # ratios 2 and 1; the first is clipped to 1.5
        >>> inputs = PolicyInputs(pi_NS.log(), mu_NS.log(), torch.ones(1), torch.ones(1, 2, dtype=torch.bool))
        >>> objective(inputs)[0].item()
        -2.5
    """

    clip_epsilon_low: float
    clip_epsilon_high: float

    def surrogate(self, log_ratio_NS: Tensor, advantages_NS: Tensor, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
        """See the class."""
        return clipped(log_ratio_NS.exp(), advantages_NS, self.clip_epsilon_low, self.clip_epsilon_high)


@dataclass(frozen=True, kw_only=True)
class VP2OObjective(RatioObjective):
    """Unclipped surrogate `r A` (VP2O Eqs. 1 and 3): steps are bounded by the trust region and the on-policy budget instead.

    The prior term of VP2O's Eq. 4, which unclipped PPO drops, is by default part of the reward (`core/prior.py`); `kl_coef`
    weighs it where it is an estimate by tokens. The prior is whoever the inputs' reference log-probabilities are of: the
    reference policy or the anchor (the actors' weights at the last refresh).

    Example:
        >>> pi_NS, mu_NS = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.5]])  # ratios 2 and 1
        >>> inputs = PolicyInputs(pi_NS.log(), mu_NS.log(), torch.ones(1), torch.ones(1, 2, dtype=torch.bool))
        >>> round(VP2OObjective(kl_coef=0.0, entropy_coef=0.0)(inputs)[0].item(), 6)
        -3.0
    """

    def surrogate(self, log_ratio_NS: Tensor, advantages_NS: Tensor, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
        """See the class."""
        return log_ratio_NS.exp() * advantages_NS, torch.zeros_like(inputs.mask_NS)


def supervised_objective(logprobs_NS: Tensor, mask_NS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood (nats), summed over `mask_NS`, and the metric `loss`, the same sum without gradient.

    Example:
        >>> supervised_objective(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[True, True, False]]))[0].item()
        3.0
    """
    loss = -_masked_sum(logprobs_NS.float(), mask_NS)
    return loss, {"loss": loss.detach()}

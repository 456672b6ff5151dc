"""The objectives of `core`, in the form that `Policy.forward_backward` takes.

Shape legend: N sequences on this data-parallel rank, S padded sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vp2o.config.schema import GRPOConfig, KLEstimator, PolicyLoss
from megatron_vp2o.core.baseline_objectives import CISPOObjective, ClipCovObjective, GSPOObjective, KLCovObjective
from megatron_vp2o.core.objective import (
    GRPOObjective,
    PolicyInputs,
    PolicyObjective,
    VP2OObjective,
    supervised_objective,
)
from megatron_vp2o.rl.types import TrainBatch

BEHAVIOUR = "behaviour_logprobs"  # [N, S], required
ADVANTAGES = "advantages"  # [N], required
REFERENCE = "reference_logprobs"  # [N, S], optional
WEIGHT = "weight"  # [N, S], optional: of each token's surrogate, for an engine that disagrees with the trainer
SELECTED = "selected_tokens"  # [N, S] bool, for Clip-Cov and KL-Cov
ENGINE = "engine_logprobs"  # [N, S], optional: the engine's log-probabilities under the weights that are being trained


def policy_objective(settings: GRPOConfig) -> PolicyObjective:
    """The objective that the settings name. A KL in the reward is no part of it."""
    in_reward = settings.kl_estimator is KLEstimator.reward
    shared: dict[str, Any] = {
        "kl_coef": 0.0 if in_reward else settings.kl_coef,
        "kl_estimator": settings.kl_estimator,
        "entropy_coef": settings.entropy_coef,
    }
    if settings.objective is PolicyLoss.vp2o:
        return VP2OObjective(**shared)
    if settings.objective is PolicyLoss.kl_cov:
        return KLCovObjective(penalty=settings.covariance_kl_coef, **shared)
    kinds = {
        PolicyLoss.grpo: GRPOObjective,
        PolicyLoss.gspo: GSPOObjective,
        PolicyLoss.cispo: CISPOObjective,
        PolicyLoss.clip_cov: ClipCovObjective,
    }
    return kinds[settings.objective](
        clip_epsilon_low=settings.clip_epsilon_low, clip_epsilon_high=settings.clip_epsilon_high, **shared
    )


@dataclass(frozen=True)
class OnRollouts:
    """A policy objective as an `Objective`: what the policy does not compute comes from the batch's `extras`."""

    objective: PolicyObjective

    def __call__(self, logprobs_NS: Tensor, entropy_NS: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises KeyError if the batch lacks `behaviour_logprobs` or `advantages`."""
        loss, metrics = self.objective(
            PolicyInputs(
                logprobs_NS=logprobs_NS,
                behaviour_logprobs_NS=batch.extras[BEHAVIOUR],
                advantages_N=batch.extras[ADVANTAGES],
                mask_NS=batch.loss_mask_NS,
                reference_logprobs_NS=batch.extras.get(REFERENCE),
                entropy_NS=entropy_NS,
                selected_NS=batch.extras.get(SELECTED),
                weight_NS=batch.extras.get(WEIGHT),
            )
        )
        if ENGINE in batch.extras:
            difference_NS = (logprobs_NS.detach() - batch.extras[ENGINE]).abs()
            metrics["logprob_mismatch_max"] = torch.where(batch.loss_mask_NS, difference_NS, 0.0).amax()
        return loss, metrics


def next_token(logprobs_NS: Tensor, entropy_NS: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Supervised training as an `Objective`: negative log-likelihood of the tokens that count."""
    return supervised_objective(logprobs_NS, batch.loss_mask_NS)

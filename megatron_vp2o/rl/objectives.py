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
    """A policy objective as an `Objective`: what the policy does not compute comes from the batch."""

    objective: PolicyObjective

    def __call__(self, logprobs_NS: Tensor, entropy_NS: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises ValueError if the batch lacks the actor's log-probabilities or the advantages."""
        if batch.behaviour_logprobs_NS is None or batch.advantages_N is None:
            raise ValueError(
                "a policy objective needs a batch with behaviour_logprobs_NS and advantages_N: see policy_batch"
            )
        loss, metrics = self.objective(
            PolicyInputs(
                logprobs_NS=logprobs_NS,
                behaviour_logprobs_NS=batch.behaviour_logprobs_NS,
                advantages_N=batch.advantages_N,
                mask_NS=batch.loss_mask_NS,
                reference_logprobs_NS=batch.reference_logprobs_NS,
                entropy_NS=entropy_NS,
                selected_NS=batch.selected_NS,
                weight_NS=batch.weight_NS,
            )
        )
        if batch.engine_logprobs_NS is not None:
            difference_NS = (logprobs_NS.detach() - batch.engine_logprobs_NS).abs()
            metrics["logprob_mismatch"] = torch.where(batch.loss_mask_NS, difference_NS, 0.0).amax()
        return loss, metrics


def next_token(logprobs_NS: Tensor, entropy_NS: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Supervised training as an `Objective`: negative log-likelihood of the tokens that count."""
    return supervised_objective(logprobs_NS, batch.loss_mask_NS)

"""The objectives of `core`, in the form that `Policy.forward_backward` takes.

Shape legend: N sequences on this data-parallel rank, S padded sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vp2o.core.objective import PolicyInputs, PolicyObjective, supervised_objective
from megatron_vp2o.rl.types import TrainBatch

BEHAVIOUR = "behaviour_logprobs"  # [N, S], required
ADVANTAGES = "advantages"  # [N], required
REFERENCE = "reference_logprobs"  # [N, S], optional
ENGINE = "engine_logprobs"  # [N, S], optional: the engine's log-probabilities under the weights that are being trained


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
            )
        )
        if ENGINE in batch.extras:
            difference_NS = (logprobs_NS.detach() - batch.extras[ENGINE]).abs()
            metrics["logprob_mismatch_max"] = torch.where(batch.loss_mask_NS, difference_NS, 0.0).amax()
        return loss, metrics


def next_token(logprobs_NS: Tensor, entropy_NS: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Supervised training as an `Objective`: negative log-likelihood of the tokens that count."""
    return supervised_objective(logprobs_NS, batch.loss_mask_NS)

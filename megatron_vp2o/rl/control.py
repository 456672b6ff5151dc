"""Proximal control: who takes an optimizer step, and what the log-ratios say about how fresh the actors still are.

Shape legend: N sequences of a micro-batch, S positions, R data-parallel ranks.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.config.schema import BudgetConfig
from megatron_vp2o.core.budget import BUDGET_SUMS, Budget, budget, budget_sums, combine, sequence_log_ratios
from megatron_vp2o.core.choices import RatioLength
from megatron_vp2o.parallel.groups import Groups, gather_rows
from megatron_vp2o.rl.objectives import BEHAVIOUR
from megatron_vp2o.rl.types import Objective, Policy, Rollouts, StepStats, TrainBatch


class Stepper(Protocol):
    """Takes an optimizer step once gradients are ready."""

    def begin(self, batch: TrainBatch) -> None:
        """Before the forward pass of a step on this batch: everything that its passes and the transform move is to be
        remembered."""

    def step(self) -> StepStats: ...

    def set_anchor(self) -> None:
        """The actors have the learner's weights now."""

    def observe_rollouts(self, rollouts: Rollouts) -> None:
        """These are what the coming steps train on."""


class Carrier(Protocol):
    """Has state that forward, backward or transform move on, and that must be put back where the step does not happen."""

    def carry(self) -> Any:
        """That state, as it is now."""
        ...

    def put_back(self, carried: Any) -> None:
        """Return to what `carry` returned."""
        ...


class PlainSteps:
    """Every step as the optimizer proposes it; one that it skips leaves no trace.

    Args:
        carriers: whose state goes back when a step is skipped, besides the policy's.
    """

    def __init__(self, policy: Policy, *carriers: Carrier) -> None:
        self._policy = policy
        self._carriers: tuple[Carrier, ...] = (policy, *carriers)
        self._carried: list[Any] = []

    def begin(self, batch: TrainBatch) -> None:
        self._carried = [carrier.carry() for carrier in self._carriers]

    def step(self) -> StepStats:
        stats = self._policy.optimizer_step()
        if stats.skipped:
            for carrier, carried in zip(self._carriers, self._carried, strict=True):
                carrier.put_back(carried)
        return stats

    def set_anchor(self) -> None:
        """Nothing to compare with."""

    def observe_rollouts(self, rollouts: Rollouts) -> None:
        """Nothing to learn from them."""


class BudgetMeter:
    """Sees the log-ratios of every forward pass of training, and says what they come to over all ranks.

    The ratios of a rollout batch are those of the forward passes that its optimizer steps made: nothing is scored again.
    """

    def __init__(self, settings: BudgetConfig, groups: Groups) -> None:
        self.settings, self.groups = settings, groups
        self._seen: list[tuple[Tensor, Tensor]] = []

    def watch(self, objective: Objective) -> Objective:
        """The same objective; the meter listens."""

        def metered(logprobs_NS: Tensor, entropy_NS: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
            self._seen.append(
                sequence_log_ratios(
                    logprobs_NS,
                    batch.extras[BEHAVIOUR],
                    batch.loss_mask_NS,
                    normalise_by_length=self.settings.ratio_length is RatioLength.mean,
                )
            )
            return objective(logprobs_NS, entropy_NS, batch)

        return metered

    def read(self) -> Budget:
        """Of everything since the last call. Collective: last pipeline stages compute, all ranks get the same."""
        rows_4 = torch.zeros(BUDGET_SUMS, dtype=torch.float64, device=self.groups.device)
        if self._seen:
            log_ratio_N, present_N = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            rows_4 = budget_sums(log_ratio_N, temper=self.settings.temper, valid_N=present_N)
        self._seen = []
        if self.groups.pp.size() > 1:
            dist.broadcast(rows_4, group=self.groups.pp, group_src=self.groups.pp.size() - 1)
        return budget(combine(gather_rows(rows_4[None], self.groups.dp)))

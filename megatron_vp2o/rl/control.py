"""Proximal control: who takes an optimizer step, and what the log-ratios say about how fresh the actors still are.

Shape legend: N sequences of a micro-batch, S positions, R data-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.config.schema import BudgetConfig
from megatron_vp2o.core.budget import BUDGET_SUMS, Budget, budget, budget_sums, combine, sequence_log_ratios
from megatron_vp2o.core.choices import RatioLength
from megatron_vp2o.core.deferred import Deferred, read
from megatron_vp2o.parallel.groups import Groups, gather_rows
from megatron_vp2o.rl.interfaces import Objective, Policy, Restorable
from megatron_vp2o.rl.types import Rollouts, StepStats, TrainBatch


class PlainSteps:
    """Every step as the optimizer proposes it; one that it skips leaves no trace.

    Args:
        others: whose state is restored when a step is skipped, besides the policy's.
    """

    def __init__(self, policy: Policy, *others: Restorable) -> None:
        self._policy = policy
        self._parts: tuple[Restorable, ...] = (policy, *others)
        self._saved: list[Any] = []

    def begin(self, batch: TrainBatch) -> None:
        self._saved = [part.save_state() for part in self._parts]

    def step(self, measured: Deferred[dict[str, float]]) -> StepStats:
        lr = self._policy.learning_rate
        stats = StepStats.of(*read(measured, self._policy.gradient_norm()), lr=lr)
        if not stats.skipped:
            self._policy.take_step()
            return stats
        for part, saved in zip(self._parts, self._saved, strict=True):
            part.restore_state(saved)
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
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # l, whether it counts, whether it is the present actors'

    def watch(self, objective: Objective) -> Objective:
        """The same objective; the meter listens."""

        def metered(logprobs_NS: Tensor, entropy_NS: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
            assert batch.behaviour_logprobs_NS is not None
            log_ratio_N, counts_N = sequence_log_ratios(
                logprobs_NS,
                batch.behaviour_logprobs_NS,
                batch.loss_mask_NS,
                normalise_by_length=self.settings.ratio_length is RatioLength.mean,
            )
            present_N = counts_N if batch.present_N is None else counts_N & batch.present_N.to(counts_N.device)
            self._seen.append((log_ratio_N, counts_N, present_N))
            return objective(logprobs_NS, entropy_NS, batch)

        return metered

    def spent(self) -> Deferred[Budget]:
        """The budget of everything since the last call. Collective: last pipeline stages compute, all ranks get the same."""
        return self.spent_by_both().then(lambda budgets: budgets[0])

    def spent_by_both(self) -> Deferred[tuple[Budget, Budget]]:
        """The same, and that of the sequences alone which are the actors' present weights' (`TrainBatch.present_N`)."""
        sums_24 = torch.zeros(2, BUDGET_SUMS, dtype=torch.float64, device=self.groups.device)
        if self._seen:
            log_ratio_N, *valid_2N = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            temper = self.settings.temper
            sums_24 = torch.stack([budget_sums(log_ratio_N, temper=temper, valid_N=valid_N) for valid_N in valid_2N])
        self._seen = []
        if self.groups.pp.size() > 1:
            dist.broadcast(sums_24, group=self.groups.pp, group_src=self.groups.pp.size() - 1)
        sums_R24 = gather_rows(sums_24[None], self.groups.dp)
        sums = combine(sums_R24[:, 0]), combine(sums_R24[:, 1])
        return Deferred(sums, lambda on_host: (budget(on_host[0]), budget(on_host[1])))

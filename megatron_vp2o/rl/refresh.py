"""When the rollout actors get the learner's weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_vp2o.core.budget import Budget, RefreshReason, refresh_reasons


@dataclass
class EveryBatches:
    """After a fixed number of rollout batches (`rollout.refresh_interval`), or when a step was rejected."""

    interval: int
    _rejected: bool = field(default=False, init=False)

    def reason(self, age: int) -> RefreshReason | None:
        if self._rejected:
            return RefreshReason.rejected
        return RefreshReason.interval if age >= self.interval else None

    def observe(self, budget: Budget | None, rejected: bool) -> None:
        self._rejected = rejected

    def state_dict(self) -> dict[str, Any]:
        return {"rejected": self._rejected}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rejected = state["rejected"]


@dataclass
class WhenSpent:
    """When a step was rejected, the budget is spent, or the actors are too old (VP2O section 3.4)."""

    max_drift: float
    min_ess: float
    max_age: int | None
    _spent: Budget | None = field(default=None, init=False)
    _rejected: bool = field(default=False, init=False)

    def reason(self, age: int) -> RefreshReason | None:
        reasons = refresh_reasons(
            self._spent,
            max_drift=self.max_drift,
            min_ess=self.min_ess,
            age=age,
            max_age=self.max_age,
            rejected=self._rejected,
        )
        return reasons[0] if reasons else None

    def observe(self, budget: Budget | None, rejected: bool) -> None:
        self._spent, self._rejected = budget, rejected

    def state_dict(self) -> dict[str, Any]:
        return {"spent": None if self._spent is None else list(self._spent), "rejected": self._rejected}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        spent = state.get("spent")  # not there where the budget was not enforced when the state was saved
        self._spent = None if spent is None else Budget(*spent)
        self._rejected = state["rejected"]

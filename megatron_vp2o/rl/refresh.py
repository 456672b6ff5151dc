"""When the rollout actors get the learner's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class RefreshPolicy(Protocol):
    def reason(self, age: int) -> str | None:
        """Why the actors are to be refreshed before the next rollout batch, or None to keep them.

        Args:
            age: rollout batches generated with the actors' present weights.
        """
        ...


@dataclass(frozen=True)
class EveryBatches:
    """After a fixed number of rollout batches (`rollout.refresh_interval`)."""

    interval: int

    def reason(self, age: int) -> str | None:
        return "interval" if age >= self.interval else None

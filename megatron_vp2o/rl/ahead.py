"""Rollout batches that were asked for and are not trained on yet: generation beside training.

    step t:   refresh the actors, if that is due; before it all batches under way are waited for, and scored by their own actors
              ask for batch t + ahead, of the present actors
              wait for batch t, and train on it                        meanwhile servers generate batches t + 1 to t + ahead

So which weights generate a batch follows from the steps alone, and not from who was faster: batch t is of the actors of step
t - ahead. With `ahead` = 0 the queue is empty between steps, and the engine generates when it is waited for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_vp2o.rl.interfaces import GeneratesAhead, Generating, RolloutEngine
from megatron_vp2o.rl.mismatch import Recomputed
from megatron_vp2o.rl.types import Problem, Rollouts, SamplingParams


@dataclass(frozen=True)
class Scored:
    """What only the weights that generated a batch say of it."""

    rollouts: Rollouts  # with the routes of the trainer's own pass, where these are replayed (R2)
    recomputed: Recomputed | None
    metrics: dict[str, float]


@dataclass
class Queued:
    """A rollout batch that was asked for."""

    problems: list[Problem]
    version: int  # of the actors' weights when it was asked for
    generating: Generating
    rollouts: Rollouts | None = None  # once it was waited for
    scored: Scored | None = None
    mismatch: dict[str, float] | None = None  # `policy/logprob_mismatch`, once it was measured
    generation_s: float = 0.0  # how long servers took for this rank's prompts, once it was waited for
    servers_waited_s: float = 0.0  # how long they had nothing to do for this rank before


class Deferred:
    """Implements `Generating` for an engine that generates only while it is waited for."""

    def __init__(self, generate: Callable[[], Rollouts]) -> None:
        self._generate = generate

    def span(self) -> None:
        """Nobody generated beside training."""

    def wait(self) -> Rollouts:
        """Generate."""
        return self._generate()

    def cancel(self) -> None:
        """Nothing was begun."""


class RolloutQueue:
    """Batches in the order in which they are trained on.

    Args:
        ahead: whether the engine generates while the caller trains.
    """

    def __init__(self, engine: RolloutEngine, *, ahead: bool) -> None:
        self.engine, self.ahead = engine, ahead
        self.batches: deque[Queued] = deque()
        self._through = float("inf")  # when servers were through with the last batch that was waited for
        self._waited_s = 0.0

    def __len__(self) -> int:
        return len(self.batches)

    def ask(
        self,
        problems: list[Problem],
        prompts: Sequence[Sequence[int]],
        uids: Sequence[int],
        sampling: SamplingParams,
        group_size: int,
        *,
        first: bool = False,
    ) -> None:
        """Ask the present actors for a batch. Collective.

        Args:
            first: it is the next that is trained on, not the last.
        """
        version = self.engine.version
        if self.ahead:
            assert isinstance(self.engine, GeneratesAhead), "rollout.ahead is refused with engines that cannot"
            generating: Generating = self.engine.begin(prompts, uids, sampling, group_size)
        else:
            generating = Deferred(partial(self.engine.generate, prompts, uids, sampling, group_size))
        queued = Queued(problems, version, generating)
        (self.batches.appendleft if first else self.batches.append)(queued)

    def wait(self, queued: Queued) -> Rollouts:
        """The rollouts of a batch, which may be the first call for it or a later one. Collective."""
        if queued.rollouts is None:
            start = time.monotonic()
            queued.rollouts = queued.generating.wait()
            self._waited_s += time.monotonic() - start
            span = queued.generating.span()
            if span is not None:
                queued.generation_s = span[1] - span[0]
                queued.servers_waited_s = max(0.0, span[0] - self._through)
                self._through = span[1]
        return queued.rollouts

    def drop_first(self) -> Queued:
        """Nobody trains on the next batch."""
        queued = self.batches.popleft()
        if queued.rollouts is None:
            queued.generating.cancel()
        return queued

    def abandon(self) -> None:
        """Nobody trains on any of them. Not collective."""
        while self.batches:
            self.drop_first()

    def waited_s(self) -> float:
        """How long this rank has waited for rollouts since the last call."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

"""Rollout batches that were asked for and are not trained on yet: generation beside training.

    step t:   refresh the actors, if that is due; before it all batches under way are waited for, and scored by their own actors
              ask for batch t + ahead, of the present actors
              wait for batch t, and train on it                        meanwhile servers generate batches t + 1 to t + ahead

So which weights generate a batch follows from the steps alone, and not from who was faster: batch t is of the actors of step
t - ahead. With `ahead` = 0 the queue is empty between steps, and the engine generates when it is waited for.

With `ahead` > 1 batches of earlier actors may wait in the queue when a checkpoint is written. Nobody has those actors' weights when
the run goes on, so the batches, and what their weights said of them, are taken from disk (`interfaces.Recalls`).
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_vp2o.parallel.groups import Groups, any_rank, sum_scalars
from megatron_vp2o.rl.interfaces import GeneratesAhead, Generating, Recalls, RolloutEngine
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
    weights: str  # name of these, where the engine keeps batches on disk (`Recalls.asked_of`), else empty
    generating: Generating
    rollouts: Rollouts | None = None  # once it was waited for
    scored: Scored | None = None
    mismatch: dict[str, float] | None = None  # `policy/logprob_mismatch`, once it was measured
    generation_s: float = 0.0  # how long servers took for this rank's prompts, once it was waited for
    servers_waited_s: float = 0.0  # how long they had nothing to do for this rank before
    noted: bool = False  # `scored` and `mismatch` are on disk

    def notes(self) -> dict[str, Any]:
        """What the weights that generated it said of it, as numpy arrays."""
        scored, arrays = self.scored, {}
        assert scored is not None
        if scored.recomputed is not None:
            arrays["recomputed"] = scored.recomputed.logprobs_NS.cpu().numpy()
            if scored.recomputed.weight_NS is not None:
                arrays["weight"] = scored.recomputed.weight_NS.cpu().numpy()
        if scored.rollouts is not self.rollouts and scored.rollouts.routes_NSLK is not None:
            arrays["routes"] = scored.rollouts.routes_NSLK.cpu().numpy()
        return arrays | {"metrics": np.array(json.dumps([scored.metrics, self.mismatch]))}

    def take_notes(self, rollouts: Rollouts, arrays: dict[str, Any]) -> None:
        """The reverse of `notes`, for a batch that was recalled."""
        tensors = {
            name: torch.from_numpy(arrays[name]) for name in ("recomputed", "weight", "routes") if name in arrays
        }
        recomputed = Recomputed(tensors["recomputed"], tensors.get("weight")) if "recomputed" in tensors else None
        metrics, self.mismatch = json.loads(str(arrays["metrics"]))
        routed = replace(rollouts, routes_NSLK=tensors["routes"]) if "routes" in tensors else rollouts
        self.scored = Scored(routed, recomputed, metrics)
        self.rollouts, self.noted = rollouts, True


class Deferred:
    """Implements `Generating` for an engine that generates only while it is waited for."""

    def __init__(self, generate: Callable[[], Rollouts]) -> None:
        self._generate = generate

    def done(self) -> bool:
        """Not before it is waited for."""
        return False

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

    def __init__(self, engine: RolloutEngine, groups: Groups, *, ahead: bool) -> None:
        self.engine, self.groups, self.ahead = engine, groups, ahead
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
        weights = self.engine.asked_of(generating) if self.ahead and isinstance(self.engine, Recalls) else ""
        queued = Queued(problems, version, weights, generating)
        (self.batches.appendleft if first else self.batches.append)(queued)

    def recall(
        self,
        problems: list[Problem],
        prompts: Sequence[Sequence[int]],
        uids: Sequence[int],
        sampling: SamplingParams,
        group_size: int,
        *,
        version: int,
        weights: str,
    ) -> bool:
        """Queue a batch that earlier actors, of this version and name, were asked for. Returns whether it is on disk, with what
        these actors said of it. Collective."""
        if not weights or not isinstance(self.engine, Recalls):
            return False
        found = self.engine.recall(prompts, uids, sampling, group_size, weights)
        if found is None or found[1] is None:
            return False
        queued = Queued(problems, version, weights, found[0])
        queued.take_notes(found[0].wait(), found[1])
        self.batches.append(queued)
        return True

    def note(self, queued: Queued) -> None:
        """Keep what the weights that generated a batch said of it: they are about to be given up, and the batch stays."""
        if queued.weights and not queued.noted and isinstance(self.engine, Recalls):
            self.engine.note(queued.generating, queued.notes())
            queued.noted = True

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

    def done(self, queued: Queued) -> bool:
        """Whether no rank need wait for a batch any more. Collective."""
        return queued.rollouts is not None or not any_rank(not queued.generating.done(), self.groups.world)

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


def token_ages(rollouts: Rollouts, optimizer_steps: int, groups: Groups) -> dict[str, float]:
    """How old tokens are after so many optimizer steps, where a response may have several weights'; else nothing. Collective."""
    if rollouts.versions_NS is None:
        return {}
    versions_NS, response_NS = rollouts.versions_NS, rollouts.response_mask_NS()
    newest_N = versions_NS.amax(1)
    mixed_N = (response_NS & (versions_NS < newest_N[:, None])).any(1)
    sums = {
        "age": float((optimizer_steps - versions_NS)[response_NS].sum()),
        "tokens": float(response_NS.sum()),
        "mixed": float(mixed_N.sum()),
        "rows": float(len(mixed_N)),
    }
    total = sum_scalars(sums, groups.dp)
    return {"overlap/token_age": total["age"] / total["tokens"], "overlap/mixed": total["mixed"] / total["rows"]}

"""Servers as the training loop sees an engine: collective over the ranks of a run, with the actor's weights on the learner's side.

Every rank keeps a snapshot of the actor's weights in the learner's layout (the embedded engine), because others need it: the
probe's log-probabilities, recomputed ones of stale rollouts, checkpoints, and evaluation. Servers get their weights from that
snapshot, streamed by all ranks and written by the first. The rank that speaks for a data-parallel replica asks the servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_vp2o.core.deferred import Deferred
from megatron_vp2o.errors import RolloutError, SyncError, UserError
from megatron_vp2o.parallel import failure
from megatron_vp2o.parallel.groups import Groups, any_rank, first_rank_says, gather_objects, on_replica
from megatron_vp2o.rl.interfaces import RolloutEngine
from megatron_vp2o.rl.types import Rollouts, SamplingParams
from megatron_vp2o.rollout.begun import Begun
from megatron_vp2o.rollout.pool import ServerPool
from megatron_vp2o.rollout.protocol import Probe, Receipt


class Snapshot(RolloutEngine, Protocol):
    """The embedded engine, which holds the actor's weights on the learner's ranks."""


class ServedEngine:
    """Implements `rl.interfaces.RolloutEngine` with a pool of servers.

    Args:
        snapshot: holds the actor's weights on all ranks.
        pool: on ranks that speak for a replica; None on others. The first rank's owns the servers.
        stream: the snapshot's weights as the pool wants them, every tensor on the first rank; collective over all ranks.
        probe_tokens: sequences that servers score after each update.
        tolerance: largest difference of a probe's token, nats.
        stage: places of this pipeline stage's layers among those whose routes the pool's rollouts have.
        in_flight: whether servers get new weights while they generate (`PoolSettings.in_flight_updates` of the pools).
    """

    def __init__(
        self,
        snapshot: Snapshot,
        pool: ServerPool | None,
        groups: Groups,
        *,
        stream: Callable[[], Iterator[tuple[str, Tensor]]],
        probe_tokens: list[list[int]],
        tolerance: float,
        stage: Sequence[int] = (),
        in_flight: bool = False,
    ) -> None:
        self.in_flight = in_flight
        self.snapshot, self.pool, self.groups, self.stream = snapshot, pool, groups, stream
        self.probe_tokens, self.tolerance, self.stage = probe_tokens, tolerance, list(stage)
        self.receipt: Receipt | None = None
        self._served = -1  # version of the servers' weights
        self._borrowed = False
        self._under_way: list[ServedBatch] = []

    @property
    def version(self) -> int:
        """Version of the actor's weights. The servers may be behind, after a resume, until the next batch is generated."""
        return self.snapshot.version

    def refresh(self, version: int) -> None:
        """Give the servers the learner's weights as they are now; see `ServerPool.update_weights`. Collective.

        Raises:
            SyncError: on all ranks: no server holds them.
        """
        self.snapshot.refresh(version)
        self._serve()

    def _serve(self) -> None:
        """Bring the servers to the snapshot's weights. No rank generates meanwhile, because a batch ends on all together; unless
        responses may go on with other weights."""
        assert self.in_flight or not self._under_way, "servers would get other weights while they generate"
        probe = self._probe()
        if self.in_flight:
            if self.pool is not None and self.groups.rank != 0:
                self.pool.hold()
            any_rank(False, self.groups.world)  # no server has new weights before all hold back what these say
        said: tuple[str, Any] = ("", None)
        stream = self.stream()
        if self.groups.rank == 0:
            assert self.pool is not None
            try:
                said = "", self.pool.update_weights(stream, self.version, probe)
            except UserError as error:
                said = str(error), None
        for _ in stream:  # other ranks take part to the end, and so does the first where its pool refused
            pass
        label = self.pool.label if self.pool is not None else ""
        lost = [member.lost for member in self.pool.members] if self.pool is not None else []
        labels = self.pool.labels if self.pool is not None else {}
        problem, receipt, label, lost, labels = first_rank_says((*said, label, lost, labels), self.groups.world)
        if problem:
            self._served = -1
            raise SyncError(problem)
        if self.pool is not None and self.groups.rank != 0:
            self.pool.adopt(self.version, label, lost, labels)
        self.receipt, self._served = receipt, self.version

    def _probe(self) -> Probe:
        """What the snapshot makes of the probe's sequences. Collective."""
        tokens_NS = torch.tensor(self.probe_tokens)
        count, width = tokens_NS.shape
        lengths = torch.full((count,), width)
        zeros = torch.zeros(count, width)
        ones = torch.ones(count, dtype=torch.int64)
        whole = Rollouts(tokens_NS, ones, lengths, zeros, zeros, ones.bool(), self.version)
        logprobs = self.snapshot.log_probs(whole, 1.0)[:, 1:]
        return Probe(self.probe_tokens, logprobs.tolist(), self.tolerance)

    def generate(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: SamplingParams, group_size: int = 1
    ) -> Rollouts:
        """See `rl.interfaces.RolloutEngine.generate`. Which samples come is not reproducible; see `ServerPool.generate`.

        All ranks return together. The first rank, which keeps the servers alive, must not go on to end them, or to give them other
        weights, while another replica is still asking them; and where one replica gets no rollouts, none goes on.

        Raises:
            RolloutError: on all ranks: a replica did not get its rollouts.
        """
        if self._borrowed:
            return self.snapshot.generate(prompts, uids, sampling, group_size)
        return self._begin(prompts, uids, sampling, group_size).wait()

    def begin(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: SamplingParams, group_size: int = 1
    ) -> ServedBatch:
        """See `rl.interfaces.GeneratesAhead`. Only the pool's own thread works until `wait`; an error there ends all ranks."""
        begun = self._begin(prompts, uids, sampling, group_size)
        begun.tell_of_errors()
        return begun

    def _begin(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: SamplingParams, group_size: int
    ) -> ServedBatch:
        if self._served != self.version:  # a resumed run's snapshot came out of its checkpoint
            self._serve()
        begun, problem = None, ""
        if self.pool is not None:
            try:
                begun = self.pool.begin(prompts, uids, sampling, group_size)
            except UserError as error:
                problem = str(error)
        batch = ServedBatch(begun, problem, self.groups, self._under_way, self.stage)
        self._under_way.append(batch)
        return batch

    def checksum(self) -> Deferred[int]:
        """The snapshot's checksum; that the servers hold the same was proven by the update."""
        return self.snapshot.checksum()

    @contextmanager
    def at_learner_weights(self) -> Iterator[None]:
        """Inside, the embedded engine generates, with the learner's weights."""
        with self.snapshot.at_learner_weights():
            self._borrowed = True
            try:
                yield
            finally:
                self._borrowed = False

    def log_probs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        """By the snapshot. [N, S], float32."""
        return self.snapshot.log_probs(rollouts, temperature)

    def log_probs_and_routes(self, rollouts: Rollouts, temperature: float) -> tuple[Tensor, Tensor]:
        """By the snapshot: see `RolloutEngine.log_probs_and_routes`."""
        return self.snapshot.log_probs_and_routes(rollouts, temperature)

    def close(self) -> None:
        """End the servers that were started."""
        if self.pool is not None:
            self.pool.close()


class ServedBatch:
    """Implements `rl.interfaces.Generating`: a batch under way in the pools of all replicas.

    Args:
        begun: on ranks that speak for a replica, the pool's; None on others, and where the pool refused.
        problem: why it refused.
        under_way: the engine's list, which this leaves when it is over.
        stage: places of this pipeline stage's layers among those whose routes the rollouts have.
    """

    def __init__(
        self, begun: Begun | None, problem: str, groups: Groups, under_way: list[ServedBatch], stage: list[int]
    ) -> None:
        self.begun, self.problem, self.groups, self.under_way = begun, problem, groups, under_way
        self.stage = stage
        self._awaited = False

    def done(self) -> bool:
        """See `Generating.done`."""
        return self.begun is None or self.begun.future.done()

    def span(self) -> tuple[float, float] | None:
        """See `Generating.span`."""
        if self.begun is None or not self.begun.prompts:
            return None
        return self.begun.started_at, self.begun.ended_at

    def tell_of_errors(self) -> None:
        """Nobody waits for it yet. Where it fails, all ranks come to know, whatever they are doing."""

        def tell(future: Future[Any]) -> None:
            if not self._awaited and not future.cancelled() and (error := future.exception()) is not None:
                failure.tell(error)

        if self.begun is not None:
            self.begun.future.add_done_callback(tell)

    def wait(self) -> Rollouts:
        """See `Generating.wait`. Raises RolloutError on all ranks where a replica did not get its rollouts."""
        self._awaited = True

        def result() -> tuple[Rollouts | None, str]:
            try:
                return (None, self.problem) if self.begun is None else (self.begun.result(), "")
            except UserError as error:
                return None, str(error)

        rollouts, problem = on_replica(result, self.groups)
        problems = list(dict.fromkeys(filter(None, gather_objects(problem, self.groups.world))))
        self.under_way.remove(self)
        if rollouts is None or problems:
            raise RolloutError("; and of another replica: ".join(problems))
        if rollouts.routes_NSLK is None:
            return rollouts
        return replace(rollouts, routes_NSLK=rollouts.routes_NSLK[:, :, self.stage])

    def cancel(self) -> None:
        """See `Generating.cancel`."""
        if self.begun is not None:
            self.begun.future.cancel()
        self.under_way.remove(self)

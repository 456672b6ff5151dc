"""Several vLLM servers as one engine: work is shared among them, weights reach all of them, and one that dies loses nothing.

    update_weights: files -> start what is not running -> every server loads, is probed, and gets the version's label
    generate:       prompts in a queue, some in flight to each server; what fails goes back into the queue
    the keeper:     a thread that restarts servers with the present weights

A sample counts only if the server says of each of its tokens that weights of the present label made it, and a label is given
only after the log-probability probe. So a server that was restarted, or that failed a sync, cannot contribute by mistake.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch
from torch import Tensor

from megatron_vp2o.errors import RolloutError, SyncError
from megatron_vp2o.rl.types import Rollouts, SamplingParams
from megatron_vp2o.rollout.answers import Asked, BadAnswer, OtherWeights, Sample
from megatron_vp2o.rollout.api import Server
from megatron_vp2o.rollout.launch import ServerProcess
from megatron_vp2o.rollout.protocol import Health, Probe, Receipt
from megatron_vp2o.rollout.weight_files import WeightSet, write_weights

logger = logging.getLogger(__name__)

T = TypeVar("T")
BUCKET_BYTES = 256 * 2**20
BAD_ANSWERS = 3
"""In a row from one server, after which it is not asked any more (and restarted, if it is ours)."""


@dataclass(frozen=True)
class PoolSettings:
    """How long and how often (docs/configuration.md has each under rollout.server)."""

    in_flight: int = 64  # prompts at once to each server
    attempts: int = 8  # tries of one prompt
    request_timeout_s: float = 120.0
    batch_timeout_s: float = 1800.0
    sync_timeout_s: float = 300.0
    startup_s: float = 600.0
    poll_s: float = 0.25


@dataclass
class Member:
    """A server of the pool, and how it stands."""

    url: str
    process: ServerProcess | None = None  # None: somebody else's
    bad_answers: int = 0  # in a row
    suspect: bool = False  # something failed: look what it holds before it is asked again
    stale: bool = False  # it lives and holds other weights
    lost: str = ""  # why it is not used any more; empty: it is
    samples: int = field(default=0, compare=False)  # that counted


class ServerPool:
    """Implements `rollout.protocol.Engine` with vLLM servers. Names of tensors are Hugging Face's.

    Args:
        members: the servers. Those with a process are started at the first update, and restarted when they die.
        shapes: names and shapes of a whole set of weights.
        describe: writes config.json and tokenizer into a folder of weights.
        folder: where sets of weights are written; servers must see it under the same path.
        ends: ids that end a response. vocabulary: ids that a response may have are below it. pad_id: after a response.
        owner: whether this process gives servers their weights and keeps them; others only generate (`adopt`).
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        shapes: Mapping[str, tuple[int, ...]],
        describe: Callable[[Path], object],
        folder: Path,
        ends: Iterable[int],
        vocabulary: int,
        pad_id: int,
        settings: PoolSettings | None = None,
        owner: bool = True,
    ) -> None:
        self.members, self.settings, self.owner = list(members), settings or PoolSettings(), owner
        self.shapes, self.describe, self.folder = shapes, describe, folder
        self.ends, self.vocabulary, self.pad_id = frozenset(ends), vocabulary, pad_id
        self.version = -1
        self.label = ""
        self.restarts = 0
        self._run = uuid.uuid4().hex[:8]
        self._weights: WeightSet | None = None
        self._probe: Probe | None = None
        self._unusable = "it was given none yet"
        self._closed = False
        self._syncing = threading.Lock()  # one sync at a time: the trainer's or the keeper's
        self._stop_keeper = threading.Event()
        self._keeper: threading.Thread | None = None

    # Weights

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int, probe: Probe | None = None
    ) -> Receipt:
        """See `rollout.protocol.Engine.update_weights`."""
        if self._closed or not self.owner:
            raise RolloutError(
                "the servers are closed: make a new pool" if self._closed else "another rank has the servers"
            )
        self.version, self.label = -1, ""
        self._unusable = f"the update to version {version} was not completed"
        with self._syncing:
            label = f"{self._run}-{version}-{uuid.uuid4().hex[:4]}"
            try:
                new = write_weights(
                    self.folder / label, weights, self.shapes, describe=self.describe, bucket_bytes=BUCKET_BYTES
                )
            except SyncError as error:
                self._unusable = str(error)
                raise
            old, self._weights, self._probe = self._weights, new, probe
            if old is not None:
                old.remove()
            problems = _run(self._load_all(label))
            used = [member for member in self.members if not member.lost]
            if not used:
                self._unusable = f"no server took version {version}: {'; '.join(problems)}"
                raise SyncError(f"{self._unusable}. Look into the servers' logs; training cannot go on without them")
            for problem in problems:
                logger.warning("a rollout server is left out: %s", problem)
            self.version, self.label, self._unusable = version, label, ""
        self._start_keeper()
        return Receipt(version, new.tensors, new.bytes, int(new.digest, 16))

    def adopt(self, version: int, label: str) -> None:
        """On a process that is not the owner: the servers hold this version now."""
        self.version, self.label, self._unusable = version, label, ""
        for member in self.members:
            member.bad_answers, member.stale, member.lost = 0, False, ""

    async def _load_all(self, label: str) -> list[str]:
        """Bring every server to the present weights, side by side. Returns what went wrong, and marks who is lost."""
        async with self._client() as http:
            told = await asyncio.gather(*(self._bring(member, http, label) for member in self.members))
        return [problem for problem in told if problem]

    async def _bring(self, member: Member, http: httpx.AsyncClient, label: str) -> str:
        """A whole good sync, a second try, and at last a restart, where the server is ours. Empty if it holds the weights."""
        tries = 3 if member.process is not None else 2
        said = ""
        for number in range(tries):
            if self._closed:
                return "the pool is closed"
            try:
                if member.process is not None and (not member.process.running or number == tries - 1):
                    await self._start(member, http)
                assert self._weights is not None
                server = Server(member.url, http)
                await server.load(self._weights, label, self._probe, self.settings.sync_timeout_s)
                member.bad_answers, member.stale, member.lost = 0, False, ""
                return ""
            except (httpx.HTTPError, BadAnswer) as error:
                said = f"{member.url}: {_words(error)}"
                logger.warning("sync of %s failed (try %d of %d): %s", member.url, number + 1, tries, _words(error))
        if member.process is not None:
            said += f" ({member.process.last_words()})"
            member.process.stop()  # nobody may get samples of whatever it holds
        member.lost = said
        return said

    async def _start(self, member: Member, http: httpx.AsyncClient) -> None:
        """Start a server with the present weights' folder and wait until it answers. Raises BadAnswer if it does not."""
        process, weights = member.process, self._weights
        assert process is not None and weights is not None
        await asyncio.to_thread(process.start, weights.folder)
        self.restarts += process.starts > 1
        server, deadline = Server(member.url, http), time.monotonic() + self.settings.startup_s
        while not await server.healthy():
            if not process.running:
                raise BadAnswer(f"it ended while it started; {process.last_words()}")
            if time.monotonic() > deadline:
                raise BadAnswer(
                    f"it did not answer within {self.settings.startup_s:g} s (rollout.server.startup_minutes); "
                    f"{process.last_words()}"
                )
            await asyncio.sleep(self.settings.poll_s)
        await server._post("/init_weight_transfer_engine", {"init_info": {}}, self.settings.sync_timeout_s)

    # The keeper

    def _start_keeper(self) -> None:
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._keep, name="rollout-keeper", daemon=True)
            self._keeper.start()

    def _keep(self) -> None:
        """Restart servers of ours that died or answer nonsense, and give others that lost the weights the weights again."""
        while not self._stop_keeper.wait(self.settings.poll_s):
            if not self.label:
                continue
            for member in self.members:
                if member.lost or not self._needs_care(member):
                    continue
                with self._syncing:
                    label = self.label
                    if self._stop_keeper.is_set() or not label or not self._needs_care(member):
                        continue
                    logger.warning("rollout server %s is brought back with the present weights", member.url)
                    problem = _run(self._revive(member, label))
                    if problem and not self._stop_keeper.is_set():
                        logger.error("rollout server %s is lost: %s", member.url, problem)

    def _needs_care(self, member: Member) -> bool:
        if member.process is None:
            return member.stale
        return not member.process.running or member.bad_answers >= BAD_ANSWERS

    async def _revive(self, member: Member, label: str) -> str:
        async with self._client() as http:
            if member.process is not None and member.bad_answers >= BAD_ANSWERS:
                await asyncio.to_thread(member.process.stop)
            return await self._bring(member, http, label)

    # Generation

    def generate(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: SamplingParams, group_size: int = 1
    ) -> Rollouts:
        """See `rollout.protocol.Engine.generate`. Samples are not reproducible: servers get no seed.

        Raises also ValueError for a nucleus: servers do not say what a token's probability is without it.
        """
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("a prompt has 0 tokens; at least 1 is needed to predict from")
        if 0 < sampling.top_p < 1 and sampling.temperature > 0:
            raise ValueError(f"top_p={sampling.top_p}: servers do not say a token's probability without the nucleus")
        if self._closed:
            raise RolloutError("the servers are closed: make a new pool")
        if self.version < 0:
            raise SyncError(f"the servers have no usable weights: {self._unusable}")
        groups = _run(self._generate(prompts, sampling, group_size)) if prompts else []
        return self._rollouts(prompts, groups, sampling, group_size)

    async def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, group_size: int
    ) -> list[list[Sample]]:
        batch = _Batch(self, prompts, sampling, group_size)
        async with self._client() as http:
            workers = [
                asyncio.create_task(batch.work(member, http))
                for member in self.members
                for _ in range(min(self.settings.in_flight, len(prompts)))
            ]
            try:
                return await batch.result(workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    def _rollouts(
        self, prompts: Sequence[Sequence[int]], groups: list[list[Sample]], sampling: SamplingParams, group_size: int
    ) -> Rollouts:
        width = max((len(prompt) for prompt in prompts), default=1) + sampling.max_new_tokens
        count = len(prompts) * group_size
        tokens_NS = torch.full((count, width), self.pad_id)
        logprobs_NS = torch.zeros(count, width)
        prompt_len_N, total_len_N = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        finished_N = torch.zeros(count, dtype=torch.bool)
        rows = ((p, sample) for p, group in enumerate(groups) for sample in group)
        for n, (p, sample) in enumerate(rows):
            start, end = len(prompts[p]), len(prompts[p]) + len(sample.tokens)
            tokens_NS[n, :end] = torch.tensor([*prompts[p], *sample.tokens])
            logprobs_NS[n, start:end] = torch.tensor(sample.logprobs)
            prompt_len_N[n], total_len_N[n], finished_N[n] = start, end, sample.finished
        return Rollouts(tokens_NS, prompt_len_N, total_len_N, logprobs_NS, logprobs_NS, finished_N, self.version)

    # Life

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(self.settings.request_timeout_s, connect=10.0)
        secure = any(member.url.startswith("https:") for member in self.members)  # reading certificates takes 50 ms
        return httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False, verify=secure)

    def check(self) -> None:
        """Look whether all servers that are somebody else's answer, before a run starts. Raises RolloutError naming them."""
        problems = _run(self._check())
        if problems:
            raise RolloutError("; ".join(problems))

    async def _check(self) -> list[str]:
        problems = []
        async with self._client() as http:
            for member in self.members:
                if member.process is not None:
                    continue
                try:
                    await Server(member.url, http).label()
                    await Server(member.url, http)._post("/init_weight_transfer_engine", {"init_info": {}}, 30.0)
                except (httpx.HTTPError, BadAnswer) as error:
                    problems.append(
                        f"rollout.urls has {member.url}, which cannot be used ({_words(error)}): start it as docs/rollouts.md "
                        "says, or take it out"
                    )
        return problems

    def health(self) -> Health:
        """See `rollout.protocol.Engine.health`. Ready while at least one server answers."""
        if self._closed or self.version < 0:
            return Health(False, -1, "closed" if self._closed else self._unusable)
        answering = _run(self._answering())
        there = f"{sum(answering)} of {len(self.members)} servers answer"
        lost = [f"{member.url} is lost: {member.lost}" for member in self.members if member.lost]
        return Health(any(answering), self.version, "; ".join([there, *lost]))

    async def _answering(self) -> list[bool]:
        async with self._client() as http:
            return list(await asyncio.gather(*(Server(member.url, http).healthy() for member in self.members)))

    def close(self) -> None:
        """End the servers that are ours, and delete the weights' files."""
        self._closed = True
        self._stop_keeper.set()
        for member in self.members:
            if member.process is not None:
                member.process.stop()
        if self._keeper is not None:
            self._keeper.join(30)
            self._keeper = None
        for member in self.members:  # one that the keeper was just starting
            if member.process is not None:
                member.process.stop()
        if self._weights is not None:
            self._weights.remove()
            self._weights = None
            with contextlib.suppress(OSError):  # not empty, or not there
                self.folder.rmdir()


class _Batch:
    """Prompts on their way through the servers: each gets one group of samples, whoever makes it."""

    def __init__(
        self, pool: ServerPool, prompts: Sequence[Sequence[int]], sampling: SamplingParams, group_size: int
    ) -> None:
        self.pool, self.prompts, self.sampling, self.group_size = pool, prompts, sampling, group_size
        self.asked = Asked(pool.ends, pool.vocabulary, sampling.max_new_tokens, pool.label)
        self.groups: list[list[Sample] | None] = [None] * len(prompts)
        self.attempts = [0] * len(prompts)
        self.left = len(prompts)
        self.queue: asyncio.Queue[int] = asyncio.Queue()
        for number in range(len(prompts)):
            self.queue.put_nowait(number)
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.last_error = ""

    async def result(self, workers: Sequence[asyncio.Task[None]]) -> list[list[Sample]]:
        """Wait for all groups. Raises RolloutError where they cannot be had."""
        done = asyncio.gather(*workers)
        try:
            either: set[asyncio.Future[Any]] = {self.over, done}
            await asyncio.wait(either, timeout=self.pool.settings.batch_timeout_s, return_when="FIRST_COMPLETED")
            if self.over.done():
                self.over.result()
            elif done.done():
                done.result()  # an error of this program goes through
                self._fail("no server is left")
            else:
                self._fail(f"time is up after {self.pool.settings.batch_timeout_s:g} s (rollout.server.batch_minutes)")
        finally:
            done.cancel()
            await asyncio.gather(done, return_exceptions=True)
        return [group for group in self.groups if group is not None]

    def _fail(self, why: str) -> None:
        lost = "; ".join(member.lost for member in self.pool.members if member.lost)
        raise RolloutError(
            f"{self.left} of {len(self.prompts)} prompts have no rollouts, because {why}"
            + (f"; last error: {self.last_error}" if self.last_error else "")
            + (f"; lost servers: {lost}" if lost else "")
        )

    async def work(self, member: Member, http: httpx.AsyncClient) -> None:
        """Take prompts from the queue for one server until all are done or the server is lost."""
        server = Server(member.url, http)
        while not self.over.done():
            if not await self._usable(member, server):
                return
            number = await self.queue.get()
            if member.suspect or member.lost:  # it failed another prompt meanwhile: this one is for who can take it
                self.queue.put_nowait(number)
                continue
            try:
                group = await server.generate(self.prompts[number], self.sampling, self.group_size, self.asked)
            except (httpx.HTTPError, BadAnswer) as error:
                self._failed(member, number, error)
            except BaseException:
                self.queue.put_nowait(number)
                raise
            else:
                self._finished(member, number, group)

    def _finished(self, member: Member, number: int, group: list[Sample]) -> None:
        assert self.groups[number] is None  # a number is in the queue, or with one worker, or done
        self.groups[number] = group
        member.bad_answers = 0
        member.samples += len(group)
        self.left -= 1
        if not self.left and not self.over.done():
            self.over.set_result(None)

    def _failed(self, member: Member, number: int, error: Exception) -> None:
        self.attempts[number] += not isinstance(error, httpx.ConnectError)  # it was never asked
        self.last_error = f"{member.url}: {_words(error)}"
        member.suspect = True
        logger.info("prompt %d goes back into the queue: %s", number, self.last_error)
        # A connection that breaks says nothing of answers: whether the server lives is seen before its next prompt.
        if isinstance(error, BadAnswer | httpx.ReadTimeout) and not isinstance(error, OtherWeights):
            member.bad_answers += 1
        if self.attempts[number] >= self.pool.settings.attempts and not self.over.done():
            try:
                self._fail(f"prompt {number} failed {self.attempts[number]} times (rollout.server.attempts)")
            except RolloutError as failure:
                self.over.set_exception(failure)
            return
        self.queue.put_nowait(number)

    async def _usable(self, member: Member, server: Server) -> bool:
        """Wait until the server can be asked; False once it is lost. Nothing is looked up while all goes well."""
        if not member.lost and not member.suspect:
            return True
        while not member.lost and not self.over.done():
            ours = member.process is not None
            if member.bad_answers >= BAD_ANSWERS and not ours:
                if self.pool.owner:
                    member.lost = f"{member.url}: {BAD_ANSWERS} bad answers in a row ({self.last_error})"
                    logger.warning("rollout server is left out until the next update: %s", member.lost)
                return False
            if member.bad_answers < BAD_ANSWERS and await self._holds_the_weights(member, server):
                return True
            await asyncio.sleep(self.pool.settings.poll_s)
        return False

    async def _holds_the_weights(self, member: Member, server: Server) -> bool:
        try:
            held = await server.label()
        except (httpx.HTTPError, BadAnswer):
            return False
        if held == self.asked.label:
            member.suspect = False
            return True
        member.stale = True  # the keeper gives it the weights again
        return False


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run asynchronous work to its end, from a thread without an event loop."""
    return asyncio.run(work)

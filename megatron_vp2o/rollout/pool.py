"""Several vLLM servers as one engine: work is shared among them, weights reach all of them, and one that dies loses nothing.

    update_weights: a whole set (`transfer.py`) -> start what is not running -> every server loads, is probed, gets its label
    generate:       prompts in a queue, some in flight to each server; what fails goes back into the queue (`batch.py`)
    begin:          the same while the caller does something else (`begun.py`)
    watchers:       one for each server, which alone asks how it is while it is in trouble, and mends it (`members.py`)

A sample counts only if the server says of each of its tokens that weights of the present label made it, and a label is given
only after the log-probability probe. So a server that was restarted, or that failed a sync, cannot contribute by mistake.

Everything that talks to servers runs in one event loop, in a thread of the pool's own, over connections that live as long as it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
from torch import Tensor

from megatron_vp2o.errors import RolloutError, SyncError
from megatron_vp2o.rl.types import Rollouts, SamplingParams
from megatron_vp2o.rollout.answers import Asked, BadAnswer, RoutesAsked, Sample
from megatron_vp2o.rollout.api import Server, all_healthy, unusable
from megatron_vp2o.rollout.batch import Batch, words
from megatron_vp2o.rollout.begun import Begun
from megatron_vp2o.rollout.board import Board, News
from megatron_vp2o.rollout.connections import OneEach
from megatron_vp2o.rollout.labels import Labels
from megatron_vp2o.rollout.members import STRIKES, Member
from megatron_vp2o.rollout.pool_settings import PoolSettings
from megatron_vp2o.rollout.protocol import Health, Probe, Receipt
from megatron_vp2o.rollout.pulse import Pulse
from megatron_vp2o.rollout.transfer import FileTransfer, Transfer, Weights

logger = logging.getLogger(__name__)

T = TypeVar("T")
KEEP_ALIVE_S = 2.0
"""How long an idle connection is kept: shorter than servers do (uvicorn 5 s), lest they end one that is about to be used."""


class ServerPool:
    """Implements `rollout.protocol.Engine` with vLLM servers. Names of tensors are Hugging Face's.

    Args:
        members: the servers. Those with a process are started at the first update, and restarted when they die.
        shapes: names and shapes of a whole set of weights.
        describe: writes config.json and tokenizer into a folder of weights.
        folder: where sets of weights are described, and with files written; servers started with one must see it under this path.
        ends: ids that end a response. vocabulary: ids that a response may have are below it. pad_id: after a response.
        owner: whether this process gives servers their weights and keeps them; others only generate (`adopt`).
        board: where ranks tell each other about servers; None: no other rank asks them.
        routes: of which layers rollouts carry the routes, in the order of `routes_NSLK`; None: of none.
        transfer: how weights get to the servers; None: as files.
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
        board: Board | None = None,
        routes: RoutesAsked | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        self.members, self.settings, self.owner = list(members), settings or PoolSettings(), owner
        self.shapes, self.describe, self.folder = shapes, describe, folder
        self.ends, self.vocabulary, self.pad_id = frozenset(ends), vocabulary, pad_id
        self.board, self.routes = board, routes
        self.transfer: Transfer = transfer or FileTransfer()
        self.version = -1
        self.label = ""
        self.restarts = 0
        self._run = uuid.uuid4().hex[:8]
        self._weights: Weights | None = None
        self._probe: Probe | None = None
        self._unusable = "it was given none yet"
        self._closed, self._well = False, True
        self._turn = asyncio.Lock()  # of the batch that is generated
        self._labels = Labels(several=self.settings.in_flight_updates)
        self._batches: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._http: httpx.AsyncClient | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._pulses = {member.url: self._pulse(member) for member in self.members}

    def _pulse(self, member: Member) -> Pulse:
        return Pulse(lambda: self._server(member), self.settings.silence_s, every_s=self.settings.look_s)

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
        label = f"{self._run}-{version}-{uuid.uuid4().hex[:4]}"
        try:
            new = self.transfer.take(self.folder / label, weights, self.shapes, self.describe)
        except SyncError as error:
            self._unusable = str(error)
            raise
        problems = self._do(self._load_all(new, label, version, probe))
        if all(member.lost for member in self.members):
            self._unusable = f"no server took version {version}: {'; '.join(problems)}"
            raise SyncError(f"{self._unusable}. Look into the servers' logs; training cannot go on without them")
        for problem in problems:
            logger.warning("a rollout server is left out: %s", problem)
        self.version, self.label, self._unusable = version, label, ""
        self._do(self._watch_all())
        return Receipt(version, new.tensors, new.bytes, int(new.digest, 16))

    @property
    def labels(self) -> dict[str, int]:
        """Labels whose tokens count, with their versions: what `adopt` needs elsewhere."""
        return dict(self._labels.versions)

    def hold(self) -> None:
        """On a process that is not the owner, before servers get new weights while they generate: answers wait for `adopt`."""
        self._do(self._labels.hold())

    def adopt(
        self, version: int, label: str, lost: Sequence[str] = (), labels: Mapping[str, int] | None = None
    ) -> None:
        """On a process that is not the owner: the servers hold this version now, but for those that the owner lost (a reason for
        each server, empty where it is not lost). `labels`: the owner's."""
        self.version, self.label, self._unusable = version, label, ""
        self._do(self._adopt(version, lost, {label: version} if labels is None else labels))

    async def _adopt(self, version: int, lost: Sequence[str], labels: Mapping[str, int]) -> None:
        await self._unwatch_all()
        if not self._batches:
            self._labels.forget()
        for label, of in labels.items():
            self._labels.prove(of, label)
        self._labels.settle()
        for number, member in enumerate(self.members):
            member.renew()
            if number < len(lost) and lost[number]:
                member.lose(lost[number])
        await self._watch_all()

    async def _load_all(self, new: Weights, label: str, version: int, probe: Probe | None) -> list[str]:
        """Bring every server to new weights, side by side. Returns what went wrong, and marks who is lost."""
        await self._unwatch_all()  # whatever a watcher was doing was for the old weights
        await self._labels.hold()
        if not self._batches:
            self._labels.forget()
        old, self._weights, self._probe = self._weights, new, probe
        for member in self.members:
            member.renew()
        try:
            told = await asyncio.gather(*(self._bring(member, label, version, update=True) for member in self.members))
        finally:
            self._labels.settle()
            if old is not None:
                old.remove()  # not before: a server that was starting anew reads it
        for member, problem in zip(self.members, told, strict=True):
            if problem:
                member.lose(problem)
        return [problem for problem in told if problem]

    async def _bring(self, member: Member, label: str, version: int, *, update: bool = False) -> str:
        """A whole good sync, a second try, and at last a restart, where the server is ours. Returns what went wrong at last; empty
        if the server holds the weights."""
        process, weights, pulse = member.process, self._weights, self._pulses[member.url]
        assert weights is not None
        tries = 3 if process is not None else 2
        said = ""
        for number in range(tries):
            try:
                if process is not None:
                    if not process.running or pulse.why or number == tries - 1:
                        await asyncio.to_thread(process.start, weights.folder)
                        pulse.forget()  # whoever goes on with this server while it starts must not start it again
                        self.restarts += process.starts > 1
                    await self._until_it_answers(member)
                pulse.forget()
                keep = self.settings.in_flight_updates and update and number == 0
                server, limit = self._server(member), self.settings.sync_timeout_s
                send = partial(self.transfer.send, server, weights, limit)
                load = server.load(send, label, self._probe, limit, keep=keep)
                self._labels.prove(version, await pulse.while_it_lives(load), label)
                return ""
            except (httpx.HTTPError, BadAnswer) as error:
                said = f"{member.url}: {words(error)}"
                logger.warning("sync of %s failed (try %d of %d): %s", member.url, number + 1, tries, words(error))
        if process is not None:
            if (words_of_it := process.last_words()) not in said:
                said += f" ({words_of_it})"
            await asyncio.to_thread(process.stop)  # nobody may get samples of whatever it holds
        return said

    async def _until_it_answers(self, member: Member) -> None:
        """Wait for a server of ours that runs. Raises BadAnswer if it ends, does not answer in the time since its start, or is
        found dead after it had answered once."""
        process, pulse = member.process, self._pulses[member.url]
        assert process is not None
        while process.prepared and process.running:
            if why := await pulse.look():
                raise BadAnswer(why)
            if not pulse.misses:
                return
            await asyncio.sleep(pulse.pause_s)
        server, wait = self._server(member), self.settings.poll_s
        while not await server.healthy():
            if not process.running:
                raise BadAnswer(f"it ended while it started; {process.last_words()}")
            if time.monotonic() > process.started_at + self.settings.startup_s:
                raise BadAnswer(
                    f"it did not answer within {self.settings.startup_s:g} s (rollout.server.startup_minutes); "
                    f"{process.last_words()}"
                )
            await asyncio.sleep(wait)
            wait = min(2 * wait, self.settings.patience_s)
        if not process.running:
            raise BadAnswer(
                f"it ended while it started, and another server answers at its port; {process.last_words()}"
            )
        if not process.prepared:
            await self.transfer.prepare(server, self.settings.sync_timeout_s)
            process.prepared = True

    # Watchers

    async def _watch_all(self) -> None:
        self._watchers = [asyncio.create_task(self._watch(n, member)) for n, member in enumerate(self.members)]
        if self.owner and self.board is not None:
            self._watchers.append(asyncio.create_task(self._listen(self.board)))
        for task in self._watchers:
            task.add_done_callback(self._watcher_ended)

    def _watcher_ended(self, task: asyncio.Task[None]) -> None:
        """An error of this program must not leave anybody waiting for a server that nobody looks after."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        logger.error("a watcher of rollout servers failed", exc_info=error)
        for member in self.members:
            member.lose(f"{member.url}: its watcher failed: {error!r}")

    async def _unwatch_all(self) -> None:
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers = []

    async def _watch(self, number: int, member: Member) -> None:
        """Look after one server: while it is well, at the process and the health of one that is ours."""
        process, pulse = member.process, self._pulses[member.url]
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if process is None else self.settings.poll_s):
                    await member.trouble.wait()
            if process is not None and not member.lost and (not process.running or await pulse.look_when_due()):
                member.failed(member.life, blame=False)
            if member.trouble.is_set():
                await self._mend(number, member)

    async def _mend(self, number: int, member: Member) -> None:
        """Until the member may be asked again, or is lost."""
        wait, complained = self.settings.poll_s, False
        while member.trouble.is_set():
            if self.owner:
                await self._mend_ours(number, member)
            else:
                complained = await self._mend_theirs(number, member, complained)
            if member.trouble.is_set():
                await asyncio.sleep(wait)
                wait = min(2 * wait, self.settings.patience_s)

    async def _mend_ours(self, number: int, member: Member) -> None:
        """By the owner: restart it, give it the weights again, or see that it holds them. One look."""
        process, bad = member.process, member.strikes >= STRIKES
        if process is None and bad:
            why = f"{member.url}: {STRIKES} bad answers in a row"
            logger.warning("rollout server is left out until the next update: %s", why)
            return await self._lose(number, member, why)
        dead = "" if process is None or not process.running or bad else await self._pulses[member.url].look()
        if process is None or (process.running and not bad and not dead):
            held = await self._held(member)
            if held == self.label:
                return member.admit(trial=member.strikes > 0)
            if not held:
                return None  # not there just now
        logger.warning("rollout server %s is brought back with the present weights%s", member.url, dead and f": {dead}")
        if process is not None and (bad or dead):  # what was asked of it breaks, and is asked elsewhere
            await asyncio.to_thread(process.stop)
        self.transfer.forget(member.url)  # somebody else's server may have been started anew
        problem = await self._bring(member, self.label, self.version)
        if problem:
            logger.error("rollout server %s is lost: %s", member.url, problem)
            return await self._lose(number, member, problem)
        member.mended(trial=bad)
        return await self._tell(number, member)

    async def _mend_theirs(self, number: int, member: Member, complained: bool) -> bool:
        """By a rank that only asks: look whether it holds the weights, and leave the rest to the owner. Returns whether the owner
        has heard of bad answers."""
        if self.board is not None:
            news = await asyncio.to_thread(self.board.news, self.label, number)
            if news.lost:
                member.lose(news.lost)
                return complained
            if news.mends > member.mends:
                member.strikes, member.mends, complained = 0, news.mends, False
            if member.strikes >= STRIKES:  # it is not asked until the owner has mended it
                if not complained:
                    why = f"{STRIKES} bad answers in a row to another rank"
                    await asyncio.to_thread(self.board.complain, self.label, number, member.mends, why)
                return True
        if await self._held(member) == self.label:
            member.admit(trial=member.strikes > 0)
        return complained

    async def _held(self, member: Member) -> str:
        """The label of what a server holds; empty where it does not say."""
        try:
            return await self._server(member).label()
        except (httpx.HTTPError, BadAnswer):
            return ""

    async def _lose(self, number: int, member: Member, why: str) -> None:
        member.lose(why)
        await self._tell(number, member)

    async def _tell(self, number: int, member: Member) -> None:
        if self.board is not None:
            await asyncio.to_thread(self.board.tell, self.label, number, News(member.mends, member.lost))

    async def _listen(self, board: Board) -> None:
        """For the owner: other ranks' complaints about servers that are well as far as this rank has seen."""
        while True:
            await asyncio.sleep(4 * self.settings.poll_s)
            for number, member in enumerate(self.members):
                if member.lost or member.trouble.is_set():
                    continue
                mends = member.mends
                why = await asyncio.to_thread(board.complaint, self.label, number, mends)
                if why and mends == member.mends and not member.lost and not member.trouble.is_set():
                    logger.warning("rollout server %s: %s", member.url, why)
                    member.strikes = STRIKES
                    member.failed(member.life, blame=True)

    # Generation

    def generate(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: SamplingParams, group_size: int = 1
    ) -> Rollouts:
        """See `rollout.protocol.Engine.generate`. Samples are not reproducible: servers get no seed.

        Raises also ValueError for a nucleus: servers do not say what a token's probability is without it.
        """
        return self.begin(prompts, uids, sampling, group_size).result()

    def begin(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: SamplingParams, group_size: int = 1
    ) -> Begun:
        """Ask for what `generate` returns, and go on. Batches are generated one after another, in the order in which they were
        asked for. Whoever gives other weights waits for them, or cancels them, before; not so with `in_flight_updates`."""
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("a prompt has 0 tokens; at least 1 is needed to predict from")
        if 0 < sampling.top_p < 1 and sampling.temperature > 0:
            raise ValueError(f"top_p={sampling.top_p}: servers do not say a token's probability without the nucleus")
        if self._closed:
            raise RolloutError("the servers are closed: make a new pool")
        if self.version < 0:
            raise SyncError(f"the servers have no usable weights: {self._unusable}")
        several = self.settings.in_flight_updates
        asked = prompts, sampling, group_size
        begun = Begun(*asked, pad_id=self.pad_id, version=self.version, several=several, routes=self.routes)
        begun.future = self._start(self._generate(prompts, sampling, group_size, begun))
        return begun

    async def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, group_size: int, begun: Begun
    ) -> list[list[Sample]]:
        """One batch, when the batches before it have come to their end."""
        task = asyncio.current_task()
        assert task is not None
        self._batches.add(task)
        task.add_done_callback(self._batches.discard)
        async with self._turn:
            begun.started_at = time.monotonic()
            try:
                return await self._batch(prompts, sampling, group_size) if prompts else []
            finally:
                begun.ended_at = time.monotonic()

    async def _batch(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, group_size: int
    ) -> list[list[Sample]]:
        await self._labels.settled()
        labels = self._labels.accepted(self.label)
        asked = Asked(self.ends, self.vocabulary, sampling.max_new_tokens, labels, self.routes)

        async def ask(member: Member, prompt: Sequence[int]) -> list[Sample]:
            return await self._server(member).generate(prompt, sampling, group_size, asked, self._labels.settled)

        settings = self.settings
        batch = Batch(prompts, self.members, ask, attempts=settings.attempts, in_flight=settings.in_flight)
        return await batch.run(settings.batch_timeout_s)

    # Life

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it in the pool's event loop, and wait for it. Where this thread is interrupted, so is the work."""
        future = self._start(work)
        try:
            return future.result()
        finally:
            future.cancel()  # does nothing to what is done

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run it in the pool's event loop."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-pool", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _server(self, member: Member) -> Server:
        if self._http is None:
            timeout = httpx.Timeout(self.settings.request_timeout_s, connect=10.0)
            secure = any(member.url.startswith("https:") for member in self.members)  # reading certificates takes 50 ms
            transport = OneEach(keep_s=KEEP_ALIVE_S, verify=secure)
            self._http = httpx.AsyncClient(transport=transport, timeout=timeout, trust_env=False)
        return Server(member.url, self._http)

    def check(self) -> None:
        """Look whether all servers that are somebody else's answer, before a run starts. Raises RolloutError naming them."""
        others = [self._server(member) for member in self.members if member.process is None]
        problems = self._do(unusable(others, self.transfer.prepare))
        if problems:
            raise RolloutError("; ".join(problems))

    def health(self) -> Health:
        """See `rollout.protocol.Engine.health`. Ready while at least one server answers."""
        if self._closed or self.version < 0:
            return Health(False, -1, "closed" if self._closed else self._unusable)
        answering = self._do(all_healthy([self._server(member) for member in self.members]))
        there = f"{sum(answering)} of {len(self.members)} servers answer"
        lost = [f"{member.url} is lost: {member.lost}" for member in self.members if member.lost]
        return Health(any(answering), self.version, "; ".join([there, *lost]))

    def close(self) -> None:
        """End the servers that are ours, and delete the weights. While an exception is handled, the run counts as failed."""
        self._closed = True
        self._well = sys.exc_info()[0] is None
        if self._loop is not None and self._thread is not None:
            self._do(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(30)
            self._loop = None
        for member in self.members:
            if member.process is not None:
                member.process.close(well=self._well)
        if self._weights is not None:
            self._weights.remove()
            self._weights = None
            with contextlib.suppress(OSError):  # not empty, or not there
                self.folder.rmdir()

    async def _end(self) -> None:
        """Give up what is asked for, and end servers side by side, after whatever a watcher was starting."""
        batches = list(self._batches)
        for task in batches:
            task.cancel()
        await asyncio.gather(*batches, return_exceptions=True)
        await self._unwatch_all()
        await self.transfer.close()
        processes = [member.process for member in self.members if member.process is not None]
        await asyncio.gather(*(asyncio.to_thread(process.close, well=self._well) for process in processes))
        if self._http is not None:
            await self._http.aclose()
            self._http = None
        await asyncio.get_running_loop().shutdown_default_executor()

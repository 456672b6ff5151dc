"""A pool of worker processes that grade answers, each answer within a time and a memory limit.

The time limit is on the clock for a worker that waits, and on its processor time for one that computes, so that a busy
machine makes no answer wrong.

An answer that hangs, crashes its worker or allocates without bound costs itself only: its worker is replaced (a fork of
a process that has imported everything, milliseconds), and what else the worker had goes to others. A worker that dies
for another reason loses nothing: an answer counts as crashing only when it was under work in two workers that died.

Input is taken as workers become free, and results are handed on as they come: neither piles up.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_vp2o.config.reward import RewardConfig
from megatron_vp2o.cores import local_size, share_of_cores
from megatron_vp2o.errors import RewardError
from megatron_vp2o.rewards.channel import Messages, framed
from megatron_vp2o.rewards.grade import CRASH, TIME, Grade, wrong
from megatron_vp2o.rewards.worker import FORK, KILL, REQUEST

START_S = 180.0
"""Most seconds for importing libraries or a user's module, on a busy machine."""
CHUNK_S = 0.2
"""Seconds of work that a worker is given at once: few messages for quick answers, an even load for slow ones."""
MOST_IN_CHUNK = 64
ATTEMPTS = 2
"""Workers that must die over an answer before the answer is held responsible."""
MOST_FAILED_STARTS = 3
CLOSING_S = 3.0
"""Seconds that closing a pool waits for another thread that is grading with it."""
PATIENCE = 20.0
"""Times its limit that an answer may take on the clock while its worker has not had that much processor time."""
_BOOT = """\
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from megatron_vp2o.rewards.worker import main
main(int(sys.argv[1]))
"""


class Item(NamedTuple):
    """One answer for one reward."""

    number: int  # the caller's; comes back with the grade
    reward: str  # name of the reward
    prompt: str
    response: str
    row: Mapping[str, Any]


@dataclass
class Counts:
    """What happened in a pool so far."""

    graded: int = 0
    timed_out: int = 0
    crashed: int = 0
    workers_lost: int = 0


@dataclass
class _Task:
    item: Item
    lost: int = 0  # workers that died over it
    alone: bool = False  # of a batch that failed: not to be put into one again


@dataclass
class _Worker:
    connection: socket.socket
    deadline: float
    pid: int | None = None
    ready: bool = False
    tasks: deque[_Task] = field(default_factory=deque)  # not yet answered, in the order of the chunk
    outgoing: bytes = b""
    incoming: Messages = field(default_factory=Messages)
    closing: bool = False  # said that it ends after this answer
    began: float = 0.0  # when it was given its chunk, or last answered
    cpu: float = 0.0  # seconds of processor time that it had used by then


class WorkerPool:
    """See the module. One caller at a time; further ones, in other threads, wait. For the process that made it only."""

    def __init__(self, config: RewardConfig, time_limits: Mapping[str, float], batches: Mapping[str, int]) -> None:
        """Start it and wait until the rewards are there.

        Args:
            time_limits: seconds for one answer, or for one call of those that are called in batches, by name.
            batches: most answers in one call, for the rewards that are called in batches.

        Raises:
            RewardError: a reward cannot be used here; says why.
        """
        self.counts = Counts()
        self._config, self._time_limits, self._batches = config, dict(time_limits), dict(batches)
        self._size = config.workers or default_workers()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._waiting: deque[_Task] = deque()
        self._seconds: dict[str, float] = {}  # mean of an answer, by reward
        self._failed_starts = 0
        self._closed = False
        self._nursery: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._now = time.monotonic()
        try:
            self._start_nursery()
            self._start_workers()
            self._until(lambda: any(worker.ready for worker in self._workers))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def worker_pids(self) -> list[int]:
        """Process numbers of the workers."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def grade(self, items: Iterable[Item]) -> Generator[tuple[int, Grade], None, None]:
        """Grades as they come, in any order: (the item's number, its grade).

        Raises:
            RewardError: a row that a reward cannot work with, or a user's function that raises; names the row.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("a pool of rewards belongs to the process that made it; make another one here")
        with self._lock:
            source = iter(items)
            finished = False
            try:
                while True:
                    while not finished and len(self._waiting) < self._free() * MOST_IN_CHUNK:
                        item = next(source, None)
                        finished = item is None
                        if item is not None:
                            self._waiting.append(_Task(item))
                    self._hand_out()
                    if finished and not self._waiting and not any(worker.tasks for worker in self._workers):
                        return
                    yield from self._turn()
            finally:
                self._abandon()

    def close(self) -> None:
        """End all processes; a call of `grade` in another thread ends with an error. Again does nothing."""
        self._closed = True
        grading = not self._lock.acquire(timeout=CLOSING_S)  # the other thread looks up within a second
        try:
            self._end()
        finally:
            if not grading:
                self._lock.release()

    # What follows runs in the caller's thread, with the lock held.

    def _end(self) -> None:
        for worker in list(self._workers):
            self._forget(worker)
        if self._control is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._control)
            self._control.close()
            self._control = None
        if self._nursery is not None:
            try:
                self._nursery.wait(5.0)
            except subprocess.TimeoutExpired:
                self._nursery.kill()
                self._nursery.wait()
            self._nursery = None
        self._selector.close()

    def _start_nursery(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            path = json.dumps([os.path.abspath(folder) for folder in sys.path if isinstance(folder, str)])
            self._nursery = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )
        self._control = ours
        ours.sendall(framed(pickle.dumps((self._config, list(self._time_limits), self._pid))))
        messages, deadline = Messages(), time.monotonic() + START_S
        while True:
            ours.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                data = ours.recv(65536)
            except TimeoutError:
                raise RewardError(f"the libraries of the rewards were not imported within {START_S:.0f} s") from None
            if not data:
                status = self._nursery.wait()
                raise RewardError(
                    f"the process that grades answers ended while it started (status {status}); its message is above"
                )
            for message in messages.feed(data):
                if "fatal" in message:
                    raise RewardError(message["fatal"])
                ours.settimeout(None)
                self._selector.register(ours, selectors.EVENT_READ, None)
                return

    def _start_workers(self) -> None:
        while len(self._workers) < self._size:
            assert self._control is not None
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    socket.send_fds(self._control, [REQUEST.pack(FORK, 0)], [theirs.fileno()])
                except OSError:
                    ours.close()
                    self._restart_nursery()
                    continue
            ours.setblocking(False)
            worker = _Worker(ours, time.monotonic() + START_S)
            self._workers.append(worker)
            self._selector.register(ours, selectors.EVENT_READ, worker)

    def _restart_nursery(self) -> None:
        """The process that forks workers was killed, and its workers with it."""
        self._count_failed_start()
        assert self._control is not None and self._nursery is not None
        self._selector.unregister(self._control)
        self._control.close()
        self._nursery.kill()
        self._nursery.wait()
        for worker in list(self._workers):
            self._lose(worker)
        self._start_nursery()

    def _count_failed_start(self) -> None:
        self._failed_starts += 1
        if self._failed_starts > MOST_FAILED_STARTS:
            raise RewardError(
                f"workers of the rewards ended {self._failed_starts} times in a row before they graded anything: raise "
                f"reward.memory_mib={self._config.memory_mib} (null: no limit), or see what ends them in the system's log"
            )

    def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            for _ in self._turn():
                raise RuntimeError("an answer that nobody asked for")

    def _free(self) -> int:
        return sum(worker.ready and not worker.tasks and not worker.closing for worker in self._workers)

    def _hand_out(self) -> None:
        for worker in self._workers:
            if self._waiting and worker.ready and not worker.tasks and not worker.closing:
                self._give(worker, self._next_chunk())

    def _next_chunk(self) -> list[_Task]:
        """The next tasks of one reward, as many as keep a worker busy for a moment."""
        first = self._waiting.popleft()
        name = first.item.reward
        size = self._batches.get(name) or int(CHUNK_S / self._seconds.get(name, CHUNK_S / 4))
        size = max(1, min(size, MOST_IN_CHUNK, -(-len(self._waiting) // self._size)))
        chunk = [first]
        while (
            len(chunk) < size
            and not (first.alone or first.lost)
            and self._waiting
            and self._waiting[0].item.reward == name
            and not (self._waiting[0].alone or self._waiting[0].lost)
        ):
            chunk.append(self._waiting.popleft())
        return chunk

    def _give(self, worker: _Worker, chunk: list[_Task]) -> None:
        name = chunk[0].item.reward
        body = [(task.item.number, task.item.prompt, task.item.response, dict(task.item.row)) for task in chunk]
        worker.tasks = deque(chunk)
        worker.outgoing = framed(pickle.dumps((name, body)))
        worker.began = time.monotonic()
        worker.deadline = worker.began + self._time_limits[name]
        self._flush(worker)

    def _flush(self, worker: _Worker) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):  # a worker that is gone is seen when it is read
            worker.outgoing = worker.outgoing[worker.connection.send(worker.outgoing) :]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outgoing else 0)
        self._selector.modify(worker.connection, events, worker)

    def _turn(self) -> Iterator[tuple[int, Grade]]:
        """Wait for something to happen, and deal with it."""
        if self._closed:
            raise RewardError("the pool of rewards is closed")
        away = time.monotonic() - self._now
        if away > 1.0:  # the caller was elsewhere: that time is not the workers'
            for worker in self._workers:
                worker.deadline += away
        soonest = min((w.deadline for w in self._workers if w.tasks or not w.ready), default=time.monotonic() + 1.0)
        events = self._selector.select(max(min(soonest - time.monotonic(), 1.0), 0.0))
        self._now = time.monotonic()
        for key, mask in events:
            source: _Worker | None = key.data
            if source is None:
                self._restart_nursery()
                break
            if source not in self._workers:
                continue
            if mask & selectors.EVENT_WRITE:
                self._flush(source)
            if mask & selectors.EVENT_READ and source in self._workers:
                yield from self._read(source)
        heard = {id(key.data) for key, _ in events}
        for worker in list(self._workers):
            if (worker.tasks or not worker.ready) and id(worker) not in heard and worker.deadline < self._now:
                yield from self._time_out(worker)
        self._start_workers()
        self._now = time.monotonic()

    def _read(self, worker: _Worker) -> Iterator[tuple[int, Grade]]:
        try:
            data = worker.connection.recv(1 << 18)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            yield from self._crash(worker)
            return
        for message in worker.incoming.feed(data):
            yield from self._take(worker, message)

    def _take(self, worker: _Worker, message: dict[str, Any]) -> Iterator[tuple[int, Grade]]:
        if "fatal" in message:
            raise RewardError(message["fatal"])
        if "pid" in message:
            worker.pid = message["pid"]
            return
        worker.cpu = message["cpu"]
        if "ready" in message:
            worker.ready = True
            return
        worker.closing = worker.closing or bool(message.get("last"))
        if message.get("split"):
            self._split(worker)
            return
        task = worker.tasks.popleft()
        item = task.item
        if item.number != message["number"]:
            raise RuntimeError(f"a worker answered {message['number']}, and {item.number} was next")
        if "error" in message:
            raise RewardError(f"reward {item.reward}: {describe_row(item)}: {message['error']}")
        now = time.monotonic()
        if item.reward not in self._batches:
            seconds = max(now - worker.began, 1e-5)
            self._seconds[item.reward] = 0.9 * self._seconds.get(item.reward, seconds) + 0.1 * seconds
            worker.deadline = now + self._time_limits[item.reward]
        worker.began = now
        self.counts.graded += 1
        self._failed_starts = 0
        yield item.number, grade_of(message)

    def _time_out(self, worker: _Worker) -> Iterator[tuple[int, Grade]]:
        """The first unanswered task took too long; of a batch nobody knows which it was."""
        if not worker.ready:
            self._lose(worker)
            self._count_failed_start()
            return
        if (more := self._still_due(worker)) > 0:
            worker.deadline = self._now + more
            return
        if len(worker.tasks) > 1 and worker.tasks[0].item.reward in self._batches:
            self._split(worker)
            self._lose(worker)
            return
        task = worker.tasks.popleft()
        self._lose(worker)
        self.counts.timed_out += 1
        self.counts.graded += 1
        yield task.item.number, wrong(TIME)

    def _still_due(self, worker: _Worker) -> float:
        """Seconds that a late worker is still due, because it wants to run and others had the processor; 0 if none."""
        limit = self._time_limits[worker.tasks[0].item.reward]
        state, seconds = process_state(worker.pid)
        if select.select([worker.connection], [], [], 0)[0]:
            return 0.05  # its answer came after this turn had looked
        used = seconds - worker.cpu
        if state not in "RD" or used >= limit or self._now - worker.began > PATIENCE * limit:
            return 0.0
        return max(limit - used, 0.05)

    def _crash(self, worker: _Worker) -> Iterator[tuple[int, Grade]]:
        """A worker died: after its last answer, or over its first unanswered task, or because somebody killed it."""
        if worker.closing or (worker.ready and not worker.tasks):
            self._lose(worker)
            return
        if not worker.ready:
            self._lose(worker)
            self._count_failed_start()
            return
        if len(worker.tasks) > 1 and worker.tasks[0].item.reward in self._batches:
            self._split(worker)
            self._lose(worker)
            return
        task = worker.tasks[0]
        task.lost += 1
        if task.lost >= ATTEMPTS:
            worker.tasks.popleft()
        self._lose(worker)
        if task.lost >= ATTEMPTS:
            self.counts.crashed += 1
            self.counts.graded += 1
            yield task.item.number, wrong(CRASH)

    def _split(self, worker: _Worker) -> None:
        """Put a batch's tasks back, to be graded one by one."""
        for task in worker.tasks:
            task.alone = True
        self._waiting.extendleft(reversed(worker.tasks))
        worker.tasks.clear()

    def _lose(self, worker: _Worker) -> None:
        """End a worker; what it had goes to others."""
        self.counts.workers_lost += 1
        self._waiting.extendleft(reversed(worker.tasks))
        worker.tasks.clear()
        self._forget(worker)

    def _forget(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.connection)
        worker.connection.close()
        if worker.pid is not None and self._control is not None:
            with contextlib.suppress(OSError):
                self._control.sendall(REQUEST.pack(KILL, worker.pid))

    def _abandon(self) -> None:
        """After the last answer, or when a caller stops before it: nothing of this call is left for the next one."""
        self._waiting.clear()
        for worker in [worker for worker in self._workers if worker.tasks]:
            worker.tasks.clear()
            self._lose(worker)


def default_workers() -> int:
    """Worker processes where reward.workers is null: the cores that the job may use here among its processes, at most 8."""
    return min(share_of_cores(local_size()), 8)


def process_state(pid: int | None) -> tuple[str, float]:
    """State (R: runs or wants to, S: sleeps, ...) and seconds of processor time of a process; ("X", 0) if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "X", 0.0
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def describe_row(item: Item) -> str:
    """The row as a person finds it again."""
    where = item.row.get("__source__")
    return f"{where or f'answer {item.number} of this batch'} (prompt {item.prompt[-60:]!r})"


def grade_of(message: Mapping[str, Any]) -> Grade:
    return Grade(
        message["reward"], message["reason"], _tuples(message["canonical"]), message["correct"], message["parts"]
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

"""One rank's failure ends all ranks, within seconds and with that rank's reason.

A rank that stops between two collectives leaves the others waiting in the next one, for as long as a collective may take, and
what they say at last is about the connection and not about the cause. So ranks are on a line (`hotline.py`) that is no process
group. A rank with an exception tells the others why, and ends its process without waiting for anyone: no barrier, no group is
closed. Who hears of it has GRACE_S to come to an end of its own, because its own error may say more; then the listening thread
ends the process, wherever its main thread is.

    with failure.ends_all_ranks():          # outermost: prints, tells, ends the process
        store = failure.join(minutes)       # first of all that may fail
        ...
        with failure.tells_all_ranks():     # inside of what may take its time to close
            ...
        failure.leave()

In a world of one process none of this does anything: exceptions go their way.
"""

from __future__ import annotations

import enum
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from megatron_vp2o.errors import StartError, UserError
from megatron_vp2o.parallel.hotline import Hub, Message, Spoke, call, publish

GRACE_S = 2.0
"""From hearing of another rank's failure to the end of this process, if it does not come to an end before."""
CLOSING_S = 5.0
"""From this rank's own failure to the end of its process, whatever is still being closed."""
_PATIENCE_S = 1.5  # that a broken connection waits for its reason
_STATUS, _INTERRUPTED = 1, 130
_LONGEST = 20_000  # characters of a traceback that travel
_KEY = "megatron_vp2o/hotline"
_BROKEN = ("/gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer")  # in messages of collectives


class Kind(enum.Enum):
    """What ended a rank."""

    error = "error"
    refused = "refused"  # a UserError
    connection = "connection"  # a collective failed: as a rule because another rank did
    gone = "gone"  # its process ended without a word


@dataclass(frozen=True)
class Note:
    """A rank's failure, as it is told to the others."""

    rank: int
    kind: str
    summary: str
    text: str
    status: int
    host: str


class _Watch:
    """What this rank knows of failures."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.line: Hub | Spoke | None = None
        self.own: Note | None = None
        self._notes: list[Note] = []
        self._news = threading.Condition()
        self._speaking = threading.Lock()
        self._spoken = False

    def heard(self, rank: int, message: Message | None) -> None:
        """In the listening thread: another rank failed."""
        note = _gone(rank) if message is None else Note(**message)
        with self._news:
            self._notes.append(note)
            first = len(self._notes) == 1
            self._news.notify_all()
        if first:
            _later(GRACE_S, self._give_up)

    def cause(self, within: float, *, rank: int | None = None) -> Note | None:
        """The first failure that another rank (or `rank`) came to by itself; waits for it."""

        def found() -> Note | None:
            wanted = (n for n in self._notes if n.kind != Kind.connection.value and rank in (None, n.rank))
            return next(wanted, None)

        with self._news:
            return self._news.wait_for(found, within)

    def failed(self) -> Note | None:
        """The best that is known now of why others failed."""
        return self.cause(0.0) or next(iter(self._notes), None)

    def tell(self, error: BaseException) -> None:
        """Say on this rank's output and to all others what happened here; a broken connection is not news yet."""
        if self.own is not None:
            return
        self.own = note = _note(self.rank, error)
        if note.kind == Kind.connection.value:
            _later(CLOSING_S, self._end_alone)
            return
        _record(error)
        if note.kind == Kind.error.value or self.rank == 0:
            self._print(note.text)
        self._say(note)
        _later(CLOSING_S, lambda: _exit(note.status))

    def end(self, error: BaseException) -> NoReturn:
        """End this process because of an exception."""
        self.tell(error)
        own = self.own
        assert own is not None
        if own.kind == Kind.connection.value:
            cause = self.cause(_PATIENCE_S)
            if cause is not None:
                self._end_for(cause)
            _record(error)
            self._end_alone()
        elif own.kind == Kind.refused.value and self.rank != 0:
            first = self.cause(_PATIENCE_S / 2, rank=0)
            if first is None or first.text != own.text:
                self._print(_as_of(own))
        _exit(own.status)

    def _give_up(self) -> None:
        """The main thread has not come to an end."""
        note = self.failed()
        if note is not None and (self.own is None or self.own.kind == Kind.connection.value):
            self._end_for(note)

    def _end_alone(self) -> NoReturn:
        """The connection broke, and nobody said why."""
        own = self.own
        assert own is not None
        self._print(own.text)
        self._say(own)
        _exit(own.status)

    def _end_for(self, cause: Note) -> NoReturn:
        """End this process because of another rank's failure."""
        if cause.kind == Kind.refused.value:
            self._print(_as_of(cause))
        else:
            elsewhere = self.rank == 0 and cause.host != socket.gethostname() and cause.kind != Kind.gone.value
            more = f"\n{cause.text}" if elsewhere else ""
            self._print(f"rank {self.rank} ends, because rank {cause.rank} failed: {cause.summary}{more}")
        _exit(cause.status)

    def _say(self, note: Note) -> None:
        if self.line is not None:
            self.line.say(asdict(note))

    def _print(self, text: str) -> None:
        """Once: the main thread and the listening one may come to their end at the same time."""
        with self._speaking:
            if self._spoken:
                return
            self._spoken = True
            # Not through sys.stderr: the main thread may hold its lock.
            os.write(2, (text.rstrip() + "\n").encode(errors="replace"))


_watch: _Watch | None = None
_joined = 0
_store: dist.Store | None = None


def join(startup: timedelta) -> dist.Store | None:
    """Get on the line with all ranks that the environment speaks of; call it before anything that may fail.

    Args:
        startup: how long ranks may wait for each other.

    Returns:
        The store that they met in, for init_process_group; None in a world of one process. The second call returns the first's.

    Raises:
        StartError: ranks are missing when the time is up.
    """
    global _store, _joined
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or _store is not None:
        return _store
    watch = _watching(rank, size)
    deadline = time.monotonic() + startup.total_seconds()
    store = _meet(rank, size, startup)
    _joined += 1
    key = f"{_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_joined}"
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        watch.line = Hub(host, size, watch.heard)
        store.set(key, publish(watch.line))
    else:
        try:
            store.set_timeout(timedelta(seconds=max(1.0, deadline - time.monotonic())))
            address = store.get(key).decode()
            watch.line = call(host, address, rank, watch.heard, max(1.0, deadline - time.monotonic()))
        except (dist.DistError, OSError) as error:
            raise _not_there([0], size, startup) from error
    # Rank 0 knows who is missing: the others leave it time to say so.
    extra = 0.0 if rank == 0 else GRACE_S + 1.0
    if not watch.line.wait(max(0.0, deadline - time.monotonic()) + extra):
        raise _not_there(watch.line.missing() if isinstance(watch.line, Hub) else None, size, startup)
    _store = store
    return store


def leave() -> None:
    """The work is done, on all ranks: call it after a barrier. What this process does from now on concerns nobody else."""
    global _watch, _store
    if _watch is not None and _watch.line is not None:
        _watch.line.leave()
    _watch = _store = None


def tell(error: BaseException) -> None:
    """From any thread: all ranks hear of a failure that this rank's main thread does not know of yet, and end. Does nothing in a
    world of one process, where the main thread comes to know of it by itself."""
    if _watch is not None:
        _watch.tell(error)
        if _watch.own is not None and _watch.own.kind == Kind.refused.value and _watch.rank != 0:
            _watch._print(_as_of(_watch.own))  # the main thread will not come to it


class ends_all_ranks(AbstractContextManager[None]):
    """An exception that leaves the body ends this process and those of all ranks; in a world of one it goes on its way.

    Its exit status is that of a UserError (2 or 3), 130 for an interruption, else 1, on all ranks.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and _watch is not None:
            _watch.end(error)


class tells_all_ranks(AbstractContextManager[None]):
    """All ranks hear at once of an exception that leaves the body, before what is around the body is closed."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and _watch is not None:
            _watch.tell(error)


# --- the start --------------------------------------------------------------------------------------------------------


def _watching(rank: int, size: int) -> _Watch:
    global _watch
    _watch = _Watch(rank, size)
    return _watch


def _meet(rank: int, size: int, startup: timedelta) -> dist.Store:
    """The store of this run: torchrun's agent has one, otherwise rank 0 does."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(
            host,
            port,
            size,
            is_master=rank == 0 and not agent,
            timeout=startup,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        if rank == 0 and not agent:
            raise  # the port is taken: the message says which
        raise _not_there([0], size, startup) from error


def _not_there(missing: list[int] | None, size: int, startup: timedelta) -> StartError:
    who = "some ranks" if missing is None else ("rank " if len(missing) == 1 else "ranks ") + _listed(missing)
    minutes = startup.total_seconds() / 60
    return StartError(
        f"{who} of {size} did not start within parallel.startup_minutes={minutes:g}: look at their own output for the reason; "
        "raise the setting where processes start further apart than that"
    )


def _listed(ranks: list[int], most: int = 8) -> str:
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return ", ".join(map(str, ranks[:most])) + more


# --- notes ------------------------------------------------------------------------------------------------------------


def _note(rank: int, error: BaseException) -> Note:
    host, summary = socket.gethostname(), f"{type(error).__name__}: {error}"
    tracebacks = os.environ.get("HYDRA_FULL_ERROR") == "1"
    if isinstance(error, UserError) and not tracebacks:
        text = "\n".join(f"error: {line}" for line in str(error).splitlines())
        return Note(rank, Kind.refused.value, str(error), text, error.exit_status, host)
    kind = Kind.connection if _is_connection(error) else Kind.error
    whole = "".join(traceback.format_exception(error))
    cut = whole if len(whole) <= _LONGEST else f"[...]\n{whole[-_LONGEST:]}"
    status = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _STATUS
    head = f"rank {rank} failed (process {os.getpid()} on {host}):"
    return Note(rank, kind.value, summary.splitlines()[0][:500], f"{head}\n{cut}", status, host)


def _gone(rank: int) -> Note:
    summary = "its process ended without a word: killed (for want of memory?), or crashed; its own output may say more"
    return Note(rank, Kind.gone.value, summary, summary, _STATUS, "")


def _as_of(note: Note) -> str:
    """A refusal of one rank, line by line."""
    return "\n".join(f"error: rank {note.rank}: {line}" for line in note.summary.splitlines())


def _is_connection(error: BaseException) -> bool:
    """Whether a collective failed, and not what is between collectives."""
    return any(
        isinstance(cause, dist.DistError)
        or (
            type(cause).__name__ in ("RuntimeError", "CheckpointException")
            and any(text in str(cause) for text in _BROKEN)
        )
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = 0
    while error is not None and seen < 20:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1


def _record(error: BaseException) -> None:
    """For the table with which torchrun ends."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


# --- the end ----------------------------------------------------------------------------------------------------------


def _later(seconds: float, action: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()


def _exit(status: int) -> NoReturn:
    """End the process now: destructors of process groups, and Python's own end, may wait for other ranks."""
    # Another thread may be amid a write to a pipe that nobody empties.
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(1.0)
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()

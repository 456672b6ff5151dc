"""Runs a study's jobs, so many at a time: each once, resumed where it was killed, failures reported and gone past.

A run that is done leaves `done.json` in its folder: its arguments, the commit, the machine, the seconds. What has it is never
run again; what has a checkpoint goes on from there; what failed is tried again when the study is started again.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import runpy
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from megatron_vp2o import atomic
from megatron_vp2o.cores import share_of_cores
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.study.spec import Job

DONE = "done.json"
OUTPUT = "output.txt"
LOCK = ".lock"
TAIL = 12  # lines of a failed run's output that are reported
POLL_S = 0.2
LOCK_WAIT_S = 15.0
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Failure:
    """A run that did not end well."""

    job: Job
    status: int
    tail: str


def is_done(job: Job) -> bool:
    """Whether the run has come to its end, with these arguments.

    Raises:
        ConfigError: it has with others: the study has changed, and its folder holds runs of what it was.
    """
    path = Path(job.folder) / DONE
    if not path.is_file():
        return False
    done = json.loads(path.read_text(encoding="utf-8"))["arguments"]
    if done != list(job.arguments):
        raise ConfigError(
            f"{path} is of a run with other arguments ({shlex.join(done)}; now {shlex.join(job.arguments)}): "
            "choose another folder for the changed study, or remove that run's"
        )
    return True


def run_all(
    jobs: Sequence[Job],
    folder: Path,
    *,
    slots: int,
    prefix: Sequence[str] = (),
    preload: bool = False,
    until: float | None = None,
    known: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> list[Failure]:
    """Bring every job to its end, `slots` at a time. One process works in a study's folder at a time.

    Runs share the cores: each gets `threads=` its share, unless its arguments say how many.

    Args:
        prefix: words before each run's command (`nice`, for instance).
        preload: fork runs from this process with everything imported, in place of new interpreters.
        until: time (`time.time()`) after which no further run is started, and the present ones are asked to save and stop.
        known: names of runs that were brought to their end elsewhere; a warm-up among them is run all the same where another run
            of its task is still to come.

    Returns:
        The runs that failed, and with them those that wait for one that did.

    Raises:
        ConfigError: another process works in the folder, or a run there was of another study.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        _take(lock, folder, say)
        left = [job for job in jobs if not is_done(job)]
        missing = {job.name for job in left if job.name not in known}
        missing |= {job.after for job in left if job.name in missing and job.after is not None}
        waiting = [job for job in left if job.name in missing]
        say(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done")
        threads = share_of_cores(slots)
        start = partial(_Forked, threads) if preload else partial(_start, tuple(prefix), threads)
        return _work(waiting, slots, start, until, say)


def _take(lock: IO[str], folder: Path, say: Callable[[str], None]) -> None:
    """Hold the folder's lock. It is waited for: runs of a study that was killed have it until they are gone, too, moments later.

    Raises:
        ConfigError: somebody else holds it still, after `LOCK_WAIT_S`.
    """
    deadline = time.monotonic() + LOCK_WAIT_S
    told = False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ConfigError(f"{folder}: another process is running this study; wait for it, or stop it") from None
        if not told:
            say(
                f"{folder}: another process is running this study; in case it was just killed, "
                f"waiting {LOCK_WAIT_S:.0f} s for its end"
            )
            told = True
        time.sleep(POLL_S)


def _work(
    waiting: list[Job], slots: int, start: Callable[[Job], _Process], until: float | None, say: Callable[[str], None]
) -> list[Failure]:
    missing = {job.name for job in waiting}
    running: dict[Job, tuple[_Process, float]] = {}
    failures: list[Failure] = []
    stopping = False
    while waiting or running:
        if until is not None and time.time() >= until and not stopping:
            stopping, waiting = True, []
            for process, _ in running.values():
                os.kill(process.pid, signal.SIGTERM)
        failed = {failure.job.name for failure in failures}
        for job in [job for job in waiting if job.after in failed]:
            waiting.remove(job)
            failures.append(Failure(job, -1, f"not started: {job.after} failed"))
        for job in [job for job in waiting if job.after not in missing][: slots - len(running)]:
            waiting.remove(job)
            say(f"{job.name} ...")
            running[job] = start(job), time.time()
        ended = [(job, status) for job, (process, _) in running.items() if (status := process.poll()) is not None]
        for job, status in ended:
            seconds = time.time() - running.pop(job)[1]
            if status == 0:
                _mark(job, seconds)
                missing.discard(job.name)
                say(f"{job.name}: done in {seconds:.0f} s")
            elif stopping:
                say(f"{job.name}: stopped, to go on another time")
            else:
                failures.append(Failure(job, status, _tail(job)))
                say(f"{job.name}: FAILED with status {status}, see {Path(job.folder) / OUTPUT}\n{failures[-1].tail}")
        if not ended:
            time.sleep(POLL_S)
    return failures


class _Process(Protocol):
    pid: int

    def poll(self) -> int | None:
        """Its exit status (negative: the signal that ended it) once it has one."""
        ...


def _with_threads(job: Job, threads: int) -> list[str]:
    """The run's arguments. Those of the job come last, because they hold where they say something of threads themselves."""
    return [f"threads={threads}", *job.arguments]


def _start(prefix: Sequence[str], threads: int, job: Job) -> _Process:
    """A run in a new interpreter. It dies with this process: a killed study leaves no run behind that a second one would meet."""
    command = [*prefix, sys.executable, "-m", "megatron_vp2o.train", *_with_threads(job, threads)]
    with _output(job) as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=partial(_die_with, os.getpid())
        )


class _Forked:
    """A run in a fork of this process, which has everything imported and has touched no tensor."""

    def __init__(self, threads: int, job: Job) -> None:
        _preload()
        sys.stdout.flush()
        parent = os.getpid()
        with _output(job) as output:
            self.pid = os.fork()
            if self.pid == 0:
                _die_with(parent)
                _run_here(_with_threads(job, threads), output.fileno())

    def poll(self) -> int | None:
        """See `_Process`."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


@cache
def _preload() -> None:
    """Import what takes long, once for all runs."""
    from megatron_vp2o.megatron.platform.cpu import enable_cpu

    enable_cpu()
    from megatron_vp2o.megatron.actor import generation  # noqa: F401
    from megatron_vp2o.megatron.checkpoint import checkpointer  # noqa: F401


def _run_here(arguments: Sequence[str], output: int) -> NoReturn:
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["megatron_vp2o.train", *arguments]
    status = 1
    try:
        runpy.run_module("megatron_vp2o.train", run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _output(job: Job) -> IO[bytes]:
    place = Path(job.folder)
    place.mkdir(parents=True, exist_ok=True)
    return (place / OUTPUT).open("ab")


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _mark(job: Job, seconds: float) -> None:
    done = {"arguments": list(job.arguments), "seconds": seconds, **provenance()}
    atomic.write_text(Path(job.folder) / DONE, json.dumps(done, indent=1))


def provenance() -> dict[str, Any]:
    """Commit (with + where files differ from it) and machine."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + changed,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
    }


def _tail(job: Job) -> str:
    return "\n".join((Path(job.folder) / OUTPUT).read_text(errors="replace").splitlines()[-TAIL:])

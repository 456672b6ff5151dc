"""Several processes from one test: each rank runs a function (or a script, or a module), and its results come back.

    results = run_distributed("tests.megatron.training_job:train", 2, tensor_parallel=2)

starts what torchrun would start. Ranks find each other through the usual environment variables; gloo, one thread each.

Importing Megatron takes a rank 7 s of CPU time, more than most tests do with it. So the ranks of a function are forked from
a server that has imported its module (and done nothing else), except where there is CUDA, which does not outlive a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PORT_TAKEN = ("EADDRINUSE", "address already in use")
TAIL = 6000  # characters of each rank's output that an error quotes
CUDA = Path("/dev/nvidiactl").exists()


class RanksFailed(AssertionError):
    """A rank failed or the time was up; the message holds what the ranks printed."""


def become_rank(rank: int, ranks: int, port: int, output: Path) -> None:
    """In a forked process: be this rank of a world on this machine, with everything printed appended to `output`."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def run_distributed(
    target: str,
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Run `target` in `world_size` processes, and wait for them.

    Args:
        target: "module:function", called with `args` and `kwargs`, which must be JSON; or the path of a script (".py") or
            the name of a module, run with `args` as its command line.
        timeout: seconds until all are killed.
        env: further environment variables.

    Returns:
        What the function returned, through JSON, by rank; None for scripts and modules.

    Raises:
        RanksFailed: a rank ended with another status than 0, or time was up.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        work = Path(folder)
        if ":" in target:
            (work / "call.json").write_text(json.dumps({"target": target, "args": args, "kwargs": kwargs}))
            command = [sys.executable, "-m", "tests.distributed", folder]
        elif kwargs:
            raise TypeError(f"a script or module takes a command line, not keywords: {sorted(kwargs)}")
        else:
            what = [str(Path(target).resolve())] if target.endswith(".py") else ["-m", target]
            command = [sys.executable, *what, *map(str, args)]
        attempt: Callable[[], str | None]
        if ":" in target and not CUDA:
            server = _server(target.split(":")[0], tuple(sorted((env or {}).items())))
            attempt = functools.partial(server.run, folder, world_size, timeout)
        else:
            attempt = functools.partial(_run_fresh, command, world_size, work, env or {}, timeout)
        for _ in range(3):
            failure = attempt()
            # Between finding a free port and listening on it, another test may have taken it.
            if failure is None or not any(taken in _outputs(work, world_size) for taken in PORT_TAKEN):
                break
        if failure is not None:
            raise RanksFailed(f"{target} on {world_size} ranks: {failure}\n{_outputs(work, world_size)}")
        files = [work / f"result-{rank}.json" for rank in range(world_size)]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set for a rank."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


def _interpreter() -> dict[str, str]:
    """What has to be set before Python starts."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Fresh:
    """A rank in a Python of its own."""

    def __init__(self, command: list[str], work: Path, rank: int, env: dict[str, str]) -> None:
        with (work / f"output-{rank}.txt").open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=work,
                env={**os.environ, **_interpreter(), **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a rank's own children (checkpoint writers) end with it
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self) -> None:
        self._process.wait()


class _Forked:
    """A rank forked from this process."""

    def __init__(self, work: Path, rank: int, env: dict[str, str]) -> None:
        self._process = multiprocessing.get_context("fork").Process(target=_forked, args=(work, rank, env))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.join()


def _forked(work: Path, rank: int, env: dict[str, str]) -> None:
    """What a forked rank does."""
    os.setsid()
    os.chdir(work)
    with (work / f"output-{rank}.txt").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(env)
    _call(str(work))


def _run_fresh(command: list[str], world_size: int, work: Path, env: dict[str, str], timeout: float) -> str | None:
    port = _free_port()
    return _wait(
        [_Fresh(command, work, rank, {**_environment(rank, world_size, port), **env}) for rank in range(world_size)],
        timeout,
    )


def _run_forked(world_size: int, work: Path, timeout: float) -> str | None:
    port = _free_port()
    return _wait([_Forked(work, rank, _environment(rank, world_size, port)) for rank in range(world_size)], timeout)


def _wait(processes: list[_Fresh] | list[_Forked], timeout: float) -> str | None:
    """None when all ranks ended well; else what went wrong, with the other ranks killed."""
    deadline = time.monotonic() + timeout
    try:
        while True:
            codes = [process.poll() for process in processes]
            for rank, code in enumerate(codes):
                if code not in (None, 0):
                    return f"rank {rank} ended with status {code}"
            if all(code == 0 for code in codes):
                return None
            if time.monotonic() > deadline:
                running = [rank for rank, code in enumerate(codes) if code is None]
                return f"ranks {running} still running after {timeout:.0f} s"
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                for kill in (os.killpg, os.kill):  # a rank that was forked just now leads no group yet
                    with contextlib.suppress(ProcessLookupError):
                        kill(process.pid, signal.SIGKILL)
                process.wait()


class _Server:
    """A process that has imported `module`, and forks ranks."""

    def __init__(self, module: str, env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed", "--serve", module],
            cwd=ROOT,
            env={**os.environ, **_interpreter(), **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: str, world_size: int, timeout: float) -> str | None:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([folder, world_size, timeout]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RanksFailed(f"the server of ranks ended with status {self._process.wait()}; its message is above")
        failure = json.loads(answer)["failure"]
        return None if failure is None else str(failure)

    def stop(self) -> None:
        """Ends with its standard input."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


_servers: dict[tuple[str, tuple[tuple[str, str], ...]], _Server] = {}


def _server(module: str, env: tuple[tuple[str, str], ...]) -> _Server:
    """The server of a module. Only the one used last is kept: each holds what it has imported in memory."""
    if (module, env) not in _servers:
        _stop_servers()
        _servers[module, env] = _Server(module, dict(env))
    return _servers[module, env]


@atexit.register
def _stop_servers() -> None:
    while _servers:
        _servers.popitem()[1].stop()


def _serve(module: str) -> None:
    """What a server does, until its standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is not an answer
    importlib.import_module(module)
    while line := sys.stdin.readline():
        folder, world_size, timeout = json.loads(line)
        print(json.dumps({"failure": _run_forked(world_size, Path(folder), timeout)}), file=answers, flush=True)


def _outputs(work: Path, world_size: int) -> str:
    parts = []
    for rank in range(world_size):
        text = (work / f"output-{rank}.txt").read_text(errors="replace").strip()
        cut = "" if len(text) <= TAIL else "[...] "
        parts.append(f"--- rank {rank}: {cut}{text[-TAIL:] or '(nothing printed)'}")
    return "\n".join(parts)


def _call(folder: str) -> None:
    """What each rank runs."""
    call = json.loads(Path(folder, "call.json").read_text())
    module, name = call["target"].split(":")
    function = getattr(importlib.import_module(module), name)
    result = function(*call["args"], **call["kwargs"])
    Path(folder, f"result-{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _serve(sys.argv[2])
    else:
        _call(sys.argv[1])

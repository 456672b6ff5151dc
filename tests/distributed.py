"""Several processes from one test: each rank runs a function (or a script, or a module), and its results come back.

    results = run_distributed("tests.megatron.training_job:train", 2, tensor_parallel=2)

starts what torchrun would start. Ranks find each other through the usual environment variables; gloo, one thread each.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PORT_TAKEN = ("EADDRINUSE", "address already in use")
TAIL = 6000  # characters of each rank's output that an error quotes


class RanksFailed(AssertionError):
    """A rank failed or the time was up; the message holds what the ranks printed."""


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
        for _ in range(3):
            processes = _start(command, world_size, work, env or {})
            failure = _wait(processes, timeout)
            # Between finding a free port and listening on it, another test may have taken it.
            if failure is None or not any(taken in _outputs(work, world_size) for taken in PORT_TAKEN):
                break
        if failure is not None:
            raise RanksFailed(f"{target} on {world_size} ranks: {failure}\n{_outputs(work, world_size)}")
        files = [work / f"result-{rank}.json" for rank in range(world_size)]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]


def _start(command: list[str], world_size: int, work: Path, env: dict[str, str]) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    processes = []
    for rank in range(world_size):
        with (work / f"output-{rank}.txt").open("wb") as output:
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=work,
                    env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **env},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a rank's own children (checkpoint writers) end with it
                )
            )
    return processes


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> str | None:
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
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


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
    _call(sys.argv[1])

"""A command that is killed in the middle, with all its processes."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from pathlib import Path

import psutil


def run_until(said: str, command: list[str], *, cwd: Path, env: dict[str, str], timeout: float = 300) -> str:
    """Start, and end all processes with SIGKILL once a line has `said` in it. Returns what was printed."""
    process = psutil.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def kill() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [*process.children(recursive=True), process]:  # torchrun's workers have sessions of their own
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()

    late = threading.Timer(timeout, kill)
    late.start()
    printed = []
    try:
        for line in process.stdout:
            printed.append(line)
            if said in line:
                break
    finally:
        late.cancel()
        kill()
        process.wait()
    assert printed and said in printed[-1], "".join(printed)[-4000:]
    return "".join(printed)

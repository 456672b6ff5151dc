"""One node of a run: torchrun's agent, with a request to stop handed on to the ranks.

    python -m megatron_vp2o.launch.node TORCHRUN-ARGUMENTS

Slurm signals the processes that it has started, not theirs (proctrack/cgroup), or all of them (proctrack/linuxproc).
torchrun knows no request to stop: SIGUSR1 kills it, and SIGTERM makes it kill its ranks after 30 seconds. So it ignores
both here, and this process passes them on to the ranks alone, as SIGUSR1, until they have ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType

import psutil

INTERVAL_S = 2.0
"""Between two reminders: a rank that is just starting does not listen yet."""
AGENT_ENVIRONMENT = {
    # torchrun's default, without SIGTERM.
    "PET_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT",
    # Else the agents of torch 2.13 keep one store over all restarts (torch/distributed/elastic/rendezvous/
    # dynamic_rendezvous.py, next_rendezvous). Ranks that start again find the keys of those before them in it, and hang.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
_RANK = "TORCHELASTIC_RESTART_COUNT"  # torchrun sets it for its ranks


def main() -> int:
    """Returns torchrun's exit status."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # which torchrun inherits
    command = [sys.executable, "-m", "torch.distributed.run", *sys.argv[1:]]
    agent = subprocess.Popen(command, env={**os.environ, **AGENT_ENVIRONMENT})
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, ask)
    while True:
        try:
            return _status(agent.wait(INTERVAL_S))
        except subprocess.TimeoutExpired:
            if asked:
                pass_on(agent.pid)


def pass_on(agent: int) -> None:
    """Send SIGUSR1 to the ranks among the children of `agent`."""
    try:
        children = psutil.Process(agent).children()
    except psutil.NoSuchProcess:
        return
    for child in children:
        try:
            if _RANK in child.environ():
                child.send_signal(signal.SIGUSR1)
        except psutil.Error:
            continue  # it has ended meanwhile


def _status(code: int) -> int:
    return code if code >= 0 else 128 - code  # as a shell tells of a signal


if __name__ == "__main__":
    sys.exit(main())

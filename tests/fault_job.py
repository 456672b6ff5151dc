"""Runs of the command line on several ranks, one of which fails at a chosen place: `python -m tests.fault_job SPEC.json`.

Nobody watches the ranks, as torchrun would: they have to end by themselves. Each run is forked from this process, which has
imported everything and done nothing else.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from tests.distributed import become_rank

END_S = 30.0
"""From the fault until ranks that still run are killed, and count as hanging."""
BACKWARD = "megatron_vp2o.megatron.learner.scoring:log_probs_and_entropy"


@dataclass
class Fault:
    """One run.

    Attributes:
        place: "module:name" of what fails when it is called; "backward" for a hook of autograd; "" for nowhere.
        rank: on which rank.
        call: at the how manieth call, from 1.
        kind: "error", "refused" (a UserError), "memory", "interrupt", "kill" (SIGKILL) or "exit" (a silent os._exit).
        target: "module:function", what the ranks run.
        absent: ranks that are never started.
        limit: seconds until the fault has to come, or a run without one has to end.
        seconds: by rank, from the fault to the end of the process; None for a rank that had to be killed.
    """

    run_dir: str
    arguments: list[str]
    ranks: int
    place: str
    rank: int
    call: int
    kind: str
    target: str = "megatron_vp2o.train:main"
    absent: list[int] = field(default_factory=list)
    limit: float = 90.0
    came: bool = False
    seconds: list[float | None] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def main(spec: Path) -> None:
    """Do the runs of a file, and write what became of them back into it."""
    faults = [Fault(**settings) for settings in json.loads(spec.read_text())]
    for module in {fault.target.split(":")[0] for fault in faults}:
        importlib.import_module(module)
        if module == "megatron_vp2o.train":
            importlib.import_module("megatron_vp2o.session")  # everything heavy, once for all runs
    for fault in faults:
        _do(fault)
        print(f"{fault.place} on rank {fault.rank}: {fault.seconds} {fault.statuses}", flush=True)
    spec.write_text(json.dumps([asdict(fault) for fault in faults]))


def _do(fault: Fault) -> None:
    folder = Path(fault.run_dir)
    folder.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [rank for rank in range(fault.ranks) if rank not in fault.absent]
    children = [_fork(fault, rank, port) for rank in ranks]
    ended: dict[int, tuple[float, int]] = {}
    began, moment = time.monotonic(), folder / "moment"
    while len(ended) < len(children):
        for child in children:
            if child not in ended:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    ended[child] = time.monotonic(), os.waitstatus_to_exitcode(status)
        limit = float(moment.read_text()) + END_S if moment.exists() else began + fault.limit
        if time.monotonic() > limit:
            for child in children:
                if child not in ended:
                    os.kill(child, signal.SIGKILL)
                    ended[child] = float("inf"), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.01)
    fault.came = moment.exists()
    start = float(moment.read_text()) if fault.came else began
    fault.seconds = [None if ended[child][0] == float("inf") else ended[child][0] - start for child in children]
    fault.statuses = [ended[child][1] for child in children]
    fault.outputs = [(folder / f"output-{rank}.txt").read_text(errors="replace") for rank in ranks]


def _fork(fault: Fault, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    become_rank(rank, fault.ranks, port, Path(fault.run_dir) / f"output-{rank}.txt")
    module, function = fault.target.split(":")
    sys.argv = [module, *fault.arguments, f"run_dir={fault.run_dir}/run"]
    status: Any = 0
    try:
        if rank == fault.rank and fault.place:
            _lay(fault)
        getattr(importlib.import_module(module), function)()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # a forked child must not go on in its parent's code
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _lay(fault: Fault) -> None:
    """Put the fault in its place, in this process."""
    backward = fault.place == "backward"
    owner, name, real = found(BACKWARD if backward else fault.place)
    calls = 0

    @functools.wraps(real, updated=())
    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != fault.call:
            return real(*args, **kwargs)
        if not backward:
            _fail(fault)
        logprobs, entropies = real(*args, **kwargs)
        logprobs.register_hook(lambda _: _fail(fault))
        return logprobs, entropies

    mock.patch.object(owner, name, faulty).start()


def found(place: str) -> tuple[Any, str, Callable[..., Any]]:
    """Whose attribute a place is, its name and what is there now."""
    module, _, names = place.partition(":")
    owner: Any = importlib.import_module(module)
    *path, name = names.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, name, getattr(owner, name)


def _fail(fault: Fault) -> NoReturn:
    moment = Path(fault.run_dir) / "moment"
    moment.with_suffix(".new").write_text(str(time.monotonic()))
    moment.with_suffix(".new").rename(moment)
    message = f"the fault at {fault.place}"
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "exit":
        os._exit(7)
    if fault.kind == "refused":
        from megatron_vp2o.errors import UserError

        raise UserError(message)
    raise {"error": ValueError, "memory": MemoryError, "interrupt": KeyboardInterrupt}[fault.kind](message)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

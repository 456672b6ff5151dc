"""Runs of the command line one after another, ended by signals at chosen moments: `python -m tests.resume_job SPEC.json`.

Each run is a real one, from its arguments to its exit status, in processes forked from this one: importing megatron.core
takes longer than such a run. This process itself starts no threads and touches no tensors.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TIMEOUT = 120.0
GOOD = (0, 75)  # statuses of a rank after which the others may go on: done, preempted


@dataclass
class Run:
    """One start of the command line in `run_dir`.

    Attributes:
        arguments: of `megatron_vp2o.train`.
        ranks: processes.
        end: name of the signal that ends it, None to let it finish.
        rank: which process gets it; None for all.
        after_step: send it once the record has this step's line ...
        saving_step: ... or while this step's checkpoint is being written.
    """

    run_dir: str
    arguments: list[str]
    ranks: int = 1
    end: str | None = None
    rank: int | None = None
    after_step: int = 0
    saving_step: int | None = None
    statuses: list[int] = field(default_factory=list)

    def is_time(self) -> bool:
        folder = Path(self.run_dir)
        if self.saving_step is not None:
            return (folder / "checkpoints" / f".tmp-step_{self.saving_step:06d}").exists()
        record = folder / "metrics.jsonl"
        return record.exists() and f'"step": {self.after_step},' in record.read_text()


def main(spec: Path) -> None:
    """Do the runs of a file, and write their exit statuses (by rank; negative: the signal) back into it."""
    import megatron_vp2o.session  # noqa: F401 - everything heavy, once for all runs

    runs = [Run(**settings) for settings in json.loads(spec.read_text())]
    for number, run in enumerate(runs):
        _do(run, spec.with_name(f"output-{number}.txt"))
    spec.write_text(json.dumps([asdict(run) for run in runs]))


def _do(run: Run, output: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [_fork(run, rank, port, output) for rank in range(run.ranks)]
    ended: dict[int, int] = {}
    signalled = run.end is None
    deadline = time.monotonic() + TIMEOUT
    while len(ended) < len(children):
        if not signalled and run.is_time():
            for rank, child in enumerate(children):
                if run.rank in (None, rank) and child not in ended:
                    os.kill(child, signal.Signals[str(run.end)])
            signalled = True
        for child in children:
            if child not in ended:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    ended[child] = os.waitstatus_to_exitcode(status)
        failed = any(status not in GOOD for status in ended.values())
        if (failed or time.monotonic() > deadline) and len(ended) < len(children):  # as torchrun does
            for child in children:
                if child not in ended:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    run.statuses = [ended[child] for child in children]


def _fork(run: Run, rank: int, port: int, output: Path) -> int:
    child = os.fork()
    if child:
        return child
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(run.ranks),
        LOCAL_WORLD_SIZE=str(run.ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["megatron_vp2o.train", *run.arguments, f"run_dir={run.run_dir}"]
    status: Any = 0
    try:
        from megatron_vp2o.train import main as train

        train()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # a forked child must not go on in its parent's code
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

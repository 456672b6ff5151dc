"""Runs of the command line one after another, ended by signals at chosen moments: `python -m tests.resume_job SPEC.json`.

Each run is a real one, from its arguments to its exit status, in processes forked from this one: importing megatron.core
takes longer than such a run. This process itself starts no threads and touches no tensors.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.distributed import become_rank

ROOT = Path(__file__).resolve().parents[1]
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
        saving_step: ... or while this step's checkpoint is being written (-1: the first that this run writes).
        delay: ... and so many seconds later.
        diverge: optimizer step after which one weight of the last rank is no number, as after a step that was too long.
        earn: rewards that a model which knows nothing can earn (`EasyCountdown`).
    """

    run_dir: str
    arguments: list[str]
    ranks: int = 1
    end: str | None = None
    rank: int | None = None
    after_step: int = 0
    saving_step: int | None = None
    delay: float = 0.0
    diverge: int | None = None
    earn: bool = False
    statuses: list[int] = field(default_factory=list)

    def is_time(self) -> bool:
        """Whether the event has come that the signal follows. After step -1: at once."""
        folder = Path(self.run_dir)
        if self.saving_step is not None:
            step = "*" if self.saving_step < 0 else f"{self.saving_step:06d}"
            return any((folder / "checkpoints").glob(f".tmp-step_{step}"))
        if self.after_step < 0:
            return True
        record = folder / "metrics.jsonl"
        return record.exists() and f'"step": {self.after_step},' in record.read_text()


def run_in_one_process(folder: Path, runs: list[Run], timeout: float = 280) -> list[list[int]]:
    """Do runs in a fresh Python with `folder` for what they print. Returns exit statuses by run and rank."""
    folder.mkdir(exist_ok=True)
    spec = folder / "runs.json"
    spec.write_text(json.dumps([asdict(run) for run in runs]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.resume_job", str(spec)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return [run["statuses"] for run in json.loads(spec.read_text())]


def outputs(folder: Path) -> str:
    """What the runs printed."""
    return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in sorted(folder.glob("output-*.txt")))


def main(spec: Path) -> None:
    """Do the runs of a file, and write their exit statuses (by rank; negative: the signal) back into it."""
    import megatron_vp2o.session  # noqa: F401 - everything heavy, once for all runs

    runs = [Run(**settings) for settings in json.loads(spec.read_text())]
    run_all(runs, spec.parent)
    spec.write_text(json.dumps([asdict(run) for run in runs]))


def run_all(runs: list[Run], folder: Path, timeout: float = TIMEOUT) -> None:
    """Do runs one after another, each in at most `timeout` seconds, and fill in their exit statuses."""
    for number, run in enumerate(runs):
        output = folder / f"output-{number}.txt"
        for _ in range(3):
            output.touch()  # a rank that is killed at once prints nothing
            _do(run, output, timeout)
            # Between finding a free port and listening on it, another test may have taken it.
            if not any(run.statuses) or "EADDRINUSE" not in output.read_text(errors="replace"):
                break
            output.unlink()


def _do(run: Run, output: Path, timeout: float) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [_fork(run, rank, port, output) for rank in range(run.ranks)]
    ended: dict[int, int] = {}
    signalled, due = run.end is None, None
    deadline = time.monotonic() + timeout
    while len(ended) < len(children):
        if not signalled and due is None and run.is_time():
            due = time.monotonic() + run.delay
        if not signalled and due is not None and time.monotonic() >= due:
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
    become_rank(rank, run.ranks, port, output)
    if run.earn:
        _earn()
    if run.diverge is not None and rank == run.ranks - 1:
        _diverge(run.diverge)
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


def _earn() -> None:
    """Let countdown be `EasyCountdown` in this process."""
    from megatron_vp2o import tasks
    from megatron_vp2o.rl.types import Problem, Verdict

    class EasyCountdown(tasks.CountdownTask):
        """A response is right if the codes of its characters add up to an even number: about every second one."""

        def verify(self, problem: Problem, response: str) -> Verdict:
            right = sum(map(ord, response)) % 2 == 0
            return Verdict(right, "even" if right else None, "" if right else "odd")

    tasks.TASKS["countdown"] = EasyCountdown


def _diverge(step: int) -> None:
    """Let the weights of this process go wrong after an optimizer step."""
    from megatron_vp2o.megatron.learner.policy import MegatronPolicy

    take, taken = MegatronPolicy.take_step, 0

    def take_step(policy: MegatronPolicy) -> None:
        nonlocal taken
        take(policy)
        taken += 1
        if taken == step:
            parameters = list(policy.model.parameters())
            parameters[-1].data.view(-1)[0] = float("nan")

    MegatronPolicy.take_step = take_step  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    main(Path(sys.argv[1]))

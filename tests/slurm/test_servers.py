"""Rollout servers in a real Slurm: beside the ranks, on nodes and in a job of their own; who ends what (make test-slurm).

The servers compute with transformers (`tests/rollout/hf_server.py`), so that a whole run trains through them without vLLM.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_vp2o.launch.scripts import batch_lines, step
from megatron_vp2o.launch.settings import SlurmSettings
from tests.slurm.test_slurm import ROOT, Submitted, launch
from tests.slurm.test_slurm import pytestmark as pytestmark

SMALL = [
    *("model=micro", "init_from=null", "task.train_size=20", "task.validation_size=4", "task.test_size=4"),
    *("evaluation.problems=4", "evaluation.samples=2", "evaluation.pass_at=[1,2]", "evaluation.interval=0"),
    *(
        "algorithm.prompts_per_step=4",
        "algorithm.group_size=4",
        "algorithm.minibatches=1",
        "algorithm.micro_batch_size=4",
    ),
    *("algorithm.mismatch.measure=true", "rollout.sampling.max_new_tokens=8", "logging.tensorboard=false", "threads=1"),
    *("optimizer.lr_warmup_steps=1", "rollout=vllm", "rollout.launch=true", "rollout.server.startup_minutes=4"),
]
SECONDS = 20.0
"""Within which everything ends after one part has, on a busy machine; Slurm itself takes some of them."""


class Served(Submitted):
    """A launch of the tiny recipe with servers, which start or cannot; the last of its jobs trains."""

    def __init__(self, folder: Path, *settings: str, steps: int = 2, start: bool = True) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        python = folder / "python"
        serves = f'exec {sys.executable} {ROOT}/tests/rollout/hf_server.py "$@"'
        fails = 'echo "RuntimeError: no such device here" >&2; exit 1'
        python.write_text(f'#!/bin/bash\n[ "$1" = -c ] && exit 0\n{serves if start else fails}\n')
        python.chmod(0o755)
        environment = "executor.environment={OMP_NUM_THREADS: 1}"
        done = launch(
            *("--config-name", "countdown_tiny_grpo", f"run_dir={self.run_dir}", f"rollout.server.python={python}"),
            *(f"executor.log_dir={folder}/launches", environment, "executor.time=00:20:00", f"algorithm.steps={steps}"),
            *(*SMALL, *settings),
        )
        assert done.returncode == 0, done.stderr
        *self.others, number = re.findall(r"as Slurm job (\d+)", done.stdout)
        super().__init__(number)

    def output(self) -> str:
        files = sorted([*self.folder.rglob("*.out"), *self.folder.rglob("server-*.log")])
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-20000:]}" for file in files)

    def record(self) -> list[dict[str, float]]:
        file = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def processes(self, what: str) -> list[psutil.Process]:
        """Of this launch: hf_server, megatron_vp2o.serve, megatron_vp2o.train."""
        found = []
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
                ours = any(what in word for word in line) and str(self.run_dir) in " ".join(line)
                if ours and not any("guard.py" in word or "srun" in word for word in line):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def check_trained(self, steps: int, servers: int) -> None:
        record = self.record()
        assert [line["step"] for line in record] == list(range(steps + 1)), self.output()
        assert all(line["mismatch/kl"] < 1e-8 and line["mismatch/logprob_p999"] < 1e-4 for line in record[1:])
        logs = list(self.run_dir.glob("server-*.log"))
        assert len(logs) == servers and all("--- start 1 on port" in log.read_text() for log in logs)

    def check_nothing_is_left(self, within: float = SECONDS) -> None:
        deadline = time.monotonic() + within
        while left := [
            p for what in ("hf_server", "megatron_vp2o.serve", "megatron_vp2o.train") for p in self.processes(what)
        ]:
            assert time.monotonic() < deadline, (left, self.output())
            time.sleep(0.2)


@pytest.mark.parametrize(
    ("servers", "run", "status"),
    [
        ("sleep 3; exit 9", 'trap "" TERM USR1; while :; do sleep 1; done', 9),  # it would not end by itself
        ("sleep 600", "sleep 2; exit 0", 0),
        ("sleep 2; exit 0", "sleep 5; exit 4", 4),
    ],
)
def test_steps_of_one_job_end_together(tmp_path: Path, servers: str, run: str, status: int) -> None:
    """What the batch script of a run with servers does, with steps that end as told."""
    beside = f"command srun {' '.join(step(1, 1))} bash -c '{servers}'"
    lines = batch_lines(SlurmSettings(requeue=False), stopped=f"{tmp_path}/stopped", servers=beside)
    main = f"srun {' '.join(step(1))} bash -c '{run}'\nexitcode=$?\necho ended at $SECONDS s\nexit $exitcode"
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\nhead_node_ip=x\n{lines}\n{main}\n")
    words = [
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--output={tmp_path}/out",
        f"{tmp_path}/job.sh",
    ]
    job = Submitted(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())
    assert job.ends() == ("COMPLETED" if status == 0 else "FAILED")
    assert job.shown("ExitCode") == f"{status}:0"
    said = (tmp_path / "out").read_text()
    assert ("error: the rollout servers ended with status 9" in said) is (status == 9)
    ended = re.search(r"ended at (\d+) s", said)
    assert ended is not None and int(ended[1]) < SECONDS, said


@pytest.mark.parametrize("placed", ["split", "nodes", "job"])
def test_a_run_trains_through_its_servers_and_ends_with_them(tmp_path: Path, placed: str) -> None:
    nodes = ["executor.nodes=2"] if placed == "split" else ["executor.nodes=1", "executor.server_nodes=1"]
    job = Served(tmp_path, *nodes, f"executor.servers={placed}")
    assert job.ends() == "COMPLETED", job.output()
    job.check_trained(2, servers=2 if placed == "split" else 1)
    job.check_nothing_is_left()
    for other in job.others:
        assert Submitted(other).ends() in ("COMPLETED", "CANCELLED")


def test_a_cancelled_run_leaves_neither_servers_nor_trainer(tmp_path: Path) -> None:
    job = Served(tmp_path, "executor.nodes=2", "executor.servers=split", steps=2000)
    job.until(lambda: len(job.record()) >= 2, "a step")
    assert len(job.processes("hf_server")) >= 2 and job.processes("megatron_vp2o.train")
    subprocess.run(["scancel", job.id], check=True)
    start = time.monotonic()
    job.check_nothing_is_left(within=60.0)
    print(f"all processes had ended after {time.monotonic() - start:.1f} s")
    assert job.ends() == "CANCELLED" and job.shown("Restarts") == "0", job.output()


def test_the_error_of_one_host_ends_all_and_is_told(tmp_path: Path) -> None:
    """A bug of the program in the servers' host of the second node; the first node's host and the ranks wait for it meanwhile."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, socket, sys, time\n"
        "def fails(*_, **__):\n"
        "    time.sleep(10)\n"
        "    print('it fails at', time.time(), flush=True)\n"
        "    raise RuntimeError('a fault of the second host')\n"
        "if 'megatron_vp2o.serve' in sys.orig_argv and os.environ.get('SLURMD_NODENAME') == 'n2':\n"
        "    socket.create_server = fails\n"
    )
    environment = f"executor.environment={{OMP_NUM_THREADS: 1, PYTHONPATH: {tmp_path}}}"
    job = Served(tmp_path, "executor.nodes=2", "executor.servers=split", environment)
    assert job.ends() == "FAILED", job.output()
    ended, said = time.time(), job.output()
    failed = re.search(r"it fails at ([\d.]+)", said)
    assert failed is not None, said
    assert ended - float(failed[1]) < SECONDS, said
    assert said.count("RuntimeError: a fault of the second host") == 1 and "Traceback (most recent call last)" in said
    assert "error: the rollout servers ended with status 1" in said, said
    job.check_nothing_is_left()
    assert len(job.record()) == 0


def test_servers_that_cannot_start_end_the_job_with_one_error(tmp_path: Path) -> None:
    """The run's ranks would start three times more, as after any error, and try again: not here. The error has the words of both
    servers."""
    job = Served(tmp_path, "executor.nodes=2", "executor.servers=split", "executor.max_restarts=0", start=False)
    assert job.ends() == "FAILED", job.output()
    said = [line for line in job.output().splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith("error: no server took version 0: http://"), job.output()
    assert len(re.findall(r"ends with: ", said[0])) == 2 and "no such device here" in said[0], said
    job.check_nothing_is_left()
    assert [line["step"] for line in job.record()] == [0], "nothing was trained on"

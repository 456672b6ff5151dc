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
    """A launch of the tiny recipe with servers; the last of its jobs trains."""

    def __init__(self, folder: Path, *settings: str, steps: int = 2) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        python = folder / "python"
        python.write_text(
            f'#!/bin/bash\n[ "$1" = -c ] && exit 0\nexec {sys.executable} {ROOT}/tests/rollout/hf_server.py "$@"\n'
        )
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

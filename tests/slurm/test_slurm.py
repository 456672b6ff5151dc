"""A real Slurm: a run over two nodes, ended early in every way, goes on to the same result (make test-slurm)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES, RANKS_PER_NODE, STEPS = 2, 2, 12
RECIPE = "countdown_tiny_supervised"
STAGES = [f"stages=[{RECIPE},'touch {{run_dir}}/told']"]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
LIMIT_S = 420.0
SMALL = [
    "model=micro",
    "parallel.expert_parallel=2",
    "task.train_size=50",
    "task.validation_size=8",
    "task.test_size=8",
    "evaluation.interval=5",
    "evaluation.problems=8",
    "evaluation.samples=2",
    "evaluation.pass_at=[1,2]",
    "rollout.sampling.max_new_tokens=8",
    f"algorithm.steps={STEPS}",
    "algorithm.global_batch_size=16",
    "algorithm.micro_batch_size=4",
    "checkpoint.interval=4",
    "optimizer.lr=1e-2",
    "optimizer.lr_warmup_steps=2",
    "logging.tensorboard=false",
    "threads=1",
]


def _answers() -> bool:
    try:
        return subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not _answers(), reason="no Slurm answers on this machine: make test-slurm starts one"),
    pytest.mark.skipif(find_spec("nemo_run") is None, reason="nemo-run is not installed (extra [nemo])"),
]


class Submitted:
    """A job in the queue."""

    def __init__(self, number: str) -> None:
        self.id = number

    def shown(self, field: str) -> str:
        text = subprocess.run(["scontrol", "show", "job", self.id], capture_output=True, text=True, check=True).stdout
        found = re.search(rf"\b{field}=(\S+)", text)
        assert found is not None, text
        return found[1]

    def ends(self) -> str:
        self.until(lambda: self.shown("JobState") in ENDED, "the end")
        return self.shown("JobState")

    def output(self) -> str:
        return ""

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            if time.monotonic() > deadline:
                subprocess.run(["scancel", self.id])
                raise AssertionError(f"{what} did not come within {LIMIT_S:.0f} s\n{self.output()}")
            if what != "the end" and self.shown("JobState") in ENDED:
                raise AssertionError(f"the job ended before {what}\n{self.output()}")
            time.sleep(0.25)


class Job(Submitted):
    """One launch of the tiny recipe on two nodes of two ranks."""

    def __init__(self, folder: Path, *what: str) -> None:
        self.run_dir, self.log_dir = folder / "run", folder / "launches"
        done = launch(
            *(what or ["--config-name", RECIPE]),
            "executor.nodes=2",
            f"executor.ranks_per_node={RANKS_PER_NODE}",
            f"executor.log_dir={self.log_dir}",
            "executor.environment={OMP_NUM_THREADS:1}",
            "executor.time=00:20:00",
            f"run_dir={self.run_dir}",
            *SMALL,
        )
        assert done.returncode == 0, done.stderr
        number, *self.others = re.findall(r"as Slurm job (\d+)", done.stdout)
        super().__init__(number)

    def reaches(self, step: int) -> None:
        """Wait until the record has this step."""
        self.until(lambda: any(line["step"] >= step for line in self.record()), f"step {step}")

    def record(self) -> list[dict[str, Any]]:
        """The metrics by step, without times."""
        file = self.run_dir / "metrics.jsonl"
        whole = (
            [line for line in file.read_text().splitlines(keepends=True) if line[-1] == "\n"] if file.exists() else []
        )
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in whole]

    def checkpoint(self) -> dict[str, Any]:
        """Checksums of the last checkpoint's tensors."""
        name = (self.run_dir / "checkpoints" / "latest").read_text().strip()
        files = json.loads((self.run_dir / "checkpoints" / name / "manifest.json").read_text())["files"]
        return {file: entry for file, entry in files.items() if file.endswith(".distcp") or file == "common.pt"}

    def output(self) -> str:
        files = sorted(self.log_dir.rglob("*.out"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-5000:]}" for file in files)

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes of the job on this machine."""
        found = {}
        for process in psutil.process_iter():
            try:
                if "megatron_vp2o.train" not in process.cmdline():
                    continue
                environment = process.environ()
            except psutil.Error:
                continue
            if environment.get("SLURM_JOB_ID") == self.id and "TORCHELASTIC_RESTART_COUNT" in environment:
                found[int(environment["RANK"])] = process
        return found


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_vp2o.launch", "executor=slurm", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that nothing happens to."""
    return Job(tmp_path_factory.mktemp("whole"), *STAGES)


def test_two_nodes_train_one_model(whole: Job) -> None:
    assert whole.ends() == "COMPLETED", whole.output()
    record = whole.record()
    assert [line["step"] for line in record] == list(range(STEPS + 1))
    losses = [line["supervised/loss"] for line in record[1:]]
    assert losses[-1] < losses[0] - 0.3  # it learns
    assert all(line["samples"] == 16 * line["step"] for line in record)
    shards = [file for file in whole.checkpoint() if file.endswith(".distcp")]
    assert len({file.split("_")[2] for file in shards}) == NODES * RANKS_PER_NODE  # each rank wrote its own
    (told,) = (Submitted(number) for number in whole.others)
    assert told.ends() == "COMPLETED", whole.output()
    assert (whole.run_dir / "told").exists()


def test_asked_to_stop_it_saves_queues_again_and_ends_the_same(whole: Job, tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.reaches(2)
    subprocess.run(["scancel", "--signal=USR1", job.id], check=True)
    assert job.ends() == "COMPLETED", job.output()
    assert job.shown("Restarts") == "1"
    assert len(list(job.log_dir.rglob(f"log-*_{job.id}_1.out"))) == 1
    assert re.search(r"resumed from \S+ at step [1-9]", job.output()), job.output()
    assert job.record() == whole.record()
    assert job.checkpoint() == whole.checkpoint()


def test_a_signal_to_the_batch_script_does_the_same(whole: Job, tmp_path: Path) -> None:
    """As `sbatch --signal=B:USR1@...` and `scancel --batch` send it; here while the ranks still start up."""
    job = Job(tmp_path)
    job.until(lambda: len(job.ranks()) == NODES * RANKS_PER_NODE, "the ranks")
    subprocess.run(["scancel", "--batch", "--signal=USR1", job.id], check=True)
    assert job.ends() == "COMPLETED", job.output()
    assert job.shown("Restarts") == "1"
    assert job.record() == whole.record()
    assert job.checkpoint() == whole.checkpoint()


def test_a_killed_rank_is_started_again_and_the_run_ends_the_same(whole: Job, tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.reaches(5)
    job.ranks()[3].kill()
    assert job.ends() == "COMPLETED", job.output()
    assert job.shown("Restarts") == "0"  # torchrun did it, inside the job
    assert re.search(r"resumed from \S+ at step [48]\b", job.output()), job.output()
    assert job.record() == whole.record()
    assert job.checkpoint() == whole.checkpoint()


def test_a_cancelled_job_stays_cancelled(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.reaches(1)
    subprocess.run(["scancel", job.id], check=True)
    assert job.ends() == "CANCELLED", job.output()
    time.sleep(8)  # longer than the test cluster takes to start a requeued job
    assert (job.shown("JobState"), job.shown("Restarts")) == ("CANCELLED", "0")


def test_a_failed_stage_ends_those_that_wait_for_it(tmp_path: Path) -> None:
    done = launch(*STAGES, f"run_dir={tmp_path}/run", f"executor.log_dir={tmp_path}", "executor.setup=[exit 3]")
    assert done.returncode == 0, done.stderr
    first, second = (Submitted(number) for number in re.findall(r"as Slurm job (\d+)", done.stdout))
    assert first.ends() == "FAILED"
    assert second.ends() == "CANCELLED"
    assert not (tmp_path / "run").exists()


def test_what_this_cluster_does_not_have_is_refused() -> None:
    unknown = launch("--config-name", RECIPE, "executor.partition=bathc")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith("error: executor.partition=bathc: this cluster has no such partition; ")
    assert unknown.stderr.count("\n") == 1
    many = launch("--config-name", RECIPE, "executor.nodes=4000", "algorithm.global_batch_size=4000")
    assert many.stderr.startswith("error: executor.nodes=4000 exceeds the nodes of every partition"), many.stderr

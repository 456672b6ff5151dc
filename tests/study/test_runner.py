"""How many threads a study's runs get."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vp2o.cores import share_of_cores
from megatron_vp2o.study.runner import run_all
from megatron_vp2o.study.spec import Job, Study, TaskSpec, jobs

VARIANTS = {"grpo": (), "own": ("threads=7",)}
STUDY = Study("s", {"t": TaskSpec("countdown_tiny_supervised", "countdown_tiny_grpo")}, VARIANTS, (1,), "grpo")


@given(cores=st.integers(1, 256), processes=st.integers(1, 256))
def test_the_cores_that_this_process_may_use_are_divided(cores: int, processes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: set(range(5, 5 + cores)))
        share = share_of_cores(processes)
    assert share >= 1
    assert share == 1 or share * processes <= cores < (share + 1) * processes


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_runs_side_by_side_share_the_cores(tmp_path: Path, slots: int) -> None:
    todo = jobs(STUDY, tmp_path)
    assert run_all(todo, tmp_path, slots=slots, prefix=("echo",), say=lambda text: None) == []

    def threads(job: Job) -> str:
        """As the run takes it: the last one holds."""
        words = (Path(job.folder) / "output.txt").read_text().split()
        return [word for word in words if word.startswith("threads=")][-1]

    assert {job.variant: threads(job) for job in todo} == {
        "warm_up": f"threads={share_of_cores(slots)}",
        "grpo": f"threads={share_of_cores(slots)}",
        "own": "threads=7",
    }

"""A run that cannot get anywhere any more ends with one error and a status of its own, and costs no good checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.resume_draws import SMALL, record
from tests.resume_job import Run, outputs, run_in_one_process

DEAD = 3
TINY = [*SMALL, "evaluation.interval=0", "model.moe_router_topk=2", "checkpoint.keep=1"]
SUPERVISED = [
    "--config-name=countdown_tiny_supervised",
    *TINY,
    "algorithm.global_batch_size=8",
    "optimizer.lr_warmup_steps=0",
]
GRPO = [
    "--config-name=countdown_tiny_grpo",
    *TINY,
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=4",
    "optimizer.lr_warmup_steps=0",
]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_dead_run_ends(tmp_path: Path) -> None:
    def path(name: str) -> str:
        return str(tmp_path / name)

    never_saved = ["checkpoint.interval=0", "checkpoint.save_at_end=false"]
    runs = [
        Run(path("saved"), [*SUPERVISED, "algorithm.steps=30", "checkpoint.interval=2"], diverge=3),
        Run(
            path("limited"),
            [*SUPERVISED, "algorithm.steps=30", *never_saved, "algorithm.max_consecutive_nonfinite_steps=4"],
            diverge=2,
        ),
        Run(path("last"), [*SUPERVISED, "algorithm.steps=3", *never_saved], diverge=3),
        Run(path("empty"), [*GRPO, "algorithm.steps=30", "algorithm.max_consecutive_empty_steps=9"]),
        Run(
            path("one_rank"),
            [*GRPO, "algorithm.steps=30", "checkpoint.interval=1", "parallel.expert_parallel=2"],
            ranks=2,
            diverge=2,
            earn=True,
        ),
        Run(path("started"), [*SUPERVISED, "algorithm.steps=3", "checkpoint.interval=1"]),
        Run(path("started"), [*SUPERVISED, "algorithm.steps=9", "checkpoint.interval=1"], diverge=1),
    ]
    statuses = run_in_one_process(tmp_path / "runs", runs)
    said = outputs(tmp_path / "runs")
    assert [found[0] for found in statuses] == [DEAD, DEAD, DEAD, DEAD, DEAD, 0, DEAD], said
    assert "Traceback" not in said

    def last(name: str) -> int:
        return int(record(tmp_path / name)[-1]["step"])

    def checkpoints(name: str) -> list[str]:
        return sorted(file.name for file in (tmp_path / name / "checkpoints").glob("*"))

    assert last("saved") == 4 and checkpoints("saved") == ["latest", "step_000002"]
    assert "error: the weights of step 4 are not finite" in said and "The newest checkpoint is" in said
    assert last("limited") == 2 + 4 and checkpoints("limited") == []
    assert "error: 4 optimizer steps in a row, up to step 6, had a gradient that is not finite" in said
    assert last("last") == 3 and "error: the weights of step 3 are not finite" in said
    assert last("empty") == 3 and "error: 12 optimizer steps in a row, up to step 3, had no token to train on" in said
    assert checkpoints("one_rank") == [] or checkpoints("one_rank") == ["latest", "step_000001"]
    assert checkpoints("started") == [
        "latest",
        "step_000003",
    ]  # with checkpoint.keep=1: the good one was not rotated away

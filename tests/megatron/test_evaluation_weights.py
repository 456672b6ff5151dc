"""Evaluation during training takes the learner's weights where they are: no third set, and the actor is as it was, even after an
evaluation that broke off."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.resume_draws import last_checkpoint, record
from tests.resume_job import Run, outputs, run_in_one_process
from tests.test_resume import RECIPES

JOB = "tests.megatron.evaluation_weights_job:run"
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [
        {"expert_parallel": 2},
        {"tensor_parallel": 2, "expert_tensor_parallel": 2},
        {"context_parallel": 2, "distributed_optimizer": True},
        {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ],
}


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_evaluation_borrows_the_learners_weights(ranks: int) -> None:
    chance = random.Random(ranks)
    cases = [
        {
            "layout": layout,
            "implementation": implementation,
            "precision": chance.choice(["fp32", "bf16"]),
            "fails_after": chance.randrange(1, 12),
        }
        for number, layout in enumerate(LAYOUTS[ranks])
        for implementation in (("local", "torch") if ranks == 1 else ("local", "torch")[number % 2 :][:1])
    ]
    for rank, results in enumerate(run_distributed(JOB, ranks, cases, timeout=280)):
        for case, found in zip(cases, results, strict=True):
            where = f"{case}, rank {rank}: {found}"
            assert found["moved"] and found["stopped"], (
                where
            )  # the two have other weights, and one evaluation broke off
            assert not any(found["as a copy"]) and not any(found["routes"]), where
            assert found["own"] and found["added"] < 0.01 * found["weights"], where
            assert not any(found["left"]), where


@pytest.mark.slow
@pytest.mark.distributed
def test_training_does_not_notice_evaluations(tmp_path: Path) -> None:
    """Two ranks, a sharded optimizer whose parameters are gathered late, actors of older weights: the same record to the bit."""
    arguments = [
        *RECIPES["grpo"],
        "algorithm.steps=5",
        "parallel.expert_parallel=2",
        "parallel.distributed_optimizer=true",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
    ]
    often, never = tmp_path / "often", tmp_path / "never"
    runs = [
        Run(str(folder), [*arguments, f"evaluation.interval={n}"], ranks=2) for folder, n in ((often, 1), (never, 0))
    ]
    assert run_in_one_process(tmp_path, runs) == [[0, 0], [0, 0]], outputs(tmp_path)
    lines = [
        [{k: v for k, v in line.items() if not k.startswith(("eval/", "test/"))} for line in record(folder)]
        for folder in (often, never)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    assert sum("eval/response_length" in line for line in record(often)) == 6
    assert last_checkpoint(often) == last_checkpoint(never)
    assert all(line["optimizer/grad_norm"] > 1e-3 for line in lines[0][1:])

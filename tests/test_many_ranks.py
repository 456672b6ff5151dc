"""Eight ranks with one prompt each train VP2O for 30 steps; many groups are uniform, so in many optimizer steps some rank has no
row. The prior is off, because with it every group has a signal.

A soak test: it runs where VP2O_WARM_UP names a run of the recipe countdown_tiny_supervised (`make run` leaves one in runs/), and
takes some ten minutes on two cores: `make soak`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.fault_job import Fault
from tests.test_faults import do

WARM_UP = os.environ.get("VP2O_WARM_UP")
RANKS, STEPS = 8, 30
DEFAULT = [
    "--config-name=countdown_tiny_vp2o",
    f"init_from={Path(WARM_UP).resolve() if WARM_UP else None}",
    f"algorithm.prompts_per_step={RANKS}",
    "algorithm.group_size=4",
    "algorithm.micro_batch_size=4",
    "algorithm.kl_coef=0",
    "algorithm.kl_reference=none",
    "optimizer.lr_warmup_steps=0",  # a run of one step and one of thirty begin alike
    "optimizer.lr_decay_style=constant",
    "evaluation.interval=15",
    "evaluation.problems=12",
    "evaluation.final_split=false",
    "checkpoint.interval=15",
    "logging.tensorboard=false",
    "threads=1",
]


def run(folder: Path, ranks: int, *more: str) -> list[dict[str, Any]]:
    """The record of a run of the command line in which nothing fails."""
    whole = Fault(str(folder), [*DEFAULT, *more], ranks, "", 0, 0, "none", limit=1800.0)
    (found,) = do(folder.parent, [whole])
    assert found.statuses == [0] * ranks, found
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(4000)
@pytest.mark.skipif(WARM_UP is None, reason="VP2O_WARM_UP names no warm-up")
def test_eight_ranks_with_one_prompt_each(tmp_path: Path) -> None:
    lines = run(tmp_path / "eight", RANKS, f"algorithm.steps={STEPS}")
    steps = [line for line in lines if line["step"] > 0]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["optimizer/steps"] > STEPS / 2  # the weights moved
    uniform = sum(line["rollout/groups_filtered"] for line in steps) / (STEPS * RANKS)
    print(f"{uniform:.0%} of the groups were uniform")
    assert uniform > 0.25
    (first,) = [line for line in run(tmp_path / "one", 1, "algorithm.steps=1") if line["step"] == 1]
    # Rollouts and filtering are the same to the sample; contexts of the trust region are each rank's own.
    for name in ("reward/mean", "rollout/groups_filtered", "rollout/response_length"):
        assert first[name] == steps[0][name], name
    for name in ("policy/loss", "policy/entropy", "moe/router_entropy", "moe/effective_experts", "stein/self_weight"):
        assert steps[0][name] == pytest.approx(first[name], rel=1e-2, abs=1e-3), name

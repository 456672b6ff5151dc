"""A step that is rejected, skipped or empty leaves nothing behind: the state after it is that before it, bit for bit."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.megatron.step_draws import draw

DRAWS = {1: 4, 2: 7, 4: 1}
"""Cases by number of ranks; VP2O_STEP_DRAWS multiplies them, VP2O_STEP_SEED shifts the seeds."""
MORE, FIRST = int(os.environ.get("VP2O_STEP_DRAWS", "1")), int(os.environ.get("VP2O_STEP_SEED", "0"))


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", DRAWS)
def test_steps_that_are_not_taken_leave_no_trace(world_size: int) -> None:
    cases = [draw(FIRST + seed, world_size) for seed in range(DRAWS[world_size] * MORE)]
    by_rank = run_distributed("tests.megatron.step_job:run", world_size, cases, timeout=120 + 15 * len(cases))
    for index, case in enumerate(cases):
        for rank, results in enumerate(by_rank):
            check(case, results[index], rank)


def check(case: dict[str, Any], found: dict[str, Any], rank: int) -> None:
    where = f"{case}, rank {rank}"
    became = {"empty": "skipped", "no rows": "skipped", "drifted": "rejected"}
    expected = [became.get(event, event) for event in case["events"]]
    assert found["outcomes"] == expected, where
    assert found["traces"] and not any(found["traces"]), (found["traces"], where)
    assert all(found["moved"]), where
    assert found["end"] == [], (found["end"], where)

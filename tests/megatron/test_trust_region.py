"""Rejected steps leave no trace, whatever the layout; distances do not depend on it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import run_distributed

JOB = "tests.megatron.control_job:run"
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "one rank": {},
        "snapshot on the host": {"on_host": True},
        "bfloat16": {"precision": "bf16"},
        "one rank, distributed optimizer": {"distributed_optimizer": True},
    },
    2: {
        "EP=2": {"expert_parallel": 2},
        "EP=2, distributed optimizer": {"expert_parallel": 2, "distributed_optimizer": True},
        "PP=2": {"pipeline_parallel": 2},
        "CP=2, distributed optimizer": {"context_parallel": 2, "distributed_optimizer": True},
        "DP=2, distributed optimizer": {"distributed_optimizer": True},
        "DP=2, distributed optimizer, bfloat16": {"distributed_optimizer": True, "precision": "bf16"},
    },
    4: {
        "TP=2 x EP=2": {"tensor_parallel": 2, "expert_parallel": 2},
        "TP=2 x EP=2, distributed optimizer": {
            "tensor_parallel": 2,
            "expert_parallel": 2,
            "distributed_optimizer": True,
        },
    },
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_rejected_steps_leave_no_trace(world_size: int) -> None:
    layouts = LAYOUTS[world_size]
    by_rank = run_distributed(JOB, world_size, list(layouts.values()), timeout=240)
    for index, name in enumerate(layouts):
        for rank, results in enumerate(by_rank):
            found, where = results[index], f"{name}, rank {rank}"
            assert found["accepted"] and found["rejected"], where
            assert found["untouched"] == [True] * 3, where
            assert found["same_end"] and found["everywhere"], where
            assert found["halvings"] == [3.0] * 3 and found["consecutive"] == 0, where
            assert found["fits"] or found["halved"][0], where
            assert "2 steps in a row left the trust region" in found["error"], where
            assert "algorithm.trust_region.delta=1e-09" in found["error"], where
            # one verdict for all: the very same numbers
            assert found["distance"] == by_rank[0][index]["distance"], where


@pytest.mark.distributed
def test_distance_does_not_depend_on_the_layout() -> None:
    (reference,), *_ = run_distributed(JOB, 1, [{}])
    assert all(distance > 0 for distance in reference["distance"]) and len(reference["by_layer"]) == 2
    for layout in ({"expert_parallel": 2}, {"pipeline_parallel": 2}, {"context_parallel": 2}):
        by_rank = run_distributed(JOB, 2, [layout])
        # contexts are dealt by rank, so with several data- or context-parallel ranks these are others; with pipelines the same
        tolerance = 1e-4 if "pipeline_parallel" in layout else 0.2
        assert by_rank[1][0]["distance"] == pytest.approx(reference["distance"], rel=tolerance)


@pytest.mark.distributed
def test_logged_gates_are_those_of_the_learner() -> None:
    """While weights are the same, gates from decoding with a KV cache are those of a teacher-forced pass: D is 0 up to rounding."""
    for ranks, layout in (
        (1, {}),
        (2, {"expert_parallel": 2}),
        (2, {"pipeline_parallel": 2}),
        (2, {"tensor_parallel": 2}),
        (2, {"context_parallel": 2}),
    ):
        for (found,) in run_distributed("tests.megatron.control_job:fresh", ranks, [layout]):
            assert found["contexts"] > 5 and found["recomputed"] == 0, (layout, found)
            assert found["logged"] < 1e-5, (layout, found)


@pytest.mark.distributed
def test_intervals_do_not_blind_the_trust_region() -> None:
    """D is measured from up-to-date prototypes whatever prototype_interval is, and is 0 where nothing moved."""
    (found,) = run_distributed("tests.megatron.control_job:intervals", 1, {})
    assert all(distance > 1e-3 for distance in found["moved"]["1"])
    for interval in ("2", "5"):
        assert found["moved"][interval] == pytest.approx(found["moved"]["1"], rel=1e-5), interval
    assert all(distance < 1e-3 for distance in found["unmoved"]), found["unmoved"]

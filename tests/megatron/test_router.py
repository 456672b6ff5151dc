"""Router losses, expert biases and routing statistics count each valid token of a step once, and nothing else."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.megatron.router_draws import draw

JOB = "tests.megatron.router_job"
DRAWS = int(os.environ.get("VP2O_ROUTER_DRAWS", "16"))
LAYOUTS: list[dict[str, Any]] = [
    {},  # two data-parallel ranks
    {"tensor_parallel": 2},
    {"expert_parallel": 2},
    {"pipeline_parallel": 2},
    {"tensor_parallel": 2, "expert_parallel": 2},
    {"expert_tensor_parallel": 2, "distributed_optimizer": True},
    {"context_parallel": 2, "expert_parallel": 2},
]


@pytest.mark.distributed
def test_router_losses_are_what_their_coefficients_say() -> None:
    """Whatever the share of loss tokens and the cut into micro-batches: the gradients of the definitions."""
    (results,) = run_distributed(f"{JOB}:compare", 1, list(range(DRAWS)), timeout=60 + 2 * DRAWS)
    for found in results:
        case = found["case"]
        assert found["worst"] <= 2e-5 * max(found["largest"], 1e-3), found
        assert (found["largest"] > 0) == (case["aux"] > 0 or case["z"] > 0), found
        for name, (ours, expected) in found["losses"].items():
            on = case["aux"] > 0 if "balancing" in name else case["z"] > 0
            assert (ours is not None) == on, (name, found)
            assert ours is None or ours == pytest.approx(expected, rel=1e-5), (name, found)
        assert bool(found["biases"]) == (case["bias"] and case["score"] == "sigmoid"), found
        for ours, expected in found["biases"]:
            assert ours == pytest.approx(expected, abs=1e-9) and any(ours), found
    kinds = {(found["case"]["kind"], found["case"]["score"]) for found in results}
    assert len(kinds) >= 5, kinds


def _cases(world_size: int, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draws that mean the same under every layout: data-parallel ranks cut other micro-batches, which aux_loss depends on."""
    rng = random.Random(world_size)
    cases, layouts = [], []
    for number in range(count):
        case, layout = draw(100 + number), LAYOUTS[number % len(LAYOUTS)]
        data_parallel = not {"tensor_parallel", "pipeline_parallel", "context_parallel"} & layout.keys()
        if data_parallel:
            case["kind"] = ("seq_aux_loss", "global_aux_loss")[number % 2]
            case["micro_batch_size"] = case["rows"]
        case |= {"aux": 0.5, "z": 0.1, "last": rng.choice([0, 0, 1, 2]), "orthogonality": rng.choice([0.0, 0.3])}
        cases.append(case)
        layouts.append(layout)
    return cases, layouts


@pytest.mark.distributed
def test_rows_dealt_unevenly_count_once() -> None:
    """Five rows and none, padding, and dummies: losses, C, statistics and biases of the single process."""
    cases, layouts = _cases(2, 14)
    assert any(case["last"] == 0 and not layout for case, layout in zip(cases, layouts, strict=True))
    (single,) = run_distributed(f"{JOB}:layout", 1, cases, [{}] * len(cases), timeout=120)
    by_rank = run_distributed(f"{JOB}:layout", 2, cases, layouts, timeout=240)
    for index, (case, layout) in enumerate(zip(cases, layouts, strict=True)):
        for rank, results in enumerate(by_rank):
            ours, expected, where = results[index], single[index], (case, layout, rank)
            assert ours["skipped"] is expected["skipped"] is False, where
            assert ours["norm"] == pytest.approx(expected["norm"], rel=1e-4), where
            assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-5), where
            assert ours["statistics"] == pytest.approx(expected["statistics"], rel=1e-4, abs=1e-5), where
            for name in ("biases", "coactivation"):
                for layer, values in ours[name].items():
                    assert _flat(values) == pytest.approx(_flat(expected[name][layer]), abs=1e-6), (name, *where)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks,layout", [(1, {}), (2, {"tensor_parallel": 2, "expert_parallel": 2})])
def test_actors_take_expert_biases(ranks: int, layout: dict[str, Any]) -> None:
    """And a learner with the counters of global_aux_loss hands its weights to actors, which have none."""
    cases = [
        draw(seed) | {"score": "sigmoid", "bias": bias, "kind": "global_aux_loss", "aux": 0.1}
        for seed, bias in ((0, True), (1, False))
    ]
    for results in run_distributed(f"{JOB}:actors", ranks, cases, layout):
        assert [found["moved"] > 0.1 for found in results] == [True, False]
        assert all(found["mismatch"] <= 1e-5 for found in results), results


def _flat(values: list[Any]) -> list[float]:
    return [x for row in values for x in (row if isinstance(row, list) else [row])]

"""Whole runs on the pretended device: nothing is on the wrong device, and the host waits only where docs/gpu.md says so.

VP2O_PRETEND_LAYOUTS=1 adds tensor and pipeline parallelism and the other recipes (two minutes more).
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ROOT, run_distributed
from tests.pretend.job_names import GENERATION, ON_CPU, REFRESH

JOB = "tests.pretend.job:run"
RECIPE = "countdown_tiny_vp2o"
SHORT = ["algorithm.steps=4", "algorithm.prompts_per_step=4", "algorithm.minibatches=1", "optimizer.lr=1e-3"]
PACKED = ["algorithm.micro_batch_tokens=512"]
MOST_WAITS = 12
"""Of a step of the default recipe, outside of generation: four optimizer steps, and a refresh of the actors. Each halving of a step
by the trust region is one more."""

everything = pytest.mark.skipif("VP2O_PRETEND_LAYOUTS" not in os.environ, reason="VP2O_PRETEND_LAYOUTS=1 runs it")


def run(folder: Path, *overrides: str, ranks: int = 1, recipe: str = RECIPE, env: dict[str, str] | None = None) -> Any:
    """Results by step of the first rank, once all ranks have been found to compute on one device."""
    results = run_distributed(JOB, ranks, recipe, str(folder), [*SHORT, *overrides], timeout=300, env=env)
    for result in results:
        assert result["status"] == 0
        assert result["where"] == (["cpu"] if env and ON_CPU in env else ["pretend:0"])
    return results[0]["steps"]


def numbers(steps: list[Any]) -> list[dict[str, float]]:
    """Metrics but for times."""
    return [{k: v for k, v in step["metrics"].items() if not k.startswith("time/")} for step in steps]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The default VP2O recipe in float32 on one process: engine, learner, hook, trust region, budget, checkpoints, evaluation."""
    folder = tmp_path_factory.mktemp("pretend") / "run"
    return folder, run(folder)


def test_a_resumed_run_is_the_same(plain: tuple[Path, Any], tmp_path: Path) -> None:
    folder, steps = plain
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    newest = max((again / "checkpoints").glob("step_*"))
    shutil.rmtree(newest)
    (again / "checkpoints" / "latest").unlink(missing_ok=True)
    resumed = run(again)
    assert len(resumed) == 2
    assert numbers(resumed) == numbers(steps[2:])


def test_the_host_waits_where_the_documentation_says_so(plain: tuple[Path, Any], tmp_path: Path) -> None:
    """Besides the default run: four minibatches, a refresh before every batch, a region so wide that nothing is rejected."""
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")))
    wide = ["algorithm.trust_region.delta=1", "algorithm.budget.max_age=1"]
    four = run(tmp_path / "run", "algorithm.minibatches=4", "algorithm.prompts_per_step=8", *wide)
    whole, settled = 0, 0
    for step in (*plain[1], *four):
        updates, waits, refreshed, first = 0, 0, False, 0
        for phase, why, line, count in step["waits"]:
            asked = re.split("[.:]", line.partition(" < ")[0])[-1]
            assert phase == GENERATION or asked in documented, (phase, why, line)
            waits += count * (phase != GENERATION)
            refreshed |= phase == REFRESH
            updates += count * (asked == "_propose")
            first += count * (asked == "settle")
        settled += first
        halvings = round(step["metrics"]["trust_region/halvings"] * updates)
        assert updates < waits <= MOST_WAITS + halvings + first, step["waits"]
        assert waits - halvings - first <= MOST_WAITS - 4 + updates, "each optimizer step is one"
        whole += refreshed and updates == 4
    assert whole and settled == 2, "once in each of the two runs"


def test_bfloat16_packed_rows_and_replayed_routes(tmp_path: Path) -> None:
    steps = run(tmp_path / "run", *PACKED, "model.precision=bf16", "rollout.router_replay=R3")
    assert all(step["metrics"]["replay/tokens"] > 0 for step in steps)
    assert all(step["metrics"]["policy/logprob_mismatch"] < 0.1 for step in steps)


def test_two_ranks_with_half_of_the_experts_each(tmp_path: Path) -> None:
    """Packed rows change their rank; the trust region asks for the gates where they were logged."""
    steps = run(tmp_path / "run", *PACKED, "parallel=expert2", "rollout.router_replay=R2", ranks=2)
    assert all(step["metrics"]["optimizer/grad_norm"] > 0 for step in steps)


@pytest.mark.parametrize("mistake", ["advantages", "statistics", "anchor"])
def test_a_tensor_on_the_wrong_device_ends_the_run(mistake: str, tmp_path: Path) -> None:
    (found,) = run_distributed(
        "tests.pretend.job:run_with", 1, mistake, RECIPE, str(tmp_path / "run"), [*SHORT, "evaluation=quick"]
    )
    assert found.startswith("MixedDevices") and " on cpu" in found, found


def test_the_step_computes_what_it_computes_on_the_cpu(plain: tuple[Path, Any], tmp_path: Path) -> None:
    """Except for rounding: experts are computed in one product there, one by one on the CPU."""
    here = numbers(plain[1])
    there = numbers(run(tmp_path / "cpu", env={ON_CPU: "1"}))
    assert len(here) == len(there) == 4 and here[0].keys() == there[0].keys()
    for key in (
        "policy/loss",
        "optimizer/grad_norm",
        "policy/entropy",
        "moe/router_entropy",
        "stein/prototype_overlap",
    ):
        assert [step[key] for step in here] == pytest.approx([step[key] for step in there], rel=2e-3), key
    assert here[0]["optimizer/grad_norm"] > 0 and here[-1]["trust_region/distance"] > 0


@everything
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["model.recompute=true", "algorithm.minibatches=2", *PACKED]),
        (1, ["algorithm.specialization.orthogonality_coef=0.1", "algorithm.specialization.variance_coef=0.1"]),
        (1, ["algorithm.trust_region.snapshot_on_host=true", "optimizer.lr=1e-1"]),
        (2, ["parallel=tensor2", *PACKED]),
        (2, ["parallel=tensor2", "model.precision=bf16", "rollout.router_replay=R3"]),
        (2, ["parallel=pipeline2", "rollout.router_replay=R2"]),
        (2, ["parallel=pipeline2", "model.precision=bf16", *PACKED]),
        (2, ["parallel.distributed_optimizer=true", "model.precision=bf16"]),
        (2, ["parallel.overlap_grad_reduce=true"]),
        (
            1,
            [
                "model.implementation=torch",
                "model.recompute=true",
                "model.precision=bf16",
                "algorithm.minibatches=2",
                *PACKED,
            ],
        ),
        (2, ["model.implementation=torch", "parallel=tensor2", "rollout.router_replay=R3", *PACKED]),
        (2, ["model.implementation=torch", "parallel=tensor2", "parallel.expert_tensor_parallel=2"]),
        (2, ["model.implementation=torch", "parallel=pipeline2", "model.precision=bf16", *PACKED]),
        (2, ["model.implementation=torch", "parallel.overlap_grad_reduce=true"]),
    ],
    ids=lambda value: f"{value}" if isinstance(value, int) else "+".join(value),
)
def test_other_settings(ranks: int, overrides: list[str], tmp_path: Path) -> None:
    steps = run(tmp_path / "run", *overrides, ranks=ranks)
    assert steps and all(step["metrics"]["optimizer/grad_norm"] > 0 for step in steps)


def test_the_torch_implementation_goes_on_from_a_checkpoint_of_local(tmp_path: Path) -> None:
    """And to the same end, but for rounding; both on two ranks with half of the experts each, rows packed, shards of gradients."""
    layout = ["parallel=expert2", "parallel.distributed_optimizer=true", "rollout.router_replay=R2", *PACKED]
    steps = run(tmp_path / "local", *layout, ranks=2)
    again = tmp_path / "torch"
    shutil.copytree(tmp_path / "local", again)
    shutil.rmtree(max((again / "checkpoints").glob("step_*")))
    (again / "checkpoints" / "latest").unlink(missing_ok=True)
    resumed = run(again, *layout, "model.implementation=torch", ranks=2)
    assert len(resumed) == 2
    for key in ("policy/loss", "optimizer/grad_norm", "policy/entropy", "moe/router_entropy"):
        found, expected = ([step["metrics"][key] for step in some] for some in (resumed, steps[2:]))
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-6), key


@everything
@pytest.mark.parametrize("recipe", ["countdown_tiny_grpo", "addends_tiny_grpo", "coloring_tiny_grpo"])
def test_other_recipes(recipe: str, tmp_path: Path) -> None:
    assert run(tmp_path / "run", recipe=recipe)

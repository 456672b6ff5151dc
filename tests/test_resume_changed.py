"""What changed between a run's stop and its next start: refused where the result would be wrong, named where it is a choice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.resume_draws import SMALL, record
from tests.resume_job import Run, run_in_one_process

REFUSED = 2
TINY = [
    *SMALL,
    "evaluation.interval=0",
    "model.moe_router_topk=2",
    "checkpoint.interval=1",
    "checkpoint.keep=9",
    "optimizer.lr_warmup_steps=0",
]
SUPERVISED = ["--config-name=countdown_tiny_supervised", *TINY, "algorithm.global_batch_size=8"]
BATCH = ["algorithm.prompts_per_step=4", "algorithm.group_size=4", "algorithm.minibatches=1"]
GRPO = ["--config-name=countdown_tiny_grpo", *TINY, *BATCH, "rollout.refresh_interval=5"]
VP2O = ["--config-name=countdown_tiny_vp2o", *TINY, *BATCH, "rollout.refresh_interval=5", "algorithm.objective=grpo"]
UNBOUNDED = ["algorithm.trust_region.mode=off", "algorithm.budget.mode=off"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_what_changed_since_the_stop(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} {i + 1}={2 * i + 1}"}) + "\n" for i in range(60)))

    def do(name: str, *runs: tuple[str, list[str]]) -> tuple[list[int], list[str]]:
        """Exit statuses of runs (folder, arguments) and what they printed."""
        folder = tmp_path / name
        statuses = run_in_one_process(folder, [Run(str(tmp_path / run), given, earn=True) for run, given in runs])
        return [found for (found,) in statuses], [
            (folder / f"output-{number}.txt").read_text() for number in range(len(runs))
        ]

    jsonl = [
        "--config-name=text_tiny_supervised",
        *TINY,
        "algorithm.global_batch_size=4",
        f"algorithm.data.path={text}",
    ]
    from_warm_up = [
        *GRPO,
        f"init_from={tmp_path / 'warm_up'}",
        "algorithm.kl_reference=initial",
        "algorithm.kl_coef=0.1",
    ]
    statuses, _ = do(
        "first",
        ("warm_up", [*SUPERVISED, "algorithm.steps=2"]),
        ("text", [*jsonl, "algorithm.steps=2"]),
        ("reference", [*from_warm_up, "algorithm.steps=2"]),
        ("unbounded", [*VP2O, *UNBOUNDED, "algorithm.steps=2"]),
        ("choices", [*GRPO, "algorithm.steps=2"]),
    )
    assert statuses == [0] * 5
    # What a user may do meanwhile: train the warm-up further, add to the data.
    untouched = {name: contents(tmp_path / name) for name in ("text", "reference", "choices")}
    with text.open("a") as file:
        file.write('{"text": "7 7=14"}\n')
    bounded = [
        "algorithm.trust_region.mode=enforce",
        "algorithm.budget.mode=enforce",
        "algorithm.trust_region.delta=0.5",
    ]
    statuses, said = do(
        "second",
        ("warm_up", [*SUPERVISED, "algorithm.steps=4"]),
        ("text", [*jsonl, "algorithm.steps=4"]),
        ("reference", [*from_warm_up, "algorithm.steps=4"]),
        ("choices", [*GRPO, "algorithm.steps=4", "seed=7"]),
        ("unbounded", [*VP2O, *bounded, "algorithm.steps=5"]),
    )
    assert statuses == [0, REFUSED, REFUSED, REFUSED, 0], said
    assert "60 documents" in said[1] and "61 documents" in said[1] and "data of algorithm.data.path" in said[1]
    assert "error: the KL reference" in said[2] and "init_from" in said[2]
    assert "seed is 1234 there and 7 here" in said[3]
    for name, before in untouched.items():
        assert contents(tmp_path / name) == before, name
    assert not any("Traceback" in text for text in said)

    # The trust region and the budget were switched on in mid-run: actors are refreshed, then there is an anchor.
    assert (
        "step_000002 has no anchor" in said[4]
        and "algorithm.trust_region.mode is off there and enforce here" in said[4]
    )
    lines = record(tmp_path / "unbounded")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    measured: list[Any] = [line["trust_region/distance"] for line in lines]
    assert measured[:3] == [None] * 3 and all(distance >= 0 for distance in measured[3:])
    assert lines[-1]["optimizer/steps"] > lines[2]["optimizer/steps"]
    assert lines[3]["actor/refreshes"] == lines[2]["actor/refreshes"] + 1

    # Put back, everything goes on; and other settings are named.
    text.write_text("".join(text.read_text().splitlines(keepends=True)[:60]))
    shutil.rmtree(tmp_path / "warm_up" / "checkpoints" / "step_000004")
    (tmp_path / "warm_up" / "checkpoints" / "latest").write_text("step_000002\n")
    if not (tmp_path / "warm_up" / "checkpoints" / "step_000002").exists():
        pytest.fail("the warm-up's second step was to be kept")
    statuses, said = do(
        "third",
        ("text", [*jsonl, "algorithm.steps=4", "name=renamed"]),
        ("reference", [*from_warm_up, "algorithm.steps=4"]),
        ("choices", [*GRPO, "algorithm.steps=4", "optimizer.lr=3e-3", "algorithm.entropy_coef=0.01"]),
    )
    assert statuses == [0, 0, 0], said
    assert "going on with other settings: " in said[2] and "optimizer.lr is 0.0002 there and 0.003 here" in said[2]
    assert "name" not in said[0].split("going on with other settings: ")[1].splitlines()[0]

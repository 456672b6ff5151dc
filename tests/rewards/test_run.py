"""A whole run on rows with a composed reward, under tensor parallelism, where one rank grades for both."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.resume_job import Run, run_in_one_process

SMALL = {
    "task": "rows",
    "task.validation_size": 4,
    "task.test_size": 4,
    "reward.workers": 1,
    "model": "micro",
    "model.max_sequence_length": 32,
    "init_from": "null",
    "algorithm.steps": 2,
    "algorithm.prompts_per_step": 2,
    "algorithm.group_size": 4,
    "evaluation.problems": 2,
    "evaluation.samples": 2,
    "evaluation.pass_at": "[1]",
}


def inputs(folder: Path) -> dict[str, object]:
    """Rows of sums and a user's reward: settings that name them."""
    draw = random.Random(0)
    sums = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(40)]
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a, b in sums))
    (folder / "digits.py").write_text(
        "def share(prompts, responses, rows):\n"
        "    return [sum(c.isdigit() for c in r) / max(len(r), 1) for r in responses]\n"
    )
    return {"task.path": rows, "reward.path": f"{folder / 'digits.py'}:share"}


def record(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_grading_beside_generation_changes_no_number(tmp_path: Path) -> None:
    """A function in the training process is called after all rollouts; in workers, while later ones are generated."""
    settings = [f"{key}={value}" for key, value in {**SMALL, **inputs(tmp_path)}.items()]
    settings += ["rollout.max_batch_size=4", "algorithm.filter_uniform_groups=false", "optimizer.lr=1e-2", "threads=1"]
    runs = [
        Run(str(tmp_path / name), ["--config-name=countdown_tiny_grpo", *settings, f"reward.in_process={name}"])
        for name in ("false", "true")
    ]
    assert [status for (status,) in run_in_one_process(tmp_path / "job", runs)] == [0, 0]
    beside, after = (
        [
            {key: value for key, value in line.items() if not key.startswith("time/")}
            for line in record(Path(run.run_dir))
        ]
        for run in runs
    )
    assert len(beside) == 3 and beside[1]["reward/mean"] > 0 and beside[1]["optimizer/grad_norm"] > 0
    assert beside == after


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_on_rows_with_a_composed_reward(tmp_path: Path) -> None:
    overrides = {
        **SMALL,
        **inputs(tmp_path),
        "reward": "math",
        "reward.weights.own": 0.5,
        "reward.overlong_buffer": 4,
        "reward.mask_truncated": "true",
        "parallel": "tensor2",
        "run_dir": tmp_path / "run",
    }
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    run_distributed("megatron_vp2o.train", 2, "--config-name", "countdown_tiny_grpo", *arguments, timeout=300)
    lines = record(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        parts = {key: line[f"reward/part/{key}"] for key in ("math", "own", "overlong")}
        assert 0 <= parts["math"] <= 1 and parts["math"] == pytest.approx(line["rollout/pass_rate"])
        assert 0 < parts["own"] <= 0.5 and -1 <= parts["overlong"] <= 0
        assert line["reward/mean"] == pytest.approx(parts["math"] + parts["own"], abs=1e-6)
        assert line["reward/shaped_mean"] == pytest.approx(sum(parts.values()), abs=1e-6)

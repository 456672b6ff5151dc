"""A whole run on rows with a composed reward, under tensor parallelism, where one rank grades for both."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.distributed import run_distributed


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_on_rows_with_a_composed_reward(tmp_path: Path) -> None:
    draw = random.Random(0)
    sums = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(40)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a, b in sums))
    (tmp_path / "digits.py").write_text(
        "def share(prompts, responses, rows):\n"
        "    return [sum(c.isdigit() for c in r) / max(len(r), 1) for r in responses]\n"
    )
    overrides = {
        "task": "rows",
        "task.path": rows,
        "task.validation_size": 4,
        "task.test_size": 4,
        "reward": "math",
        "reward.path": f"{tmp_path / 'digits.py'}:share",
        "reward.weights.own": 0.5,
        "reward.overlong_buffer": 4,
        "reward.mask_truncated": "true",
        "reward.workers": 1,
        "model": "micro",
        "model.max_sequence_length": 32,
        "parallel": "tensor2",
        "init_from": "null",
        "algorithm.steps": 2,
        "algorithm.prompts_per_step": 2,
        "algorithm.group_size": 4,
        "evaluation.problems": 2,
        "evaluation.samples": 2,
        "evaluation.pass_at": "[1]",
        "run_dir": tmp_path / "run",
    }
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    run_distributed("megatron_vp2o.train", 2, "--config-name", "countdown_tiny_grpo", *arguments, timeout=300)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        parts = {key: line[f"reward/part/{key}"] for key in ("math", "own", "overlong")}
        assert 0 <= parts["math"] <= 1 and parts["math"] == pytest.approx(line["rollout/pass_rate"])
        assert 0 < parts["own"] <= 0.5 and -1 <= parts["overlong"] <= 0
        assert line["reward/mean"] == pytest.approx(parts["math"] + parts["own"], abs=1e-6)
        assert line["reward/shaped_mean"] == pytest.approx(sum(parts.values()), abs=1e-6)

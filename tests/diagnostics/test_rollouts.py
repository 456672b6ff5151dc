"""Metrics of recorded rollouts, against counting by hand, and against a run of this project that wrote the file."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.diagnostics.__main__ import main
from megatron_vp2o.diagnostics.rollouts import metrics_by_step, read_rollouts, rollout_metrics
from megatron_vp2o.errors import ConfigError, DataError


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("seed", range(5))
def test_both_forms_of_a_file_say_the_same_and_what_counting_says(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    steps, prompts, size = 3, 4, 6
    groups = {
        (step, f"p{p}"): [(draw.choice("abcd"), draw.random() < 0.5) for _ in range(size)]
        for step in range(steps)
        for p in range(prompts)
    }
    nested = [
        {"step": s, "problem": p, "responses": [{"answer": a, "correct": right} for a, right in group]}
        for (s, p), group in groups.items()
    ]
    flat = [
        {"step": s, "input": p, "output": f" {a}\n", "score": 1.0 if right else -1.0}
        for (s, p), group in groups.items()
        for a, right in group
    ]
    draw.shuffle(flat)
    found = rollout_metrics(read_rollouts(write(tmp_path / "nested.jsonl", nested)))
    same = rollout_metrics(read_rollouts(write(tmp_path / "flat.jsonl", flat)))
    assert found == pytest.approx(same)
    count = len(groups)
    right = {key: [a for a, ok in group if ok] for key, group in groups.items()}
    assert found["rollout/pass_rate"] == pytest.approx(sum(map(len, right.values())) / (count * size))
    assert found["rollout/pass_any"] == pytest.approx(sum(bool(r) for r in right.values()) / count)
    assert found["rollout/distinct"] == pytest.approx(sum(len(set(r)) for r in right.values()) / count)
    entropies = [-sum(r.count(a) / len(r) * math.log(r.count(a) / len(r)) for a in set(r)) for r in right.values() if r]
    assert found["rollout/answer_entropy"] == pytest.approx(sum(entropies) / len(entropies))
    pairs = size * (size - 1) / 2
    wrong = [size - len(r) for r in right.values()]
    assert found["rollout/pass@2"] == pytest.approx(sum(1 - w * (w - 1) / 2 / pairs for w in wrong) / count)
    by_step = metrics_by_step(read_rollouts(tmp_path / "flat.jsonl"))
    assert list(by_step) == [0, 1, 2]
    mean = sum(one["rollout/distinct"] for one in by_step.values()) / 3
    assert mean == pytest.approx(found["rollout/distinct"])


def test_mismatch_of_two_engines(tmp_path: Path) -> None:
    draw = random.Random(4)
    rows, differences = [], []
    for i in range(5):
        engine = [-draw.random() for _ in range(3 + i)]
        learner = [value + draw.gauss(0, 0.1) for value in engine]
        differences += [a - b for a, b in zip(learner, engine, strict=True)]
        rows.append(
            {"prompt": "x", "output": str(i), "score": 1, "old_log_probs": learner, "rollout_log_probs": engine}
        )
    found = rollout_metrics(read_rollouts(write(tmp_path / "f.jsonl", rows)))
    assert found["policy/logprob_mismatch"] == pytest.approx(max(map(abs, differences)))
    assert found["policy/logprob_mismatch_mean"] == pytest.approx(sum(map(abs, differences)) / len(differences))
    assert found["policy/mismatch_kl"] == pytest.approx(
        sum(math.exp(d) - 1 - d for d in differences) / len(differences)
    )


def test_names_of_a_file_and_solutions(tmp_path: Path) -> None:
    rows = [{"q": "x", "said": a, "points": 0.4, "solutions": 4} for a in ("1", "2", "2")]
    groups = read_rollouts(
        write(tmp_path / "f.jsonl", rows), right_from=0.4, names={"prompt": "q", "answer": "said", "score": "points"}
    )
    assert rollout_metrics(groups)["rollout/coverage"] == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="unknown field 'answr': choose from step, prompt"):
        read_rollouts(tmp_path / "f.jsonl", names={"answr": "said"})


def test_a_torn_last_line_is_left_out_and_another_one_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [{"input": "x", "output": "1", "score": 1}])
    with path.open("a") as file:
        file.write('{"input": "x", "outp')
    assert len(read_rollouts(path)[0].responses) == 1
    path.write_text('{"input": "x", "output": "1", "score": 1}\n{"input": "x", "outp\n')
    with pytest.raises(DataError, match=r"f\.jsonl:2: not JSON"):
        read_rollouts(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"output": "1", "score": 1}, "no prompt to group by"),
        ({"input": "x", "score": 1}, "neither answer nor text"),
        ({"input": "x", "output": "1"}, "nothing says whether a response is right"),
        ({"input": "x", "output": "1", "score": 1, "step": "a"}, "step is 'a'"),
        ([1], "list, expected an object"),
        ({"input": "x", "responses": 3}, "responses is int"),
        (
            {"input": "x", "output": "1", "score": 1, "logprobs": [1], "rollout_logprobs": [1, 2]},
            "1 logprobs and 2 rollout_logprobs",
        ),
        ({"input": "x", "output": "1", "score": 1, "logprobs": ["a"]}, "logprobs is not a list of numbers"),
    ],
)
def test_lines_that_cannot_be_read_are_named(
    tmp_path: Path, row: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "f.jsonl", [row])
    with pytest.raises(DataError, match=message):
        read_rollouts(path)
    assert main(["rollouts", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "f.jsonl:1" in said


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match="no whole line with a response"):
        read_rollouts(path)

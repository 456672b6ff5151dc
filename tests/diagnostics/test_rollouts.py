"""Metrics of recorded rollouts, against counting by hand, and against a run of this project that wrote the file."""

from __future__ import annotations

import json
import math
import os
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
    path.write_text('{"input": "x", "output": "1", "score": 1}\n{"input": "x", "output": "2", "score": 1}')
    assert len(read_rollouts(path)[0].responses) == 2  # whole, with no end of line
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
        ({"input": "x", "output": "1", "score": 1, "logprobs": [math.nan]}, "logprobs has a number that is not finite"),
        ({"input": "x", "output": "1", "score": math.nan}, "the score is nan"),
        ({"input": "x", "output": "1", "score": "1"}, "the score is '1'"),
        ({"input": "x", "output": "1", "score": 10**400}, r"the score is 10+\.\.\.,"),
        ({"input": "x", "output": "1", "correct": "false"}, "correct is 'false', expected true or false"),
        ({"input": "x", "output": "1", "score": 1, "solutions": "many"}, "solutions is 'many'"),
        ({"input": "x", "output": "1", "score": 1, "solutions": 0}, "solutions is 0"),
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


@pytest.mark.parametrize("content", ["", "\n\n", '{"input": "x", "responses": []}\n', '{"input": "x", "outp'])
def test_a_file_without_a_response_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="no whole line with a response"):
        read_rollouts(path)


def test_more_right_answers_than_there_are_is_refused(tmp_path: Path) -> None:
    rows = [{"input": "x", "output": str(i), "score": 1, "solutions": 2} for i in range(3)]
    with pytest.raises(DataError, match="prompt 'x': 3 different right answers, and the file says that there are 2"):
        read_rollouts(write(tmp_path / "f.jsonl", rows))


def test_a_missing_file_and_what_the_command_line_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path / "none.jsonl")], f"error: {tmp_path}/none.jsonl: No such file"),
        ([str(tmp_path)], f"error: {tmp_path}: Is a directory"),
        ([str(tmp_path), "--name", "answer"], "error: --name 'answer': write FIELD=NAME"),
        ([str(tmp_path), "--right-from", "nan"], "error: right_from=nan must be a finite number"),
    ):
        assert main(["rollouts", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith(message) and said.count("\n") == 1


ODD: list[Any] = [
    None,
    True,
    "",
    "x",
    "1",
    -1,
    0,
    3,
    0.5,
    math.nan,
    math.inf,
    1e308,
    10**400,
    [],
    [1],
    [math.nan],
    {},
    {"a": 1},
]


def _odd_file(draw: random.Random) -> bytes:
    """Lines that were good, and had something done to them."""
    lines = []
    for i in range(draw.randint(0, 6)):
        row: dict[str, Any] = {"step": i % 2, "input": draw.choice("ab"), "output": draw.choice("xyz"), "score": 1.0}
        row |= {"log_probs": [-1.0, -0.5], "rollout_log_probs": [-1.1, -0.4], "n_solutions": 3}
        if draw.random() < 0.3:
            row = {
                "step": 1,
                "problem": "p",
                "responses": [{"answer": "1", "correct": True}, {"text": "2", "correct": False}],
            }
        for _ in range(draw.choice([0, 0, 1, 2])):
            inner = row.get("responses")
            target = draw.choice([row, *(inner if isinstance(inner, list) and all(inner) else [])])
            if not isinstance(target, dict):
                continue
            target[draw.choice([*target, "answer", "correct", "solutions"])] = draw.choice(ODD)
        lines.append(json.dumps(row))
    raw = bytearray("\n".join(lines).encode() + draw.choice([b"", b"\n"]))
    for _ in range(draw.choice([0, 0, 0, 1, 3])):
        if raw:
            raw[draw.randrange(len(raw))] = draw.randrange(256)
    return bytes(raw[: draw.choice([len(raw), len(raw), draw.randint(0, len(raw))])])


def _no_json(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_odd_files_give_valid_json_or_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as VP2O_DIAGNOSTICS_FUZZ says; the seed of a file that fails is in the message."""
    path, outcomes = tmp_path / "f.jsonl", {0: 0, 2: 0}
    for seed in range(int(os.environ.get("VP2O_DIAGNOSTICS_FUZZ", "400"))):
        draw = random.Random(seed)
        path.write_bytes(_odd_file(draw))
        try:
            status = main(["rollouts", str(path), *draw.choice([[], ["--by-step"]])])
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        said = capsys.readouterr()
        outcomes[status] += 1
        if status == 0:
            json.loads(said.out, parse_constant=_no_json)
        else:
            assert said.err.startswith(f"error: {path}") and said.err.count("\n") == 1, (seed, said.err)
            assert len(said.err) < 500, seed
    assert min(outcomes.values()) > 50

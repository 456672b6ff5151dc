"""What `make run-rows` starts from: the reward is worth what the rows say, and both files are rows of one data set."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from megatron_vp2o.config.reward import RewardConfig, RewardWeights
from megatron_vp2o.config.rows import RowsTaskConfig
from megatron_vp2o.rewards import make_reward
from megatron_vp2o.rl.types import Split
from megatron_vp2o.tasks import make_task
from tools.arithmetic_rows import UNSURE, WORDS, questions, write_checkpoint, write_rows

pytest.importorskip("pyarrow")


def value(prompt: str) -> Fraction:
    """What the question asks for, read from its text alone."""
    text = prompt.replace("$", "").replace("?", "").replace("=", "").rstrip(". ")
    words = text.replace("\\frac{", "").replace("}{", "/").replace("}", "").split()
    found = [Fraction(WORDS.index(word)) if word in WORDS else _number(word) for word in words]
    a, b = (number for number in found if number is not None)
    if "Take" in words:
        return b - a
    return a - b if {"minus", "less", "-"} & set(words) else a + b


def _number(word: str) -> Fraction | None:
    try:
        return Fraction(word)
    except ValueError:
        return None


def test_an_unsure_answer_earns_nothing_and_every_other_is_right() -> None:
    rows = list(questions())
    reward = make_reward(RewardConfig(RewardWeights(math=1.0), workers=1))
    assert reward is not None
    some = rows[::7]
    with reward:
        results = reward([row["prompt"] for row in some], [row["completion"] for row in some], some)
    unsure = [" or " in row["completion"] for row in some]
    assert [result.reward for result in results] == [float(not one) for one in unsure]
    assert sum(" or " in row["completion"] for row in rows) / len(rows) == pytest.approx(UNSURE, abs=0.05)
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        plain = row["answer"].strip("$").replace("\\frac{", "").replace("}{", "/").replace("}", "")
        assert Fraction(plain) == value(row["prompt"]), row
    forms = {"It is ", "\\boxed{", "$"}
    assert {form for row in rows for form in forms if row["completion"].startswith(form)} == forms


def test_jsonl_and_parquet_are_one_data_set_under_the_checkpoints_template(tmp_path: Path) -> None:
    write_rows(tmp_path / "data")
    write_checkpoint(tmp_path / "hf")
    config = RowsTaskConfig(path=str(tmp_path / "data"), tokenizer=str(tmp_path / "hf"), test_size=0)
    task = make_task(config, room=60)
    rows = {row["prompt"]: row for row in questions()}
    seen = [task.problem(split, i) for split in (Split.train, Split.validation) for i in range(task.size(split))]
    assert len(seen) == len(rows)
    sources = {Path(problem.data["__source__"].partition(",")[0]).name for problem in seen}
    assert sources == {"questions.jsonl", "more.parquet"}
    for problem in seen[::50]:
        prompt = problem.data["prompt"]
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        assert problem.prompt == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        assert task.demonstration(problem, 0) == rows[text]["completion"]
        ids = task.tokenizer.encode(rows[text]["completion"])
        assert task.tokenizer.decode(ids) == rows[text]["completion"] and len(ids) < 24

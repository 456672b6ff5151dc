"""Rows of files and of places elsewhere: what is read, noticed and refused."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.errors import ConfigError, DataError
from megatron_vp2o.evaluation import fetch as fetching
from megatron_vp2o.evaluation.benchmark import Remote
from megatron_vp2o.evaluation.benchmarks import BENCHMARKS, SUITES, chosen
from megatron_vp2o.evaluation.data import load


def _rows(name: str) -> list[dict[str, Any]]:
    """Rows under the names that the published files have."""
    rows: dict[str, list[dict[str, Any]]] = {
        "aime24": [{"ID": "2024-I-1", "Problem": "1+1?", "Answer": 2, "Solution": "x"}],
        "aime25": [{"id": "0", "problem": "1+1?", "answer": "002"}],
        "gpqa": [{"Record ID": "r", "Question": "q", "Correct Answer": "c ", "Incorrect Answer 1": "x",
                  "Incorrect Answer 2": "y", "Incorrect Answer 3": "z", "High-level domain": "Physics"}],
        "mmlu_pro": [{"question_id": 70, "question": "q", "options": ["a", "b", "c"], "answer": "C", "answer_index": 2,
                      "category": "law"}],
        "ifeval": [{"key": 1000, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}],
        "codeforces": [{"id": "1/A", "contest_id": "1", "index": "A", "title": "T", "description": "d", "rating": 800.0,
                        "time_limit": 1.0, "memory_limit": 64.0, "official_tests": [{"input": "1", "output": "1"}],
                        "generated_checker": "print(1)", "examples": [{"input": "1", "output": "1"}]}],
    }  # fmt: skip
    return rows[name]


@pytest.mark.parametrize("name", ["aime24", "aime25", "gpqa", "mmlu_pro", "ifeval", "codeforces"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_published_columns_are_known_in_both_formats(name: str, suffix: str, tmp_path: Path) -> None:
    rows = _rows(name)
    if suffix == "jsonl":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    found = load(BENCHMARKS[name], str(tmp_path), 0)
    (question,) = found.questions
    assert not found.own and question.prompt and found.revision.startswith("local file")
    if name == "gpqa":
        letter = question.row["answer"]
        assert f"{letter}) c\n" in question.prompt + "\n"
    if name.startswith("aime"):
        assert question.row["answer"] == "2"
    if name == "ifeval":
        assert question.row["kwargs"] == [{}]


def test_choices_are_shuffled_by_seed_and_name_and_nothing_else() -> None:
    orders = [[q.prompt for q in load(BENCHMARKS["gpqa"], "own", seed).questions] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    letters = {q.row["answer"] for seed in range(8) for q in load(BENCHMARKS["gpqa"], "own", seed).questions}
    assert letters == set("ABCD")


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("aime24", {"problem": "p", "answer": "1000"}, "not an integer from 0 to 999"),
        ("aime24", {"problem": "p"}, "none of the columns answer, Answer"),
        ("gpqa", {"question": "q", "correct": "a", "incorrect": ["a", "b", "c"]}, "the same text"),
        ("gpqa", {"question": "q", "correct": "a", "incorrect": ["b"]}, "not three incorrect"),
        ("mmlu_pro", {"question": "q", "options": ["a"], "answer": "A", "category": "x"}, "two to ten"),
        ("mmlu_pro", {"question": "q", "options": ["a", "b"], "answer": "C", "category": "x"}, "not one of AB"),
        ("ifeval", {"prompt": "p", "instruction_id_list": ["a", "b"], "kwargs": [{}]}, "two lists of the same length"),
        ("codeforces", {"description": "d", "rating": 800}, "it has no tests"),
        (
            "codeforces",
            {"description": "d", "rating": None, "tests": [{"input": "", "output": ""}]},
            "its rating is None",
        ),
    ],
)
def test_rows_that_are_no_questions_are_named(name: str, row: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"{name}.jsonl, row 1: .*{said}"):
        load(BENCHMARKS[name], str(tmp_path), 0)


def test_what_is_missing_is_named_with_the_command_that_brings_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"make eval-data BENCHMARKS=gpqa DATA=.*--data own"):
        load(BENCHMARKS["gpqa"], str(tmp_path), 0)
    (tmp_path / "gpqa.jsonl").write_text("")
    with pytest.raises(DataError, match="has no rows"):
        load(BENCHMARKS["gpqa"], str(tmp_path), 0)
    (tmp_path / "gpqa.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"gpqa.jsonl, line 1"):
        load(BENCHMARKS["gpqa"], str(tmp_path), 0)
    twice = json.dumps({"id": "1", "problem": "p", "answer": 1})
    (tmp_path / "aime24.jsonl").write_text(f"{twice}\n{twice}\n")
    with pytest.raises(DataError, match="two problems of the name '1'"):
        load(BENCHMARKS["aime24"], str(tmp_path), 0)


def _served(tmp_path: Path, changed: bool = False) -> Any:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(_rows("gpqa")[0]))
    writer.writeheader()
    writer.writerows(_rows("gpqa"))
    content = out.getvalue().encode()
    path = tmp_path / "served.csv"
    path.write_bytes(content + (b"\n" if changed else b""))
    remote = Remote(url=path.as_uri(), sha256=hashlib.sha256(content).hexdigest())
    return replace(BENCHMARKS["gpqa"], remote=remote)


def test_a_file_is_fetched_once_verified_and_watched(tmp_path: Path) -> None:
    benchmark, folder = _served(tmp_path), tmp_path / "data"
    assert "1 problems from file:" in fetching.fetch(benchmark, folder)
    assert "is there" in fetching.fetch(benchmark, folder)
    assert load(benchmark, str(folder), 0).revision.startswith("file:")
    with (folder / "gpqa.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="was changed after it was fetched"):
        load(benchmark, str(folder), 0)
    with pytest.raises(DataError, match="move it away first"):
        fetching.fetch(benchmark, folder)


def test_another_file_than_expected_and_no_network_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"has the checksum .* was expected"):
        fetching.fetch(_served(tmp_path, changed=True), tmp_path / "data")
    nowhere = replace(BENCHMARKS["gpqa"], remote=Remote(url="http://127.0.0.1:9/x.csv"))
    with pytest.raises(DataError, match="cannot be fetched"):
        fetching.fetch(nowhere, tmp_path / "data")

    def rows_of_another_kind(name: str, remote: Remote) -> tuple[list[dict[str, Any]], str]:
        return [{"question": "q"}], "hub"

    monkeypatch.setattr(fetching, "_from_hub", rows_of_another_kind)
    with pytest.raises(DataError, match="is not what was expected: row 1"):
        fetching.fetch(BENCHMARKS["mmlu_pro"], tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_suites_and_their_names() -> None:
    assert [b.name for b in chosen(["ifeval", "aime24"])] == ["aime24", "ifeval"]
    assert {b.name for b in chosen(["table1", "table2"])} == set(SUITES["paper"]) == set(BENCHMARKS)
    with pytest.raises(ConfigError, match="neither a suite"):
        chosen(["mmlu"])

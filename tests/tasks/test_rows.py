"""task=rows: files of every kind to problems, splits, weights, what is left out, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from megatron_vp2o.config.rows import ColumnsConfig, OnBadRow, OnDuplicate, RowsTaskConfig
from megatron_vp2o.data.documents import TaskDemonstrations
from megatron_vp2o.data.rows import index as index_module
from megatron_vp2o.data.rows.index import MARK
from megatron_vp2o.errors import ConfigError, DataError, UserError
from megatron_vp2o.rl.batching import PromptSchedule
from megatron_vp2o.rl.types import Split
from megatron_vp2o.tasks import make_task
from tests.data.row_files import LAYOUTS, Row, plain_rows, write
from tests.tasks.exact_reward import Exact
from tests.tasks.row_tasks import FORMATS, NONE_HELD_OUT, make, of_task
from tests.tasks.row_tasks import tokenizer as tokenizer


def question(row: Row) -> str:
    """What makes a row itself, whatever its layout."""
    prompt: Any = row.get("prompt", row.get("messages"))
    return prompt if isinstance(prompt, str) else json.dumps([(turn["role"], turn["content"]) for turn in prompt])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_format_gives_the_same_problems(tmp_path: Path, tokenizer: str, layout: str) -> None:
    random = Random(layout)
    rows = LAYOUTS[layout](random, 60)
    seen = {}
    for suffix in FORMATS:
        path = write(tmp_path / suffix / f"rows.{suffix}", rows, random if suffix != "parquet" else None)
        task = make(str(path), tokenizer, validation_size=8, test_size=9)
        splits = {split: [task.problem(split, i) for i in range(task.size(split))] for split in Split}
        seen[suffix] = {
            split: [(p.prompt, p.tokens, p.data["answer"]) for p in problems] for split, problems in splits.items()
        }
        assert [len(splits[split]) for split in Split] == [43, 8, 9]
        problem = splits[Split.train][0]
        assert problem.prompt.endswith("<|im_start|>assistant\n") and problem.n_solutions is None
        # every row once, in one split only
        everything = [row for problems in seen[suffix].values() for row in problems]
        assert len({prompt for prompt, _, _ in everything}) == 60
    assert seen["jsonl"] == seen["jsonl.gz"] == seen["parquet"]


def test_layouts_of_verl_and_trl(tmp_path: Path, tokenizer: str) -> None:
    rows = {name: make_rows(Random(1), 12) for name, make_rows in LAYOUTS.items()}
    tasks = {name: make(str(write(tmp_path / f"{name}.parquet", rows[name])), tokenizer) for name in rows}
    for name, task in tasks.items():
        originals = {question(row): row for row in rows[name]}
        documents = TaskDemonstrations(task, Split.train, 0)
        for i in range(task.size(Split.train)):
            problem = task.problem(Split.train, i)
            turns = problem.data["prompt"]
            if name == "messages":
                original = next(row for row in rows[name] if [dict(m) for m in turns] == row["messages"][:-1])
            else:
                original = originals[question(problem.data)]
            for key, value in original.items():  # everything else in the row reaches the reward
                if key not in ("prompt", "completion"):
                    assert problem.data[key] == value
            expected = {
                "plain": lambda row: row["answer"],
                "verl": lambda row: row["reward_model"]["ground_truth"],
                "trl": lambda row: row["completion"][0]["content"],
                "messages": lambda row: row["messages"][-1]["content"],
            }[name](original)
            assert problem.data["answer"] == expected == task.demonstration(problem, 0)
            document = documents.get(i, 0)
            assert tuple(document.tokens[: document.loss_start]) == problem.tokens
            assert task.tokenizer.decode(document.tokens[document.loss_start :].tolist()) == expected
            assert document.tokens[-1] == task.tokenizer.eos_id


def test_rewards_get_prompts_responses_and_rows(tmp_path: Path, tokenizer: str) -> None:
    task = make(str(write(tmp_path / "a.jsonl", plain_rows(Random(2), 20))), tokenizer)
    problems = [task.problem(Split.train, i) for i in (3, 3, 5)]
    right = problems[0].data["answer"]
    verdicts = task.verify_all(problems, [right, f"it is {right}", "no"])
    assert [(v.correct, v.reward, v.reason) for v in verdicts] == [
        (True, 1.0, ""),
        (False, 0.25, "other text"),
        (False, 0.0, "other text"),
    ]
    assert isinstance(task.reward, Exact)
    prompts, _, rows = task.reward.calls[0]
    assert prompts == [p.prompt for p in problems] and rows[2]["level"] == problems[2].data["level"]
    with pytest.raises(ConfigError, match="needs a reward"):
        make_task(task.config).verify_all(problems, ["", "", ""])


def test_columns_by_name(tmp_path: Path, tokenizer: str) -> None:
    rows = [{"q": f"what is {i}", "meta": {"gold": [str(i), "x"]}, "solution": f"it is {i}"} for i in range(9)]
    path = str(write(tmp_path / "a.jsonl", rows))
    columns = ColumnsConfig(prompt="q", answer="meta.gold", completion="solution")
    task = make(path, tokenizer, columns=columns)
    problem = task.problem(Split.train, 0)
    assert problem.data["answer"] == [problem.data["q"][8:], "x"]
    assert task.demonstration(problem, 5) == f"it is {problem.data['q'][8:]}"
    with pytest.raises(
        DataError, match=r"no column 'prompt' or 'messages' \(the row has meta, q, solution\).*task\.columns\.prompt"
    ):
        make(path, tokenizer)
    with pytest.raises(DataError, match=r"no row that can be used \(1: no column 'wrong'"):
        make(path, tokenizer, columns=ColumnsConfig(prompt="q", answer="wrong"))


def test_held_out_rows_do_not_depend_on_order_or_format_and_are_never_trained_on(
    tmp_path: Path, tokenizer: str
) -> None:
    random = Random(4)
    rows = plain_rows(random, 80)
    rows += [{**row, "level": 9} for row in random.sample(rows, 30)]  # repeated prompts
    held_out: list[Any] = []
    for turn in range(3):
        random.shuffle(rows)
        half = random.randrange(20, 90)
        paths = [
            str(write(tmp_path / f"{turn}" / f"{i}.jsonl", part)) for i, part in enumerate((rows[:half], rows[half:]))
        ]
        task = make(paths, tokenizer, validation_size=11, test_size=13, seed=5)
        prompts = {split: [row["prompt"] for row in of_task(task, split)] for split in Split}
        held_out.append((prompts[Split.validation], prompts[Split.test]))
        assert len(set(prompts[Split.validation] + prompts[Split.test])) == 24
        assert not set(prompts[Split.train]) & set(prompts[Split.validation] + prompts[Split.test])
        assert len(set(prompts[Split.train])) == 80 - 24
        assert task.counts["repeated"] == 30
    assert held_out[0] == held_out[1] == held_out[2]
    other = make(paths, tokenizer, validation_size=11, test_size=13, seed=6)
    assert [row["prompt"] for row in of_task(other, Split.test)] != held_out[0][1]


def test_epochs_pass_over_every_row_in_another_order(tmp_path: Path, tokenizer: str) -> None:
    task = make(str(write(tmp_path / "a.jsonl", plain_rows(Random(5), 40))), tokenizer)
    epochs = [[row["prompt"] for row in of_task(task, Split.train, epoch)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and len(set(epochs[0])) == 39
    assert epochs[0] != epochs[1] != epochs[2]
    again = make(task.config.path, tokenizer)
    assert [row["prompt"] for row in of_task(again, Split.train, 2)] == epochs[2]


def test_weights_are_passes_of_an_epoch(tmp_path: Path, tokenizer: str) -> None:
    random = Random(6)
    files = {
        name: [{**row, "level": name} for row in plain_rows(random, count)]
        for name, count in (("a", 30), ("b", 20), ("c", 8))
    }
    paths = [str(write(tmp_path / f"{name}.jsonl", rows)) for name, rows in files.items()]
    validation = str(write(tmp_path / "v.jsonl", plain_rows(random, 5)))
    task = make(paths, tokenizer, weights=[1.0, 0.25, 2.5], validation_path=validation, validation_size=3)
    seen: Counter[tuple[str, str]] = Counter()
    for epoch in range(8):
        rows = of_task(task, Split.train, epoch)
        assert Counter(row["level"] for row in rows) == {"a": 30, "b": 5, "c": 20}
        seen.update((row["level"], row["prompt"]) for row in rows)
        if epoch == 3:  # every row of b once
            assert {count for (name, _), count in seen.items() if name == "b"} == {1}
    assert {name: {count for (n, _), count in seen.items() if n == name} for name in "abc"} == {
        "a": {8},
        "b": {2},
        "c": {20},
    }
    assert task.size(Split.validation) == 3


def test_a_folder_is_its_files_in_order(tmp_path: Path, tokenizer: str) -> None:
    rows = plain_rows(Random(7), 30)
    for i, suffix in enumerate(FORMATS):
        write(tmp_path / "data" / f"sub{i}" / f"{i}.{suffix}", rows[10 * i : 10 * i + 10])
    (tmp_path / "data" / "README.md").write_text("about")
    (tmp_path / "data" / ".hidden.jsonl").write_text("{")
    for _ in range(2):  # the second time with indexes inside the folder
        task = make(str(tmp_path / "data"), tokenizer)
        assert sorted(row["prompt"] for row in of_task(task, Split.train) + of_task(task, Split.validation)) == sorted(
            row["prompt"] for row in rows
        )
    assert task.report()["files"][1]["rows"] == 10


def test_a_data_set_of_the_datasets_library(tmp_path: Path, tokenizer: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = plain_rows(Random(8), 25)
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "extra": one.select(range(5))}).save_to_disk(tmp_path / "several")
    index_dir = str(tmp_path / "indexes")
    prompts = sorted(row["prompt"] for row in rows)
    for path, split, count in (("one", "train", 25), ("several", "train", 25), ("several", "extra", 5)):
        task = make(str(tmp_path / path), tokenizer, hub_split=split, index_dir=index_dir)
        got = sorted(row["prompt"] for split in (Split.train, Split.validation) for row in of_task(task, split))
        assert got == (prompts if count == 25 else sorted(row["prompt"] for row in rows[:5]))
    with pytest.raises(DataError, match=r"task\.hub_split=nowhere: .* has extra, train"):
        make(str(tmp_path / "several"), tokenizer, hub_split="nowhere", index_dir=index_dir)


def test_the_index_is_used_again_and_made_again_when_the_file_changed(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []
    build = index_module._build

    def counted(*arguments: Any, **named: Any) -> None:
        builds.append(arguments[0].path)
        build(*arguments, **named)

    monkeypatch.setattr(index_module, "_build", counted)
    rows = plain_rows(Random(9), 30)
    path = write(tmp_path / "a.jsonl", rows)
    first = make(str(path), tokenizer)
    assert make(str(path), tokenizer).fingerprint == first.fingerprint and len(builds) == 1
    assert len(list(tmp_path.glob(f"a*{MARK}*"))) == 1
    make(str(path), tokenizer, columns=ColumnsConfig(answer="level"))  # other columns are another index
    assert len(builds) == 2
    rows[17] = {**rows[17], "answer": "0" * len(rows[17]["answer"])}  # same length, same time of change
    status = path.stat()
    write(path, rows)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    changed = make(str(path), tokenizer)
    assert len(builds) == 3 and changed.fingerprint != first.fingerprint
    write(path, rows[:-1])
    assert make(str(path), tokenizer).size(Split.train) == 28 and len(builds) == 4
    (index,) = (
        folder for folder in tmp_path.glob(f"a.jsonl{MARK}*") if "level" not in (folder / "index.json").read_text()
    )
    (index / "rows.bin").write_bytes(b"damaged")
    assert make(str(path), tokenizer).size(Split.train) == 28 and len(builds) == 5


def test_a_file_that_changes_in_mid_run_is_named(tmp_path: Path, tokenizer: str) -> None:
    rows = plain_rows(Random(10), 20)
    path = write(tmp_path / "a.jsonl", rows)
    task = make(str(path), tokenizer)
    rows[0], rows[1] = rows[1], rows[0]
    write(path, rows)
    with pytest.raises(DataError, match=r"a\.jsonl, line [12].*has changed"):
        of_task(task, Split.train)


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root writes anywhere")
def test_an_index_in_a_cache_folder(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data" / "a.jsonl", plain_rows(Random(11), 20))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module.os, "access", lambda place, mode: False)
    assert make(str(path), tokenizer).size(Split.train) == 19
    assert [entry.name for entry in path.parent.iterdir()] == ["a.jsonl"] and list(
        (tmp_path / "cache").rglob("index.json")
    )
    monkeypatch.undo()
    make(str(path), tokenizer, index_dir=str(tmp_path / "named"))
    assert list((tmp_path / "named").rglob("index.json"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"task\.index_dir"):
        make(str(path), tokenizer, index_dir=str(tmp_path / "file"))


BAD_LINES = {
    "{": "not JSON",
    "[1, 2]": "a JSON list, not an object",
    '"text"': "a JSON str",
    '{"prompt": 3, "answer": "1"}': "of type int, neither text nor a list of chat messages",
    '{"prompt": "  ", "answer": "1"}': "is empty",
    '{"answer": "1"}': "no column 'prompt' (the row has answer)",
    '{"prompt": "x"}': "no column 'answer'",
    '{"prompt": [], "answer": "1"}': "neither text nor a list",
    '{"prompt": ["hi"], "answer": "1"}': "message 0 of column 'prompt' is of type str",
    '{"prompt": [{"role": "bot", "content": "x"}], "answer": "1"}': "role 'bot'",
    '{"prompt": [{"role": "user", "content": null}], "answer": "1"}': "null, not text",
    '{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"}': "content of type 'image'",
    '{"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"}': "nothing but an assistant's message",
    '{"prompt": "\\ud83d", "answer": "1"}': "half a surrogate pair",
    '{"prompt": "x", "answer": "\\ud83d"}': "half a surrogate pair",
    '{"prompt": "x", "answer": ' + "9" * 5000 + "}": "not JSON that can be read",
    '{"prompt": "x", "answer": ' + "[" * 100_000 + "}": "nested too deeply",
    "\udcff": "not UTF-8",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_rows_name_file_line_and_reason(tmp_path: Path, tokenizer: str, bad: str) -> None:
    random = Random(12)
    good = [json.dumps(row) for row in plain_rows(random, 12)]
    line = random.randrange(1, 13)
    lines = [*good[: line - 1], bad, *good[line - 1 :]]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as caught:
        make(str(path), tokenizer)
    assert str(path) in str(caught.value) and f"line {line}: " in str(caught.value)
    assert BAD_LINES[bad] in str(caught.value) and "task.on_bad_row=skip" in str(caught.value)
    task = make(str(path), tokenizer, on_bad_row=OnBadRow.skip)
    assert task.size(Split.train) + task.size(Split.validation) == 12 and task.counts["bad_rows"] == 1
    assert task.report()["files"][0]["reasons"][0][0] == line


def test_lines_longer_than_memory_should_hold(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vp2o.data.rows.readers.LONGEST_LINE", 2000)
    rows = plain_rows(Random(13), 10)
    rows.insert(4, {"prompt": "x" * 5_000_000, "answer": "1"})
    path = write(tmp_path / "a.jsonl", rows)
    task = make(str(path), tokenizer, on_bad_row=OnBadRow.skip)
    assert task.counts["bad_rows"] == 1 and task.report()["files"][0]["reasons"][0][0] == 5
    assert len(of_task(task, Split.train)) == 9


def test_long_prompts_are_counted_or_refused(tmp_path: Path, tokenizer: str) -> None:
    random = Random(14)
    for turn in range(4):
        rows = [{"prompt": "word " * random.randrange(1, 60) + str(i), "answer": "1"} for i in range(40)]
        path = str(write(tmp_path / f"{turn}.jsonl", rows))
        whole = make(path, tokenizer)
        lengths = [len(whole.problem(split, i).tokens or ()) for split in Split for i in range(whole.size(split))]
        limit = sorted(lengths)[random.randrange(10, 35)]
        task = make(path, tokenizer, max_prompt_tokens=limit)
        kept = [len(task.problem(split, i).tokens or ()) for split in Split for i in range(task.size(split))]
        assert sorted(kept) == sorted(length for length in lengths if length <= limit)
        assert task.counts["long_prompts"] == 40 - len(kept) > 0 and task.max_prompt_tokens == limit
        with pytest.raises(DataError, match=rf"{40 - len(kept)} rows whose prompt has more than {limit} tokens"):
            make(path, tokenizer, max_prompt_tokens=limit, on_long_prompt=OnBadRow.refuse)
        by_room = make_task(RowsTaskConfig(path=path, tokenizer=tokenizer, **NONE_HELD_OUT), room=limit)
        assert by_room.size(Split.train) == task.size(Split.train)


def test_repeated_prompts_are_named(tmp_path: Path, tokenizer: str) -> None:
    rows = plain_rows(Random(15), 20)
    one = str(write(tmp_path / "a.jsonl", [*rows, rows[3]]))
    two = str(write(tmp_path / "b.jsonl", [rows[7], {"prompt": "new", "answer": "1"}]))
    with pytest.raises(DataError, match=r"2 rows repeat .*a\.jsonl, line 21; .*b\.jsonl, line 1"):
        make([one, two], tokenizer, on_duplicate=OnDuplicate.refuse)
    assert make([one, two], tokenizer, on_duplicate=OnDuplicate.skip).size(Split.train) == 20
    kept = make([one, two], tokenizer)
    assert kept.counts["repeated"] == 2 and kept.size(Split.train) in (20, 21, 22)
    validation = make(one, tokenizer, validation_path=two, validation_size=5)
    assert validation.counts["training_rows_also_held_out"] == 1
    assert rows[7]["prompt"] not in {row["prompt"] for row in of_task(validation, Split.train)}


def test_settings_that_do_not_fit(tmp_path: Path, tokenizer: str) -> None:
    path = str(write(tmp_path / "a.jsonl", plain_rows(Random(16), 10)))
    verl = str(write(tmp_path / "verl.jsonl", LAYOUTS["verl"](Random(1), 5)))
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (None, {}, "task.path=null"),
        ([], {}, "task.path=null"),
        (7, {}, "must be a path"),
        ([path, 3], {}, "must be a path"),
        (path, {"weights": [1.0, 2.0]}, "2 numbers for 1 paths"),
        (path, {"weights": [-1.0]}, "task.weights"),
        (path, {"prompt_format": "Question:"}, "must have {prompt} in it once"),
        (path, {"validation_size": 8, "test_size": 3}, "has 10: choose fewer"),
        (path, {"validation_size": 5, "test_size": 5}, "is left for training"),
        (path, {"tokenizer": None, "system_prompt": "x"}, "needs a chat template"),
        (path, {"tokenizer": None, "enable_thinking": True}, "needs a chat template"),
        (verl, {"tokenizer": None}, "the tokenizer has no chat template"),
        (str(tmp_path / "nowhere.jsonl"), {}, "does not exist"),
        (str(tmp_path / "nowhere"), {}, "does not exist"),
        (str(tmp_path), {"validation_path": str(tmp_path / "x.jsonl")}, "does not exist"),
    ]
    for where, settings, message in wrong:
        config = RowsTaskConfig(path=where, **(NONE_HELD_OUT | {"tokenizer": tokenizer} | settings))
        with pytest.raises(UserError) as caught:
            make_task(config)
        assert message in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no file that ends in"):
        make(str(tmp_path / "empty"), tokenizer)
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match="no kind of file"):
        make(str(tmp_path / "a.csv"), tokenizer)
    (tmp_path / "none.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=r"no row that can be used \(it is empty\)"):
        make(str(tmp_path / "none.jsonl"), tokenizer)


def test_the_position_survives_another_batch_size(tmp_path: Path, tokenizer: str) -> None:
    """However a run is cut into steps and ranks, the prompts come in one order, none twice and none left out."""
    task = make(str(write(tmp_path / "a.jsonl", plain_rows(Random(17), 30))), tokenizer)
    reference = [p.prompt for p in PromptSchedule(task, per_step=90, seed=3, dp_rank=0, dp_size=1)(0)[0]]
    random = Random(18)
    for _ in range(5):
        position, seen = 0, []
        while position < 90:
            ranks = random.choice([1, 2, 4])
            per_step = ranks * random.randrange(1, 5)
            for rank in range(ranks):
                problems, uids = PromptSchedule(task, per_step=per_step, seed=3, dp_rank=rank, dp_size=ranks)(position)
                assert uids == list(range(position + len(uids) * rank, position + len(uids) * (rank + 1)))
                seen += [problem.prompt for problem in problems]
            position += per_step
        assert seen[:90] == reference


def test_starting_again_does_not_read_the_file(tmp_path: Path, tokenizer: str) -> None:
    path = str(write(tmp_path / "a.jsonl", plain_rows(Random(20), 20_000)))
    make(path, tokenizer)
    start = time.process_time()
    make(path, tokenizer)
    assert time.process_time() - start < 1.0

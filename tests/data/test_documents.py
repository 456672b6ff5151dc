"""Sources of documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_vp2o.data import documents as module
from megatron_vp2o.data.documents import JsonlText, TaskDemonstrations
from megatron_vp2o.data.packing import PackedBatches
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.interfaces import Tokenizer
from megatron_vp2o.rl.types import Problem, Split, Verdict


class Letters:
    """Lower-case letters are 2..27; anything else is refused."""

    vocab_size = 28
    pad_id = 0
    eos_id = 1
    eos_ids: tuple[int, ...] = (1,)

    def encode(self, text: str) -> list[int]:
        if bad := [c for c in text if not "a" <= c <= "z"]:
            raise ValueError(f"no letter: {bad[0]!r}")
        return [ord(c) - 95 for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i + 95) for i in ids if i > 1)

    def save(self, folder: Path) -> None: ...


class Echo:
    """Problem i of a split is a letter; its right answers are that letter once to nine times."""

    name = "echo"
    tokenizer: Tokenizer = Letters()
    max_prompt_tokens = 2
    grades_elsewhere = False

    def size(self, split: Split) -> int:
        return 5 if split is Split.train else 2

    def problem(self, split: Split, index: int, variant: int = 0) -> Problem:
        letter = chr(ord("a" if split is Split.train else "q") + index)
        return Problem(uid=index, prompt=letter * 2, data=letter, n_solutions=9)

    def verify(self, problem: Problem, response: str) -> Verdict:
        return Verdict(set(response) == {problem.data}, len(response), "")

    def verify_all(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        return [self.verify(problem, response) for problem, response in zip(problems, responses, strict=True)]

    def demonstration(self, problem: Problem, seed: int) -> str:
        return problem.data * (1 + seed % 9)


def test_demonstrations_are_prompt_answer_and_end():
    task = Echo()
    documents = TaskDemonstrations(task, Split.train, seed=3)
    assert (len(documents), documents.splittable) == (5, False)
    for index in range(5):
        document = documents.get(index, 0)
        problem = task.problem(Split.train, index)
        assert document.loss_start == 2
        assert task.tokenizer.decode(document.tokens[:2].tolist()) == problem.prompt
        assert task.verify(problem, task.tokenizer.decode(document.tokens[2:].tolist())).correct
        assert document.tokens[-1] == task.tokenizer.eos_id
    assert task.tokenizer.decode(TaskDemonstrations(task, Split.test, 3).get(1, 0).tokens[:2].tolist()) == "rr"


def test_demonstrations_change_with_epoch_and_seed_only():
    def lengths(seed: int, epoch: int) -> list[int]:
        documents = TaskDemonstrations(Echo(), Split.train, seed)
        return [len(documents.get(index, epoch).tokens) for index in range(5)]

    assert lengths(0, 0) == lengths(0, 0)
    assert len({tuple(lengths(seed, epoch)) for seed in range(5) for epoch in range(5)}) > 20


def test_demonstrations_pack_with_the_loss_on_answers_only():
    documents = TaskDemonstrations(Echo(), Split.train, seed=3)
    batch = next(PackedBatches(documents, sequence_length=16, rows=4, pack=True, seed=0, pad_id=0, vocab_size=28))
    answers = (batch.tokens_NS == 1).sum()  # each ends once
    assert batch.segment_NS is not None
    assert (batch.segment_NS >= 0).sum() - batch.loss_mask_NS.sum() == 2 * answers


def write(folder: Path, *lines: str) -> Path:
    path = folder / "text.jsonl"
    path.write_bytes("\n".join(lines).encode())
    return path


def test_jsonl_reads_every_line_in_any_order(tmp_path):
    texts = ["abc", "", "z" * 1000, "hello"]
    lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate(texts)]
    path = write(tmp_path, lines[0], "", lines[1], "  \t", lines[2] + "\r", lines[3])  # no newline at the end
    documents = JsonlText(path, "body", Letters())
    assert (len(documents), documents.splittable) == (4, True)
    for index in (3, 0, 2, 1):
        document = documents.get(index, 7)
        assert Letters().decode(document.tokens.tolist()) == texts[index]
        assert (document.tokens[-1], document.loss_start) == (1, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "abc"', "line 3: not JSON .* column"),
        ('{"texts": "abc"}', 'line 3: no object with text in its field "text"'),
        ('{"text": 5}', 'line 3: no object with text in its field "text"'),
        ('["text"]', 'line 3: no object with text in its field "text"'),
        ('{"text": "aBc"}', "line 3: the tokenizer refuses it .*'B'"),
        ('{"text": "a\\ud83d"}', r"line 3: not Unicode \(half of a surrogate pair, \\ud83d, at character 1\)"),
        ('{"text": "\\ude00a"}', r"line 3: not Unicode \(half of a surrogate pair"),
        ('{"text": ' + "9" * 5000 + "}", 'line 3: no object with text in its field "text"'),
        ("[" * 100_000 + "]" * 100_000, "line 3: nested too deeply to be read"),
        ('{"text": "abc", "other": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001, "line 3: nested too deeply"),
        ('{"text": null}', 'line 3: no object with text in its field "text"'),
        ("null", 'line 3: no object with text in its field "text"'),
    ],
    ids=lambda value: value[:30],
)
@pytest.mark.parametrize("checked", [True, False], ids=["at the start", "in its turn"])
def test_a_bad_line_is_named(tmp_path, monkeypatch, line, message, checked):
    path = write(tmp_path, '{"text": "abc"}', "", line, '{"text": "abc"}')
    if checked and "tokenizer" not in message:
        with pytest.raises(ConfigError, match=f"text.jsonl, {message}"):
            JsonlText(path, "text", Letters())
        return
    monkeypatch.setattr(module, "CHECKED_BYTES", 1)
    documents = JsonlText(path, "text", Letters())
    documents.get(2, 0)
    with pytest.raises(ConfigError, match=f"text.jsonl, {message}") as caught:
        documents.get(1, 0)
    assert line[:80] in str(caught.value) and "algorithm.data.text_field" in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(ConfigError, match="line 2: not UTF-8"):
        JsonlText(path, "text", Letters()).get(1, 0)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1", "cp1252", "shift-jis"])
def test_other_encodings_are_named_before_the_run(tmp_path, encoding):
    words = ("abc", "日本" if encoding == "shift-jis" else "naïve")
    path = tmp_path / "text.jsonl"
    path.write_bytes("".join(f'{{"text": "{word}"}}\n' for word in words).encode(encoding))
    with pytest.raises(ConfigError, match=r"text.jsonl, line [12]: not (UTF-8|JSON)"):
        JsonlText(path, "text", Letters())


def test_a_byte_order_mark_and_numbers_of_any_length_do_no_harm(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "abc", "id": ' + b"7" * 5000 + b"}\n")
    documents = JsonlText(path, "text", Letters())
    assert Letters().decode(documents.get(0, 0).tokens.tolist()) == "abc"


def test_only_empty_texts_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="all 3 lines that were read are empty: there is nothing to learn"):
        JsonlText(write(tmp_path, *['{"text": ""}'] * 3), "text", Letters())
    assert len(JsonlText(write(tmp_path, '{"text": ""}', '{"text": "a"}'), "text", Letters())) == 2


def test_files_that_cannot_be_used_are_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file .*missing.jsonl"):
        JsonlText(tmp_path / "missing.jsonl", "text", Letters())
    with pytest.raises(ConfigError, match="has no documents"):
        JsonlText(write(tmp_path, "", " "), "text", Letters())
    with pytest.raises(ConfigError, match=r'line 1: .* field "prose"'):
        JsonlText(write(tmp_path, '{"text": "abc"}'), "prose", Letters())

"""The results folder: torn lines, doubled samples, foreign headers, two writers; and the loop that resumes from it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.errors import DataError
from megatron_vp2o.evaluation.results import Sample, SampleFile, read
from tests.evaluation.server import NAME, serving

ROOT = Path(__file__).resolve().parents[2]
HEADER = {"label": "a", "temperature": 0.6, "model": {"kind": "x", "weights": "1"}}


def _sample(problem: str, number: int) -> Sample:
    return Sample(problem, number, {"correct": 1.0}, "", 3, 4, False, 'text – ü\n"quoted"', {"rating": 800.0})


def test_what_is_written_comes_back_and_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "x" / "a@8.jsonl"
    samples = [_sample(p, n) for p in ("p", "q") for n in range(3)]
    with SampleFile(path, HEADER) as file:
        file.append(samples[:4])
        file.append(samples[2:5])
    with SampleFile(path, HEADER) as file:
        assert file.done == {(s.problem, s.sample) for s in samples[:5]}
        file.append(samples)
    header, found = read(path)
    assert found == samples and header == {**HEADER, "format": 1}


def test_a_line_torn_at_any_byte_costs_that_sample_only(tmp_path: Path) -> None:
    path = tmp_path / "a@8.jsonl"
    samples = [_sample("p", n) for n in range(3)]
    with SampleFile(path, HEADER) as file:
        file.append(samples)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = max(sum(end <= cut for end in ends) - 1, 0)
        if kept or cut >= ends[0]:
            assert read(path)[1] == samples[:kept]
        with SampleFile(path, HEADER) as file:
            assert len(file.done) == kept
            file.append(samples)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"temperature": 0.7}, "temperature is 0.6 there and 0.7 here"),
        ({"model": {"kind": "x", "weights": "2"}}, r"model\.weights is 1 there and 2 here"),
        ({"rows": "abc"}, "rows is None there and abc here"),
    ],
)
def test_samples_of_another_evaluation_are_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    path = tmp_path / "a@8.jsonl"
    with SampleFile(path, HEADER) as file:
        file.append([_sample("p", 0)])
    before = path.read_bytes()
    with pytest.raises(DataError, match=said):
        SampleFile(path, {**HEADER, **changed})
    assert path.read_bytes() == before


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with SampleFile(tmp_path / "a@8.jsonl", HEADER), pytest.raises(DataError, match="another process"):
        SampleFile(tmp_path / "a@8.jsonl", HEADER)


def test_damage_and_doubled_samples_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a@8.jsonl"
    with SampleFile(path, HEADER) as file:
        file.append([_sample("p", 0)])
    good = path.read_bytes()
    path.write_bytes(good + good.splitlines(keepends=True)[1])
    with pytest.raises(DataError, match="sample 0 of problem p twice"):
        read(path)
    path.write_bytes(good + b'{"problem": 1}\n')
    with pytest.raises(DataError, match="damaged"):
        read(path)
    path.write_bytes(good.replace(b'"format": 1', b'"format": 9'))
    with pytest.raises(DataError, match="format 9"):
        read(path)


KILLS = int(os.environ.get("VP2O_EVALUATION_KILLS", "2"))


def test_killed_at_random_moments_it_resumes_to_the_same_tables(tmp_path: Path) -> None:
    """VP2O_EVALUATION_KILLS says how often. The endpoint answers each prompt the same way, whenever it is asked."""

    def answer(body: dict[str, Any]) -> str:
        content = body["messages"][0]["content"]
        return f"<think>{'so ' * (len(content) % 7)}</think> The answer is ({'ABCDEFGHIJ'[len(content) % 4]}). It is \\boxed{{42}}"

    with serving() as (url, behaviour):
        behaviour.answer = answer
        behaviour.seconds = 0.03

        def command(out: str) -> list[str]:
            return [
                *(sys.executable, "-m", "megatron_vp2o.evaluate", f"a={url}#{NAME}", "--out", str(tmp_path / out)),
                *("--data", "own", "--suite", "gpqa,mmlu_pro", "--lengths", "64,128", "--samples", "8"),
                *("--concurrency", "2", "--batch", "4", "--workers", "1"),
            ]

        subprocess.run(command("whole"), cwd=ROOT, check=True, capture_output=True, timeout=240)
        draws = random.Random(KILLS)
        seconds = 0.0
        for _ in range(KILLS):
            process = subprocess.Popen(
                command("killed"),
                cwd=ROOT,
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
            begun = time.monotonic()
            before = _lines(tmp_path / "killed")
            while _lines(tmp_path / "killed") == before and process.poll() is None and time.monotonic() < begun + 120:
                time.sleep(0.05)  # until it writes: killing imports shows nothing
            time.sleep(seconds := draws.uniform(0, 1.2))
            process.kill()
            process.wait()
        assert _lines(tmp_path / "killed") > 0, seconds
        subprocess.run(command("killed"), cwd=ROOT, check=True, capture_output=True, timeout=240)
    names = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path / "killed") for p in (tmp_path / "killed").rglob("*") if p.is_file())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def _lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("*.jsonl"))


def test_headers_hold_what_json_can(tmp_path: Path) -> None:
    with SampleFile(tmp_path / "a@8.jsonl", {"thinking": None, "options": {"a": [1, 2]}}):
        pass
    with SampleFile(tmp_path / "a@8.jsonl", {"thinking": None, "options": {"a": [1, 2]}}) as file:
        assert file.done == set()
    assert json.loads((tmp_path / "a@8.jsonl").read_text())["header"]["options"] == {"a": [1, 2]}

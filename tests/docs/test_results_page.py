"""docs/results.md says what the records of its studies' runs, in docs/study, give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_vp2o.study.records import read_records
from megatron_vp2o.study.report import insert, markdown, plots
from megatron_vp2o.study.results import collect
from megatron_vp2o.study.spec import jobs, load_study

DOCS = Path(__file__).resolve().parents[2] / "docs"
NUMBER = re.compile(r"\d+\.\d+")
RECORDS = sorted((DOCS / "study").glob("*.jsonl"))


def test_there_are_records() -> None:
    assert RECORDS


@pytest.mark.parametrize("records", RECORDS, ids=[path.stem for path in RECORDS])
def test_tables_and_plots_are_those_of_the_records(records: Path, tmp_path: Path) -> None:
    """After new runs: `python -m megatron_vp2o.study NAME --table-only --records docs/study/NAME.jsonl --into docs/results.md`."""
    study = load_study(records.stem)
    todo = jobs(study, tmp_path)
    results = collect(todo, read_records([records], todo))
    assert len(results) == len(records.read_text().splitlines())
    page = tmp_path / "results.md"
    page.write_text((DOCS / "results.md").read_text())
    insert(markdown(study, todo, results, [], f"make study STUDY={study.name}"), study.name, page)
    (made, made_numbers), (there, numbers) = (split(path.read_text()) for path in (page, DOCS / "results.md"))
    assert made == there and made_numbers == pytest.approx(
        numbers, abs=2e-3
    )  # one in the last digit, on another processor
    for name in plots(study, results):
        assert (DOCS / name).is_file() and name in page.read_text()


def split(text: str) -> tuple[list[str], list[float]]:
    """What is no number, and the numbers."""
    return NUMBER.split(text), [float(number) for number in NUMBER.findall(text)]

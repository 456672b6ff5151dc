"""A study's runs in one file: read back they give the same numbers, whatever they were; what is not theirs is refused."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.study.records import read_records, write_records
from megatron_vp2o.study.report import insert, markdown
from megatron_vp2o.study.results import Result, collect
from megatron_vp2o.study.runner import Failure, run_all
from megatron_vp2o.study.spec import Job, Study, TaskSpec, jobs

STUDY = Study("s", {"t": TaskSpec("w", "r")}, {"grpo": (), "a": ("x=1",)}, (1, 2), "grpo")


def drawn(folder: Path, random: Random) -> list[Result]:
    """A run of each job, as if it had come to its end in this folder."""
    found, number_of_problems = [], random.randint(1, 5)
    for job in jobs(STUDY, folder):
        problems = []
        for number in range(number_of_problems):
            counts = [random.randint(1, 9) for _ in range(random.randint(0, 4))]
            answers = {f"{number}{chr(97 + i)}": count for i, count in enumerate(counts)}
            problems.append({"problem": number, "samples": sum(counts) + random.randint(0, 9) or 1, "answers": answers})
        rising = sorted(random.random() for _ in range(3))
        series = {"eval/pass@1": rising, "eval/distinct": [3.0, 2.0, random.random()], "eval/other": [1.0]}
        final = {
            "test/pass@1": random.random(),
            "test/response_length": 7.0,
            "actor/refreshes": 9.0,
            "time/step_s": 1.5,
        }
        done = {"arguments": list(job.arguments), "seconds": 3.0, "commit": "abc", "machine": "m"}
        found.append(Result(job, done, series, final, problems))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_another_folder_has_the_same_numbers_and_runs_nothing(tmp_path: Path, seed: int) -> None:
    results = drawn(tmp_path / "one", Random(seed))
    kept = [result for result in results if result.job.variant != "grpo"] + [
        r for r in results if r.job.variant == "grpo"
    ]
    write_records(kept, tmp_path / "records.jsonl")
    todo = jobs(STUDY, tmp_path / "two")
    recorded = read_records([tmp_path / "records.jsonl"], todo)
    again = collect(todo, recorded)
    assert [result.job for result in again] == todo
    for ours, theirs in zip(again, results, strict=True):
        assert ours.accuracy_P().tolist() == theirs.accuracy_P().tolist()
        assert ours.distinct_P().tolist() == theirs.distinct_P().tolist()
        least = min(line["samples"] for line in theirs.problems)
        assert ours.distinct_among(least) == pytest.approx(theirs.distinct_among(least))
        assert ours.ceiling(2) == (None if theirs.ceiling(2) is None else pytest.approx(theirs.ceiling(2)))
        assert ours.final["actor/refreshes"] == 9.0 and "time/step_s" not in ours.final
        assert ours.series["eval/pass@1"] == theirs.series["eval/pass@1"]
    write_records(again, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "records.jsonl").read_bytes()
    said: list[str] = []
    assert run_all(todo, tmp_path / "two", slots=1, known=recorded.keys(), say=said.append) == []
    assert said == ["5 of 5 runs are done"]


def test_a_warm_up_is_run_again_where_a_run_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = drawn(tmp_path / "one", Random(0))
    write_records(results[:-1], tmp_path / "records.jsonl")
    todo = jobs(STUDY, tmp_path / "two")
    recorded = read_records([tmp_path / "records.jsonl"], todo)
    started: list[str] = []

    def work(waiting: list[Job], *_: object) -> list[Failure]:
        started.extend(job.name for job in waiting)
        return []

    monkeypatch.setattr("megatron_vp2o.study.runner._work", work)
    run_all(todo, tmp_path / "two", slots=1, known=recorded.keys(), say=lambda text: None)
    assert started == ["t/warm_up/seed_0", todo[-1].name]


def test_what_is_not_of_the_study_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records(drawn(tmp_path / "one", Random(1)), path)
    changed = jobs(Study("s", STUDY.tasks, {"grpo": (), "a": ("x=2",)}, (1, 2), "grpo"), tmp_path)
    with pytest.raises(ConfigError, match=r"line 1: t/a/seed_1 ran with other arguments .*x=1.*now.*x=2"):
        read_records([path], changed)
    fewer = jobs(Study("s", STUDY.tasks, {"grpo": ()}, (2, 3), "grpo"), tmp_path)
    assert sorted(read_records([path], fewer)) == ["t/grpo/seed_2", "t/warm_up/seed_0"]
    lines = path.read_text().splitlines()
    for damaged in (lines[0][:-9], "[]", '{"task":"t"}', "", lines[0].replace('"problems":[[', '"problems":[5,[')):
        path.write_text("\n".join([lines[1], damaged, lines[2]]))
        with pytest.raises(ConfigError, match="line 2 is no record of a run"):
            read_records([path], fewer)
    with pytest.raises(ConfigError, match="nowhere"):
        read_records([tmp_path / "nowhere"], fewer)


def test_a_page_goes_between_its_lines_and_nowhere_else(tmp_path: Path) -> None:
    results = drawn(tmp_path, Random(2))
    page = markdown(STUDY, [result.job for result in results], results, [], "make study")
    document = tmp_path / "results.md"
    document.write_text("# Mine\n\n<!-- study s -->\nold\n<!-- end of study s -->\n\nWhat I say.\n")
    for _ in range(2):  # the second time changes nothing
        insert(page, "s", document)
        text = document.read_text()
        assert text.startswith("# Mine\n\n<!-- study s -->\n\n") and text.endswith("\nWhat I say.\n")
        assert "old" not in text and text.count("### t\n") == 1 and "## s" not in text.splitlines()
    for wrong in ("", "<!-- end of study s -->\n<!-- study s -->\n", 2 * "<!-- study s -->\n<!-- end of study s -->\n"):
        document.write_text(wrong)
        with pytest.raises(ConfigError, match="once each and in this order"):
            insert(page, "s", document)
        assert document.read_text() == wrong

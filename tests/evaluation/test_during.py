"""Benchmarks during training: their samples are those of `evaluate` on the run's checkpoint, with one rank, with two, and after a
kill; what cannot be asked is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from megatron_vp2o.config.compose import compose
from megatron_vp2o.errors import ConfigError, DataError
from megatron_vp2o.evaluation.during import asked_during, summary
from megatron_vp2o.evaluation.results import Sample, files, read
from megatron_vp2o.tracking.schema import find_metric
from tests.data.row_files import plain_rows, write
from tests.distributed import run_distributed
from tests.resume_draws import SMALL, record
from tests.resume_job import Run, run_in_one_process
from tests.tasks.chat_tokenizers import chatml_folder

LENGTH, LIMIT, SAMPLES = 6, 2, 3
NAMES = ("gpqa", "min_thinking_1")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    path = write(folder / "rows.jsonl", plain_rows(Random(0), 30))
    tiny = [setting for setting in SMALL if not setting.startswith(("task.train_size", "task.test_size"))]
    return [
        "--config-name=train",
        *tiny,
        "task=rows",
        "reward=length",
        "reward.length.zero_words=3",
        "reward.length.full_words=1",
        f"task.path={path}",
        f"task.tokenizer={chatml_folder(folder / 'tokenizer')}",
        "task.test_size=0",
        "model.max_sequence_length=640",
        "model.moe_router_topk=2",
        "algorithm.group_size=2",
        "algorithm.filter_uniform_groups=false",
        "algorithm.entropy_coef=0.1",
        "algorithm.prompts_per_step=4",
        "algorithm.steps=3",
        "evaluation.interval=0",
        f"evaluation.suites=[{','.join(NAMES)}]",
        "evaluation.suite.interval=2",
        "evaluation.suite.data=own",
        f"evaluation.suite.limit={LIMIT}",
        f"evaluation.suite.samples={SAMPLES}",
        f"evaluation.suite.max_new_tokens={LENGTH}",
        "evaluation.suite.temperature=0.9",
        "evaluation.suite.top_p=0.8",
        "evaluation.suite.batch=5",
        "evaluation.suite.workers=1",
        "evaluation.suite.thinking=false",
        "checkpoint.interval=1",
        "checkpoint.keep=9",
    ]


def found(run: Path) -> dict[tuple[int, str], list[Sample]]:
    """Samples of a run by step and benchmark."""
    all_read = [read(path) for path in files(run / "suites")]
    return {(header["step"], header["benchmark"]): samples for header, samples in all_read}


def texts(samples: list[Sample]) -> list[tuple[str, int, str]]:
    return sorted((sample.problem, sample.sample, sample.text) for sample in samples)


@pytest.mark.slow
@pytest.mark.distributed
def test_suites_of_a_run_are_the_evaluation_of_its_checkpoints(tmp_path: Path, arguments: list[str]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    statuses = run_in_one_process(tmp_path / "first", [Run(str(whole), arguments)])
    assert statuses == [[0]], (tmp_path / "first" / "output-0.txt").read_text()
    by_part = found(whole)
    assert set(by_part) == {(step, name) for step in (0, 2, 3) for name in NAMES}
    lines = {line["step"]: line for line in record(whole)}
    for (step, name), samples in by_part.items():
        assert len({sample.problem for sample in samples}) == LIMIT and len(samples) == LIMIT * SAMPLES
        for key, value in summary(samples).items():
            assert lines[step][f"suite/{name}/{key}"] == pytest.approx(value)
            assert find_metric(f"suite/{name}/{key}") is not None
    assert lines[1].get("suite/gpqa/correct") is None
    assert texts(by_part[0, "gpqa"]) != texts(by_part[3, "gpqa"])  # the weights moved

    # The same weights from their checkpoint, by the command, in two processes.
    out = tmp_path / "out"
    run_distributed(
        "megatron_vp2o.evaluate",
        2,
        *(f"whole={whole}", "--out", str(out), "--steps", "2,3", "--suite", ",".join(NAMES), "--data", "own"),
        *("--lengths", str(LENGTH), "--limit", str(LIMIT), "--samples", str(SAMPLES), "--temperature", "0.9"),
        *("--top-p", "0.8", "--batch", "5", "--workers", "1", "--seed", str(compose("train", []).seed)),
        *("--thinking", "false"),
        timeout=240,
    )
    again = {(header["step"], header["benchmark"]): samples for header, samples in map(read, files(out))}
    for part, samples in again.items():
        assert texts(samples) == texts(by_part[part])

    # A run that is killed after step 2, with samples of a later life of the run in its folder, goes on to the same.
    run_in_one_process(
        tmp_path / "second", [Run(str(killed), arguments, end="SIGKILL", after_step=2), Run(str(killed), arguments)]
    )
    resumed = found(killed)
    assert {part: texts(samples) for part, samples in resumed.items()} == {
        part: texts(samples) for part, samples in by_part.items()
    }


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ("evaluation.suites=[gpqaa]", ConfigError, "'gpqaa' is neither a suite"),
        ("evaluation.suite.data=nowhere", DataError, "nowhere has no gpqa.jsonl or .parquet.*make eval-data"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments: list[str], change: str, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        asked_during(compose("train", [*arguments[1:], change]))


def test_a_suite_is_its_benchmarks(arguments: list[str]) -> None:
    asked = asked_during(compose("train", [*arguments[1:], "evaluation.suites=[table1,gpqa,ifeval]"]))
    names = [questions.benchmark.name for questions in asked]
    assert len(names) == len(set(names)) == 7
    assert asked_during(compose("train", [*arguments[1:], "evaluation.suites=[]"])) == []


@pytest.mark.slow
def test_prompts_that_leave_no_room_end_the_run_before_it_begins(tmp_path: Path, arguments: list[str]) -> None:
    run = tmp_path / "run"
    statuses = run_in_one_process(
        tmp_path / "out", [Run(str(run), [*arguments, "evaluation.suite.max_new_tokens=639"])]
    )
    said = (tmp_path / "out" / "output-0.txt").read_text()
    assert statuses != [[0]] and "evaluation.suites: a prompt has" in said and "639" in said
    assert not (run / "metrics.jsonl").exists()

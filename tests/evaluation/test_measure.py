"""Numbers and intervals against plain loops; tables from a results folder that is written by hand."""

from __future__ import annotations

import csv
import random
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_vp2o.errors import ConfigError, DataError
from megatron_vp2o.evaluation import measure
from megatron_vp2o.evaluation.benchmarks import BENCHMARKS
from megatron_vp2o.evaluation.measure import Cell, Table
from megatron_vp2o.evaluation.paper import TABLE_1, TABLE_2
from megatron_vp2o.evaluation.report import write_report
from megatron_vp2o.evaluation.results import Sample, SampleFile, path_of
from megatron_vp2o.study.statistics import bootstrap, bootstrap_over_problems


def _cell(draws: random.Random, problems: int, samples: int, step: int = 0) -> Cell:
    by_problem = {}
    for p in range(problems):
        n = 1 + p % 3
        found = []
        for s in range(samples):
            strict = draws.randint(0, n)
            loose = draws.randint(strict, n)
            values = {
                "correct": float(draws.random() < 0.4),
                "strict_prompt": float(strict == n),
                "loose_prompt": float(loose == n),
                "strict_followed": float(strict),
                "loose_followed": float(loose),
                "instructions": float(n),
            }
            tokens = draws.randint(0, 9), draws.randint(1, 30)
            facts = {"rating": 800.0 + 100 * p, "contest": "1", "index": str(p)}
            found.append(Sample(f"p{p}", s, values, "", *tokens, draws.random() < 0.2, "text", facts))
        by_problem[f"p{p}"] = tuple(found)
    return Cell({"step": step}, by_problem, None)


def _table(seed: int, problems: int = 9, samples: int = 4, checkpoints: int = 3) -> Table:
    draws = random.Random(seed)
    cells = tuple(_cell(draws, problems, samples, step) for step in range(checkpoints))
    return Table(cells, tuple(cells[0].by_problem))


@pytest.mark.parametrize("seed", range(3))
def test_each_metric_is_what_a_loop_says_for_any_weights(seed: int) -> None:
    """A weight is how often a problem is in the resample: repeat it so often."""
    table = _table(seed)
    random_ = np.random.default_rng(seed)
    w_RP = random_.integers(0, 4, (5, 9)).astype(float) + (np.arange(9) == 0)
    medians = measure.median(table, "solution_tokens")(w_RP)
    by_key = {m.key: m for m in BENCHMARKS["ifbench"].metrics}
    micro = measure.statistic(by_key["strict_instruction"], table)
    prompts = measure.statistic(by_key["loose_prompt"], table)
    truncated = measure.share(table, "truncated")(w_RP)
    assert micro is not None and prompts is not None
    for r, weights in enumerate(w_RP):
        chosen = [name for name, weight in zip(table.problems, weights, strict=True) for _ in range(int(weight))]
        of_cells = [[s for name in chosen for s in cell.by_problem[name]] for cell in table.cells]
        assert medians[r] == np.mean([statistics.median(s.solution_tokens for s in own) for own in of_cells])
        followed = [
            sum(s.values["strict_followed"] for s in own) / sum(s.values["instructions"] for s in own)
            for own in of_cells
        ]
        assert micro(w_RP)[r] == pytest.approx(np.mean(followed))
        assert prompts(w_RP)[r] == pytest.approx(np.mean([[s.values["loose_prompt"] for s in own] for own in of_cells]))
        assert truncated[r] == pytest.approx(np.mean([[s.truncated for s in own] for own in of_cells]))


def test_pass_at_k_and_its_limits() -> None:
    table = _table(1)
    by_key = {m.key: m for m in BENCHMARKS["aime24"].metrics}
    assert measure.statistic(by_key["pass@8"], table) is None  # of four samples
    one, two, four = (measure.statistic(by_key[key], table) for key in ("accuracy", "pass@2", "pass@4"))
    assert one is not None and two is not None and four is not None
    ones = np.ones((1, 9))
    assert one(ones)[0] < two(ones)[0] < four(ones)[0]
    any_right = [
        [any(s.values["correct"] for s in cell.by_problem[name]) for name in table.problems] for cell in table.cells
    ]
    assert four(ones)[0] == pytest.approx(np.mean(any_right))


def test_an_answer_that_was_given_up_keeps_its_instructions_in_the_denominator() -> None:
    table = _table(2, checkpoints=1)
    metric = BENCHMARKS["ifbench"].metrics[1]
    before = measure.statistic(metric, table)
    samples = list(table.cells[0].by_problem["p2"])
    lost = Sample("p2", 0, {"correct": 0.0}, "time limit of the reward", 0, 0, False)
    cell = Cell({"step": 0}, {**table.cells[0].by_problem, "p2": (lost, *samples[1:])}, None)
    after = measure.statistic(metric, Table((cell,), table.problems))
    assert before is not None and after is not None
    ones = np.ones((1, 9))
    assert after(ones)[0] == pytest.approx(
        before(ones)[0] - samples[0].values["loose_followed"] / 4 / (3 * (1 + 2 + 3))
    )


def _mean(values: np.ndarray, w_RP: np.ndarray) -> np.ndarray:
    return (w_RP @ values) / w_RP.sum(axis=1)


def test_the_bootstrap_of_a_mean_is_the_studies_own_and_covers() -> None:
    random_ = np.random.default_rng(0)
    values = random_.normal(size=60)
    ours = bootstrap_over_problems(lambda w: (w @ values) / w.sum(axis=1), 60, seed=3)
    theirs = bootstrap(values[None], seed=3)
    assert ours.mean == pytest.approx(theirs.mean)
    assert ours.low == pytest.approx(theirs.low, abs=0.03) and ours.high == pytest.approx(theirs.high, abs=0.03)
    covered = 0
    for _ in range(200):
        sample = random_.exponential(size=50)
        found = bootstrap_over_problems(partial(_mean, sample), 50, resamples=400)
        covered += found.low < 1.0 < found.high
    assert 0.87 < covered / 200 < 0.99


def test_a_paired_difference_is_narrower_than_its_parts() -> None:
    table = _table(4, problems=40)
    shifted = Table(tuple(reversed(table.cells[:2])) + table.cells[2:], table.problems)
    metric = BENCHMARKS["aime24"].metrics[0]
    ours, theirs = measure.statistic(metric, shifted), measure.statistic(metric, table)
    assert ours is not None and theirs is not None
    same = measure.difference(ours, theirs, 40)
    assert (
        same.low == same.high == pytest.approx(0) and measure.estimate(ours, 40).high > measure.estimate(ours, 40).low
    )


def _write(out: Path, label: str, step: int, name: str, length: int, seed: int, **changes: object) -> None:
    draws = random.Random(seed)
    benchmark = BENCHMARKS[name]
    header = {
        **{"label": label, "step": step, "model": {}, "benchmark": name, "rows": "r", "revision": "x", "own": False},
        **{"problems": 8, "length": length, "temperature": 0.6, "top_p": 0.95, "seed": 0, **changes},
    }
    cell = _cell(draws, 8, 2)
    with SampleFile(path_of(out, label, step, benchmark.name, length), header) as file:
        file.append(sample for samples in cell.by_problem.values() for sample in samples)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(BENCHMARKS):
        for length in (8192, 16384):
            for step in (80, 160):
                for label in ("grpo", "vp2o"):
                    _write(tmp_path, label, step, name, length, hash((i, length, step)) % 1000 + len(label) * step)
    return tmp_path


def test_tables_and_figures_have_every_row_and_say_whose_numbers_are_whose(folder: Path) -> None:
    page = write_report(folder, paper=True).read_text(encoding="utf-8")
    table = (folder / "table1.md").read_text().splitlines()
    assert table[0].count("8K") == 4 and "8K vp2o - grpo" in table[0] and "the paper's 8K: GRPO / VP2O" in table[0]
    assert len(table) == 2 + len(TABLE_1) and "| 68.2 / 70.8 | 75.9 / 77.5 |" in table[2]
    assert len((folder / "table2.md").read_text().splitlines()) == 2 + len(TABLE_2)
    rows = list(csv.DictReader((folder / "table1.csv").open()))
    own = [row for row in rows if row["source"] == "measured"]
    assert len(own) == len(TABLE_1) * 4 and all(
        float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in own
    )
    assert {row["source"] for row in rows} == {"measured", "the paper"}
    assert page.count("<figure>") >= 6 * 2 + 2 * 2 * 5 and "Figure 3" in page and page.count('class="band"') > 20
    assert "a 33B/4B model that is not public" in page
    without = write_report(folder).read_text(encoding="utf-8")
    assert "68.2" not in without and "68.2" not in (folder / "table1.md").read_text()
    again = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    write_report(folder)
    assert again == {path.name: path.read_bytes() for path in folder.glob("*.*")}


def test_the_mean_over_checkpoints_and_the_gain_are_right(folder: Path) -> None:
    write_report(folder, baseline="vp2o")
    rows = {
        (row["benchmark"], row["length"], row["model"]): row for row in csv.DictReader((folder / "table1.csv").open())
    }
    results = measure.load(folder)
    for label in ("grpo", "vp2o"):
        cells = results.cells["aime25", 8192, label]
        right = [np.mean([s.values["correct"] for x in cell.by_problem.values() for s in x]) for cell in cells]
        assert float(rows["AIME 2025", "8192", label]["value"]) == pytest.approx(np.mean(right))
    gain = rows["AIME 2025", "8192", "grpo"]
    assert float(gain["gain"]) == pytest.approx(
        float(gain["value"]) - float(rows["AIME 2025", "8192", "vp2o"]["value"])
    )


def test_what_cannot_stand_in_one_table_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--baseline x: the results have grpo, vp2o"):
        write_report(folder, baseline="x")
    _write(folder, "other", 80, "gpqa", 8192, 1, temperature=1.0)
    with pytest.raises(DataError, match=r"differ in temperature is 0\.6 there and 1\.0 here"):
        write_report(folder)


def test_missing_samples_are_said(folder: Path) -> None:
    path_of(folder, "grpo", 80, "gpqa", 8192).with_suffix(".expected").write_text("99\n")
    assert "16 of 99 samples are there" in write_report(folder).read_text(encoding="utf-8")

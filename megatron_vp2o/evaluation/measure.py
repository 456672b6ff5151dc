"""From samples to numbers with intervals: metrics, ratings and medians, averaged over checkpoints, bootstrapped over problems.

Shape legend: C checkpoints, P problems, R resamples, N samples of all problems.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vp2o.core.evaluation import pass_at_k
from megatron_vp2o.errors import DataError
from megatron_vp2o.evaluation import results
from megatron_vp2o.evaluation.benchmark import PASS_AT, RATING, Metric
from megatron_vp2o.evaluation.graders import NOT_CHECKED
from megatron_vp2o.evaluation.rating import fit_B
from megatron_vp2o.evaluation.results import Sample
from megatron_vp2o.study.statistics import Estimate, bootstrap_over_problems

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""From how often each problem counts, [R, P], to values, [R]."""
RESAMPLES = 2000
SOLUTION, THINKING, TRUNCATED = "solution_tokens", "thinking_tokens", "truncated"


@dataclass(frozen=True)
class Cell:
    """All samples of one model, benchmark and length."""

    header: Mapping[str, Any]
    by_problem: Mapping[str, tuple[Sample, ...]]
    expected: int | None
    """Samples that were to be taken; None where that is not known."""

    @property
    def step(self) -> int:
        return int(self.header["step"])

    @property
    def count(self) -> int:
        return sum(map(len, self.by_problem.values()))

    def not_checked(self) -> int:
        """Samples of which something could not be checked here, and counts as failed."""
        return sum(s.reason.startswith(NOT_CHECKED) for samples in self.by_problem.values() for s in samples)

    def share_truncated(self) -> float:
        return sum(s.truncated for samples in self.by_problem.values() for s in samples) / self.count


Place = tuple[str, int, str]
"""Benchmark, length, label."""


@dataclass(frozen=True)
class Results:
    """A results folder, read."""

    cells: Mapping[Place, tuple[Cell, ...]]
    """Checkpoints in the order of their steps."""
    labels: tuple[str, ...]
    lengths: tuple[int, ...]

    def benchmarks(self) -> set[str]:
        return {benchmark for benchmark, _, _ in self.cells}


def load(out: Path) -> Results:
    """Read all of a results folder.

    Raises:
        DataError: it holds nothing, is damaged, or has models that were evaluated on different rows or in different ways.
    """
    cells: dict[Place, list[Cell]] = {}
    for path in results.files(out):
        header, samples = results.read(path)
        if not samples:
            continue
        by_problem: dict[str, list[Sample]] = {}
        for sample in sorted(samples, key=lambda s: s.sample):
            by_problem.setdefault(sample.problem, []).append(sample)
        place = (header["benchmark"], int(header["length"]), header["label"])
        note = path.with_suffix(results.EXPECTED)
        expected = int(note.read_text()) if note.is_file() else None
        cells.setdefault(place, []).append(
            Cell(header, {name: tuple(samples) for name, samples in by_problem.items()}, expected)
        )
    if not cells:
        raise DataError(f"{out} holds no samples: evaluate something into it first")
    _refuse_mixtures(cells)
    ordered = {place: tuple(sorted(found, key=lambda cell: cell.step)) for place, found in cells.items()}
    labels = tuple(sorted({label for _, _, label in cells}))
    return Results(ordered, labels, tuple(sorted({length for _, length, _ in cells})))


COMPARABLE = ("rows", "temperature", "top_p", "seed", "own")


def _refuse_mixtures(cells: Mapping[Place, Sequence[Cell]]) -> None:
    """Numbers of a benchmark stand in one row only where they were measured alike."""
    first: dict[str, Mapping[str, Any]] = {}
    for (benchmark, _, _), found in cells.items():
        for cell in found:
            known = first.setdefault(benchmark, cell.header)
            own, other = ({key: header[key] for key in COMPARABLE} for header in (cell.header, known))
            if differing := results.differences(other, own):
                raise DataError(
                    f"{benchmark} was evaluated in two ways: {known['label']} and {cell.header['label']} differ in {differing}: "
                    "they cannot stand in one table. Evaluate one of them again, into another --out"
                )


@dataclass(frozen=True)
class Table:
    """Checkpoints of one model on the problems that are compared."""

    cells: tuple[Cell, ...]
    problems: tuple[str, ...]

    def values_CP(self, value: Callable[[tuple[Sample, ...]], float]) -> Array:
        return np.array([[value(cell.by_problem[name]) for name in self.problems] for cell in self.cells])


def common_problems(series: Sequence[Sequence[Cell]]) -> tuple[str, ...]:
    """Problems that every checkpoint of every model has samples of."""
    every = [set(cell.by_problem) for cells in series for cell in cells]
    first = next(iter(series))[0].by_problem if every else {}
    return tuple(name for name in first if all(name in names for names in every))


def statistic(metric: Metric, table: Table) -> Statistic | None:
    """The mean of a metric over checkpoints, as a function of weights of problems; None where it cannot be had (pass@k of fewer
    samples than k)."""
    if metric.kind == RATING:
        return _rating(table)
    if metric.kind == PASS_AT:
        if min(len(cell.by_problem[name]) for cell in table.cells for name in table.problems) < metric.k:
            return None
        value_CP = table.values_CP(lambda s: pass_at_k(len(s), sum(x.values["correct"] > 0 for x in s), metric.k))
        return _quotient(value_CP, np.ones_like(value_CP))
    top_CP = table.values_CP(lambda s: float(np.mean([x.values.get(metric.top, 0.0) for x in s])))
    bottom_CP = np.ones_like(top_CP)
    if metric.bottom is not None:
        below = metric.bottom
        # an answer that the pool gave up on has no values: the prompt's instructions count all the same
        per_problem = {
            name: max((x.values.get(below, 0.0) for cell in table.cells for x in cell.by_problem[name]), default=0.0)
            for name in table.problems
        }
        bottom_CP = np.tile([per_problem[name] or 1.0 for name in table.problems], (len(table.cells), 1))
    return _quotient(top_CP, bottom_CP)


def _quotient(top_CP: Array, bottom_CP: Array) -> Statistic:
    return lambda w_RP: ((w_RP @ top_CP.T) / (w_RP @ bottom_CP.T)).mean(axis=1)


def _rating(table: Table) -> Statistic:
    difficulty_P = np.array([float(table.cells[0].by_problem[name][0].facts["rating"]) for name in table.problems])
    solved_CP = table.values_CP(lambda s: float(np.mean([x.values["correct"] for x in s])))
    tries_CP = table.values_CP(lambda s: float(len(s)))

    def rate(w_RP: Array) -> Array:
        ratings = [
            fit_B(difficulty_P, solved_P, w_RP * tries_P) for solved_P, tries_P in zip(solved_CP, tries_CP, strict=True)
        ]
        return np.mean(ratings, axis=0)

    return rate


def median(table: Table, field: str) -> Statistic:
    """The median of a count of tokens over all samples, averaged over checkpoints."""
    index = {name: i for i, name in enumerate(table.problems)}
    sorted_samples = []
    for cell in table.cells:
        pairs = sorted((getattr(s, field), index[name]) for name in table.problems for s in cell.by_problem[name])
        value_N, problem_N = np.array(pairs).T
        sorted_samples.append((value_N.astype(np.float64), problem_N))

    def medians(w_RP: Array) -> Array:
        found = []
        for value_N, problem_N in sorted_samples:
            # weights count problems, so their sums are whole numbers
            below_RN = np.cumsum(w_RP.astype(np.int32)[:, problem_N], axis=1, dtype=np.int32)
            total_R1 = below_RN[:, -1:].copy()
            below_RN *= 2
            # the lower and the upper median, which differ where exactly half of the weight lies below
            low_R, high_R = (below_RN < total_R1).sum(axis=1), (below_RN <= total_R1).sum(axis=1)
            found.append((value_N[low_R] + value_N[high_R]) / 2)
        return np.mean(found, axis=0)

    return medians


def share(table: Table, field: str) -> Statistic:
    """The share of samples for which a field is true, averaged over checkpoints."""
    value_CP = table.values_CP(lambda s: float(np.mean([bool(getattr(x, field)) for x in s])))
    return _quotient(value_CP, np.ones_like(value_CP))


def estimate(function: Statistic, problems: int) -> Estimate:
    """Its value with a 95 % interval."""
    return bootstrap_over_problems(function, problems, resamples=RESAMPLES)


def difference(ours: Statistic, theirs: Statistic, problems: int) -> Estimate:
    """Ours minus theirs on the same problems, with a 95 % interval of the difference: paired."""
    return bootstrap_over_problems(lambda w_RP: ours(w_RP) - theirs(w_RP), problems, resamples=RESAMPLES)


def tries_of(cells: Sequence[Cell]) -> list[dict[tuple[str, str], list[bool]]]:
    """For each checkpoint of Codeforces, by contest and index, whether each try solved the problem."""
    found = []
    for cell in cells:
        tries = {}
        for samples in cell.by_problem.values():
            facts = samples[0].facts
            if "contest" in facts and "index" in facts:
                tries[facts["contest"], facts["index"]] = [sample.values["correct"] > 0 for sample in samples]
        found.append(tries)
    return found

"""The paper's Tables 1 and 2 and what they leave out, made of a results folder: rows of estimates, as Markdown, CSV and HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from megatron_vp2o.evaluation.benchmark import Benchmark, Metric
from megatron_vp2o.evaluation.benchmarks import BENCHMARKS
from megatron_vp2o.evaluation.measure import (
    SOLUTION,
    THINKING,
    TRUNCATED,
    Results,
    Statistic,
    Table,
    common_problems,
    difference,
    estimate,
    median,
    share,
    statistic,
)
from megatron_vp2o.evaluation.model import shown_length
from megatron_vp2o.evaluation.paper import TABLE_1, TABLE_2
from megatron_vp2o.report import page
from megatron_vp2o.study.statistics import Estimate


@dataclass(frozen=True)
class Entry:
    """One model at one length."""

    value: Estimate
    gain: Estimate | None
    """Over the baseline, paired by problem; None for the baseline itself, or where there is none to compare with."""


@dataclass(frozen=True)
class Line:
    """One row of a table."""

    category: str
    name: str
    percent: bool
    entries: Mapping[tuple[int, str], Entry]
    """By length and label."""
    problems: int
    checkpoints: Mapping[str, int] = field(default_factory=dict)
    paper: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """The paper's own (baseline, VP2O) at these lengths, in the row's unit (points for percentages)."""


def table_1(results: Results, baseline: str) -> list[Line]:
    """Metrics averaged over checkpoints, by length, with gains over the baseline."""
    lines = []
    for benchmark in _present(results):
        for metric in benchmark.metrics:
            if metric.table and (line := metric_line(results, baseline, benchmark, metric)) is not None:
                lines.append(line)
    return lines


def table_2(results: Results, baseline: str) -> list[Line]:
    """Median solution tokens."""
    return [
        line
        for benchmark in _present(results)
        if benchmark.token_row is not None
        and (line := _token_line(results, baseline, benchmark, SOLUTION, TABLE_2.get(benchmark.name, {}))) is not None
    ]


def further(results: Results, baseline: str) -> list[Line]:
    """What the paper's tables leave out: pass@k, IFEval, thinking tokens, truncated answers, subjects."""
    lines: list[Line | None] = []
    for benchmark in _present(results):
        lines += [metric_line(results, baseline, benchmark, metric) for metric in benchmark.metrics if not metric.table]
    for benchmark in _present(results):
        lines.append(_token_line(results, baseline, benchmark, THINKING, {}))
        if benchmark.token_row is None:
            lines.append(_token_line(results, baseline, benchmark, SOLUTION, {}))
        lines.append(
            _line(
                results,
                baseline,
                benchmark,
                f"{benchmark.title}, truncated",
                True,
                lambda table: share(table, TRUNCATED),
            )
        )
    for benchmark in _present(results):
        if benchmark.breakdown is not None:
            lines += _subjects(results, baseline, benchmark)
    return [line for line in lines if line is not None]


def _present(results: Results) -> Iterator[Benchmark]:
    yield from (BENCHMARKS[name] for name in BENCHMARKS if name in results.benchmarks())


def metric_line(results: Results, baseline: str, benchmark: Benchmark, metric: Metric) -> Line | None:
    """The row of one metric."""
    name = benchmark.title if metric.key == "accuracy" else f"{benchmark.title} {metric.label}"
    paper = TABLE_1.get((benchmark.name, metric.key), {})
    return _line(
        results, baseline, benchmark, name, metric.percent, lambda table: statistic(metric, table), paper=paper
    )


def _token_line(
    results: Results, baseline: str, benchmark: Benchmark, which: str, paper: Mapping[int, tuple[float, float]]
) -> Line | None:
    name = benchmark.token_row or benchmark.title
    name = name if which == SOLUTION and benchmark.token_row else f"{name}, {which.split('_')[0]} tokens"
    return _line(results, baseline, benchmark, name, False, lambda table: median(table, which), paper=paper)


def _subjects(results: Results, baseline: str, benchmark: Benchmark) -> Iterator[Line | None]:
    cells = [cell for (name, _, _), found in results.cells.items() if name == benchmark.name for cell in found]
    subject_of = {
        name: str(samples[0].facts.get(benchmark.breakdown or "", ""))
        for cell in cells
        for name, samples in cell.by_problem.items()
    }
    for subject in sorted(set(subject_of.values()) - {""}):
        chosen = {name for name, own in subject_of.items() if own == subject}
        metric = benchmark.metrics[0]
        title = f"{benchmark.title}: {subject}"
        yield _line(
            results, baseline, benchmark, title, metric.percent, lambda t, m=metric: statistic(m, t), only=chosen
        )


def _line(
    results: Results,
    baseline: str,
    benchmark: Benchmark,
    name: str,
    percent: bool,
    make: object,
    *,
    paper: Mapping[int, tuple[float, float]] | None = None,
    only: set[str] | None = None,
) -> Line | None:
    """One row: the same statistic for every model and length, on the problems that all models of a length have."""
    entries: dict[tuple[int, str], Entry] = {}
    problems, checkpoints = 0, {}
    for length in results.lengths:
        series = {
            label: results.cells[benchmark.name, length, label]
            for label in results.labels
            if (benchmark.name, length, label) in results.cells
        }
        names = common_problems(list(series.values()))
        names = tuple(n for n in names if only is None or n in only)
        if not names:
            continue
        problems = max(problems, len(names))
        functions: dict[str, Statistic] = {}
        for label, cells in series.items():
            checkpoints[f"{label} {shown_length(length)}"] = len(cells)
            if (function := make(Table(cells, names))) is not None:  # type: ignore[operator]
                functions[label] = function
        for label, function in functions.items():
            gain = None
            if label != baseline and baseline in functions:
                gain = difference(function, functions[baseline], len(names))
            entries[length, label] = Entry(estimate(function, len(names)), gain)
    if not entries:
        return None
    return Line(benchmark.category, name, percent, entries, problems, checkpoints, paper or {})


# --- what they look like --------------------------------------------------------------------------------------------------


def columns(results: Results, baseline: str) -> list[tuple[int, str]]:
    """Lengths, and within each the baseline first."""
    labels = [label for label in results.labels if label == baseline] + [x for x in results.labels if x != baseline]
    measured = {(length, label) for _, length, label in results.cells}
    return [(length, label) for length in results.lengths for label in labels if (length, label) in measured]


def say(value: float, percent: bool) -> str:
    """Percentages with one digit, counts and ratings as whole numbers, short counts with one digit."""
    if percent:
        return f"{100 * value:.1f}"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"


def _interval(value: Estimate, percent: bool) -> str:
    return f"[{say(value.low, percent)}, {say(value.high, percent)}]"


def cells_of(line: Line, place: tuple[int, str], gain: bool) -> list[str]:
    """A value and, where the column has one, a gain; each with its interval. Empty texts where nothing was measured."""
    entry = line.entries.get(place)
    texts = [""] if entry is None else [f"{say(entry.value.mean, line.percent)} {_interval(entry.value, line.percent)}"]
    if gain:
        texts.append(
            ""
            if entry is None or entry.gain is None
            else f"{'+' if entry.gain.mean >= 0 else ''}{say(entry.gain.mean, line.percent)} {_interval(entry.gain, line.percent)}"
        )
    return texts


def _heads(results: Results, baseline: str, paper: bool) -> list[str]:
    heads = ["Category", "Benchmark"]
    for length, label in columns(results, baseline):
        heads.append(f"{shown_length(length)} {label}")
        if label != baseline:
            heads.append(f"{shown_length(length)} {label} - {baseline}")
    if paper:
        heads += [f"the paper's {shown_length(length)}: GRPO / VP2O" for length in _paper_lengths()]
    return heads


def _paper_lengths() -> list[int]:
    return sorted({length for entry in TABLE_1.values() for length in entry})


def _texts(line: Line, results: Results, baseline: str, paper: bool) -> list[str]:
    texts = [line.category, f"{line.name}{' (%)' if line.percent else ''}"]
    for place in columns(results, baseline):
        texts += cells_of(line, place, gain=place[1] != baseline)
    if paper:
        texts += [" / ".join(map(str, line.paper[n])) if n in line.paper else "" for n in _paper_lengths()]
    return texts


def markdown(lines: Sequence[Line], results: Results, baseline: str, *, paper: bool = False) -> str:
    """A Markdown table."""
    heads = _heads(results, baseline, paper)
    rows = [heads, ["---"] * len(heads), *(_texts(line, results, baseline, paper) for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def html(lines: Sequence[Line], results: Results, baseline: str, *, paper: bool = False) -> str:
    """The same as HTML."""

    def row(texts: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(text)}</{tag}>' for text in texts)}</tr>"

    return page.table(
        row(_heads(results, baseline, paper), "th"),
        [row(_texts(line, results, baseline, paper), "td") for line in lines],
        "evaluation",
    )


CSV_COLUMNS = (
    *("category", "benchmark", "source", "length", "model", "value", "low", "high"),
    *("baseline", "gain", "gain_low", "gain_high", "p", "problems", "checkpoints"),
)


def as_csv(lines: Sequence[Line], baseline: str, *, paper: bool = False) -> str:
    """One line for each row, length and model, in full precision; percentages as fractions."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for line in lines:
        for (length, label), entry in line.entries.items():
            value, gain = entry.value, entry.gain
            compared = [""] * 5 if gain is None else [baseline, gain.mean, gain.low, gain.high, gain.p]
            measured = [length, label, value.mean, value.low, value.high, *compared]
            counts = [line.problems, line.checkpoints.get(f"{label} {shown_length(length)}", "")]
            writer.writerow([line.category, line.name, "measured", *measured, *counts])
        for length, pair in line.paper.items() if paper else ():
            for label, number in zip(("GRPO", "VP2O"), pair, strict=True):
                scaled = number / 100 if line.percent else number
                writer.writerow([line.category, line.name, "the paper", length, label, scaled, *[""] * 9])
    return out.getvalue()

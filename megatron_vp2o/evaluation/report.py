"""Tables 1 and 2, Figures 1 to 3, out of a results folder alone: Markdown, CSV and one self-contained page."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path

import numpy as np

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.evaluation import tables
from megatron_vp2o.evaluation.benchmark import Benchmark, Metric
from megatron_vp2o.evaluation.benchmarks import BENCHMARKS
from megatron_vp2o.evaluation.measure import (
    SOLUTION,
    THINKING,
    Cell,
    Results,
    Statistic,
    Table,
    common_problems,
    estimate,
    load,
    median,
    statistic,
    tries_of,
)
from megatron_vp2o.evaluation.model import shown_length
from megatron_vp2o.evaluation.rating import fit, read_standings, simulated_contests
from megatron_vp2o.report import page
from megatron_vp2o.report.svg import Axis, Chart, Series
from megatron_vp2o.study.statistics import bootstrap

PAGE = "report.html"
BASELINES = ("baseline", "grpo")
"""Labels that are taken for the baseline where none is named."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b3548f", "#8a6d00", "#3f9fd8", "#555555")
INTERVALS = (
    "Means over checkpoints; in brackets 95 % intervals from a bootstrap over problems, of differences paired by problem. They "
    "say how far other problems would have moved the numbers, and nothing of other training runs; where all problems "
    "came out the same they have no width."
)
OWN = (
    "These are a handful of problems of our own that ship with the package, not the benchmarks: they show that everything "
    "works, and the numbers say nothing about the benchmarks."
)
THEIRS = (
    "The paper's own numbers are those that it prints, of a 33B/4B model that is not public, on problems and settings that it "
    "does not describe; ours are of other models."
)


def write_report(out: Path, *, baseline: str | None = None, paper: bool = False, standings: Path | None = None) -> Path:
    """Write all tables and figures into the results folder. Returns the page.

    Raises:
        DataError: the folder holds nothing that can stand in one table.
        ConfigError: the baseline is none of its labels.
    """
    results = load(out)
    base = _baseline(results, baseline)
    made = {
        "table1": tables.table_1(results, base),
        "table2": tables.table_2(results, base),
        "further": tables.further(results, base),
    }
    for name, lines in made.items():
        shown = paper and name != "further"
        _write(out / f"{name}.md", tables.markdown(lines, results, base, paper=shown))
        _write(out / f"{name}.csv", tables.as_csv(lines, base, paper=shown))
    trajectories = _trajectories(results)
    _write(out / "figures.csv", _figures_csv(trajectories))
    notes = _notes(results)
    ratings = _ratings(results, standings)
    _write(out / PAGE, _page(results, base, made, trajectories, notes, ratings, paper))
    return out / PAGE


def _baseline(results: Results, named: str | None) -> str:
    if named is not None and named not in results.labels:
        raise ConfigError(f"--baseline {named}: the results have {', '.join(results.labels)}")
    return named or next((label for label in BASELINES if label in results.labels), results.labels[0])


# --- figures --------------------------------------------------------------------------------------------------------------

Curve = tuple[str, int, str, str, list[tuple[int, float, float, float]]]
"""Benchmark, length, label, quantity, and (step, value, low, high) of each checkpoint."""


def _trajectories(results: Results) -> list[Curve]:
    curves: list[Curve] = []
    for (name, length, label), cells in results.cells.items():
        benchmark = BENCHMARKS[name]
        others = [found for (n, at, _), found in results.cells.items() if n == name and at == length]
        problems = common_problems(others)
        if not problems:
            continue
        main = main_metric(benchmark)
        quantities: dict[str, Callable[[Table], Statistic | None]] = {
            main.key: partial(statistic, main),
            THINKING: lambda table: median(table, THINKING),
            SOLUTION: lambda table: median(table, SOLUTION),
        }
        for quantity, make in quantities.items():
            points = []
            for cell in cells:
                if (function := make(Table((cell,), problems))) is not None:
                    value = estimate(function, len(problems))
                    points.append((cell.step, value.mean, value.low, value.high))
            curves.append((name, length, label, quantity, points))
    return curves


def main_metric(benchmark: Benchmark) -> Metric:
    """The one that figures show."""
    return benchmark.metrics[0]


def _figures_csv(curves: Sequence[Curve]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["benchmark", "length", "model", "quantity", "step", "value", "low", "high"])
    for name, length, label, quantity, points in curves:
        writer.writerows([name, length, label, quantity, *point] for point in points)
    return out.getvalue()


def _charts(results: Results, curves: Sequence[Curve], quantity: str | None, length: int) -> list[str]:
    """One chart for each benchmark: its main metric, or a count of tokens."""
    figures = []
    for name, benchmark in BENCHMARKS.items():
        wanted = quantity or main_metric(benchmark).key
        in_figure = benchmark.metrics[0].table if quantity is None else benchmark.token_row is not None
        found = {c[2]: c[4] for c in curves if c[0] == name and c[1] == length and c[3] == wanted and c[4]}
        if not found or not in_figure:
            continue
        percent = quantity is None and main_metric(benchmark).percent
        series = [
            Series(
                label,
                COLOURS[results.labels.index(label) % len(COLOURS)],
                [(float(step), value) for step, value, _, _ in points],
                band=[(float(step), low, high) for step, _, low, high in points] if len(points) > 1 else (),
            )
            for label, points in found.items()
        ]
        what = main_metric(benchmark).label if quantity is None else "median tokens"
        note = "shades: 95 % intervals over problems"
        figures.append(
            Chart(
                benchmark.title, note, Axis("training step", whole=True), Axis(what, percent=percent, zero=True), series
            ).html()
        )
    return figures


# --- page -----------------------------------------------------------------------------------------------------------------


def _page(
    results: Results,
    base: str,
    made: dict[str, list[tables.Line]],
    curves: Sequence[Curve],
    notes: list[str],
    ratings: list[list[str]],
    paper: bool,
) -> str:
    sections: list[tuple[str, str, str]] = []
    titles = {
        "table1": "Table 1: averages over checkpoints",
        "table2": "Table 2: median solution tokens",
        "further": "What the paper's tables leave out",
    }

    def add_table(name: str) -> None:
        if made[name]:
            shown = paper and name != "further"
            theirs = page.paragraph(THEIRS) if shown else ""
            body = page.paragraph(INTERVALS) + theirs + tables.html(made[name], results, base, paper=shown)
            sections.append((name, titles[name], body))

    add_table("table1")
    add_table("table2")
    for number, length in enumerate(results.lengths, 1):
        sections.append(
            (
                f"figure{number}",
                f"Figure {number}: over training, {shown_length(length)} tokens",
                page.charts(_charts(results, curves, None, length)),
            )
        )
    thoughts = "".join(
        page.paragraph(f"{what}, {shown_length(length)} tokens at most")
        + page.charts(_charts(results, curves, quantity, length))
        for length in results.lengths
        for quantity, what in ((THINKING, "Thinking"), (SOLUTION, "Solution"))
        if any(point[1] for c in curves if c[1] == length and c[3] == quantity for point in c[4])
    )
    if not any(point[1] for c in curves if c[3] == THINKING for point in c[4]):
        thoughts += page.paragraph("Without curves of thinking: half of the answers or more have no thinking tokens.")
    sections.append(
        ("tokens", f"Figure {len(results.lengths) + 1}: thinking and solution tokens over training", thoughts)
    )
    add_table("further")
    sections.append(("ratings", "Codeforces ratings", _rating_table(ratings)))
    sections.append(("about", "What was evaluated", "".join(map(page.paragraph, notes)) + _about(results)))
    own = any(cell.header["own"] for cells in results.cells.values() for cell in cells)
    head = f'<p class="warning">{escape(OWN)}</p>' if own and _only_own(results) else ""
    return page.page("Evaluation", sections, head)


def _only_own(results: Results) -> bool:
    """Whether even a benchmark of others was answered on our problems."""
    return any(
        cell.header["own"] and BENCHMARKS[name].remote is not None
        for (name, _, _), cells in results.cells.items()
        for cell in cells
    )


def _notes(results: Results) -> list[str]:
    """Sentences about what a reader has to know of the numbers."""
    notes = []
    for (name, length, label), cells in results.cells.items():
        where = f"{BENCHMARKS[name].title} at {shown_length(length)}, {label}"
        for cell in cells:
            if cell.expected is not None and cell.count < cell.expected:
                notes.append(f"{where}, step {cell.step}: {cell.count} of {cell.expected} samples are there.")
            if count := cell.not_checked():
                notes.append(
                    f"{where}, step {cell.step}: {count} answers have an instruction that cannot be "
                    "checked here; it counts as not followed."
                )
            if cell.header["model"].get("tokens") == "estimated":
                notes.append(f"{where}: thinking and solution tokens are told apart by their share of characters.")
    for name in sorted(results.benchmarks()):
        if BENCHMARKS[name].notes:
            notes.append(f"{BENCHMARKS[name].title}: {BENCHMARKS[name].notes}.")
    return list(dict.fromkeys(notes))


def _about(results: Results) -> str:
    head = "<tr>" + "".join(
        f"<th>{text}</th>"
        for text in (
            "benchmark",
            "rows",
            "problems",
            "licence",
            "length",
            "model",
            "steps",
            "samples",
            "sampling",
            "truncated",
        )
    )
    rows = []
    for (name, length, label), cells in results.cells.items():
        first: Cell = cells[0]
        header = first.header
        texts = [
            BENCHMARKS[name].title,
            f"{header['revision']} ({header['rows']})",
            f"{len(first.by_problem)} of {header['problems']}",
            BENCHMARKS[name].licence,
            shown_length(length),
            label,
            ", ".join(str(cell.step) for cell in cells),
            str(sum(cell.count for cell in cells)),
            f"temperature {header['temperature']:g}, top-p {header['top_p']:g}, seed {header['seed']}",
            f"{100 * np.mean([cell.share_truncated() for cell in cells]):.1f} %",
        ]
        rows.append("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in texts) + "</tr>")
    return page.table(head + "</tr>", rows, "about")


def _ratings(results: Results, standings: Path | None) -> list[list[str]]:
    """For each checkpoint that met Codeforces: the likelihood's rating and standard error, and that of simulated contests."""
    contests = [] if standings is None else read_standings(standings)
    if standings is not None and not contests:
        raise ConfigError(f"--standings {standings}: no contest with 200 rows or more is there")
    rows = []
    for (name, length, label), cells in results.cells.items():
        if name != "codeforces":
            continue
        for cell, tries in zip(cells, tries_of(cells), strict=True):
            samples = list(cell.by_problem.values())
            found = fit(
                np.array([float(s[0].facts["rating"]) for s in samples]),
                np.array([np.mean([x.values["correct"] for x in s]) for s in samples]),
                np.array([float(len(s)) for s in samples]),
            )
            simulated = simulated_contests(contests, tries)
            text = ""
            if len(simulated):
                interval = bootstrap(simulated[None])
                text = f"{interval.mean:.0f} [{interval.low:.0f}, {interval.high:.0f}] from {len(simulated)} contests"
            rows.append([label, shown_length(length), str(cell.step), f"{found.value:.0f} ± {found.error:.0f}", text])
    return rows


def _rating_table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "<tr>" + "".join(
        f"<th>{text}</th>" for text in ("model", "length", "step", "likelihood ± standard error", "simulated contests")
    )
    note = (
        "The most likely rating under Elo's model and a normal prior (1500 ± 1000), its standard error; and, with "
        "--standings, the mean over contests of the rating whose expected rank is the rank reached, with "
        "an interval from resampling contests."
    )
    return page.paragraph(note) + page.table(
        head + "</tr>", ["<tr>" + "".join(f"<td>{escape(t)}</td>" for t in row) + "</tr>" for row in rows], "about"
    )


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

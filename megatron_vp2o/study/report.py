"""A study's results in Markdown: one table a task, differences from the baseline with intervals, what failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_vp2o import atomic
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.study.plot import front_plot
from megatron_vp2o.study.results import Result
from megatron_vp2o.study.runner import Failure
from megatron_vp2o.study.spec import WARM_UP, Job, Study
from megatron_vp2o.study.statistics import (
    Array,
    Estimate,
    at_accuracy,
    bootstrap,
    front,
    holm,
    paired_difference,
    paired_ratio,
)


@dataclass(frozen=True)
class Compared:
    """A variant on one task, over the seeds that it and the baseline have both finished."""

    variant: str
    seeds: list[int]
    accuracy_pair: tuple[Array, Array]  # its own by seed and problem, and the baseline's
    distinct_pair: tuple[Array, Array]
    accuracy: Estimate
    distinct: Estimate
    accuracy_difference: Estimate
    distinct_difference: Estimate
    distinct_ratio: Estimate | None  # None where one of the two has no right answers
    matched: (
        float | None
    )  # distinct answers on validation minus the baseline's, where both first have the same accuracy
    degradation: float  # best accuracy on validation minus the last, mean over seeds
    tokens_per_solution: float  # generated tokens for one right answer on test
    syncs: float  # refreshes of the actors in a run


def markdown(
    study: Study, jobs: Sequence[Job], results: Sequence[Result], failures: Sequence[Failure], command: str
) -> str:
    """The page."""
    done = {result.job.name for result in results}
    lines = [f"## {study.name}", "", study.description.strip(), ""]
    commits, machines = ({r.done[key] for r in results} for key in ("commit", "machine"))
    lines += [
        f"`{command}`, commit {', '.join(sorted(commits)) or 'none'}, {'; '.join(sorted(machines)) or 'no machine'}. "
        f"{len(done)} of {len(jobs)} runs are finished."
    ]
    left = _left([job for job in jobs if job.name not in done])
    if left:
        lines += ["", f"Not finished: {left}."]
    for failure in failures:
        lines += ["", f"Failed: {failure.job.name}, status {failure.status}."]
    lines += _all_tasks(study, results)
    for task in study.tasks:
        lines += ["", *_task(study, task, [r for r in results if r.job.task == task])]
    return "\n".join(lines) + "\n"


def _all_tasks(study: Study, results: Sequence[Result]) -> list[str]:
    """One row a variant over all tasks. Nothing where there is one task, or nothing to compare on more than one."""
    rows = {
        task: {row.variant: row for row in compare(study, [r for r in results if r.job.task == task])}
        for task in study.tasks
    }
    if sum(len(found) > 1 for found in rows.values()) < 2:
        return []
    lines = [
        "",
        "### All tasks",
        "",
        f"Differences of accuracy from {study.baseline}'s in points, and its distinct right answers times what.",
        "",
        "| variant | " + " | ".join(study.tasks) + " | mean over tasks: accuracy - baseline | distinct / baseline |",
        "| --- |" + " --- |" * (len(study.tasks) + 2),
    ]
    for variant in study.variants:
        found = [rows[task].get(variant) for task in study.tasks]
        if variant == study.baseline or not any(found):
            continue
        cells = []
        for row in found:
            if row is None:
                cells.append("")
                continue
            ratio = row.distinct_ratio
            seeds = f"{len(row.seeds)} seed{'s' * (len(row.seeds) > 1)}"
            cells.append(
                f"{100 * row.accuracy_difference.mean:+.1f}, {'no answers' if ratio is None else f'{ratio.mean:.2f}x'} ({seeds})"
            )
        everywhere = [row for row in found if row is not None]
        if len(everywhere) == len(found):
            over_tasks = paired_ratio(*(row.distinct_pair for row in everywhere))
            cells.append(str(paired_difference(*(row.accuracy_pair for row in everywhere))))
            cells.append("" if over_tasks is None else str(over_tasks))
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join([variant, *cells]) + " |")
    return [
        *lines,
        "",
        "The last two columns: mean of the tasks' differences, geometric mean of their ratios, for variants that ran on all tasks; "
        "95 % intervals over seeds and problems of these tasks, not over other tasks.",
    ]


def insert(page: str, name: str, document: Path) -> None:
    """Put a study's page, without its heading, where a Markdown file has its place: between two lines of comment.

    Raises:
        ConfigError: the file does not have them, once each and in this order.
    """
    begin, end = f"<!-- study {name} -->", f"<!-- end of study {name} -->"
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--into {document}: {error.strerror}; name a Markdown file") from error
    lines = text.splitlines()
    places = [[i for i, line in enumerate(lines) if line.strip() == mark] for mark in (begin, end)]
    if [len(found) for found in places] != [1, 1] or places[0] > places[1]:
        raise ConfigError(f"--into {document}: it needs the lines `{begin}` and `{end}`, once each and in this order")
    (first,), (last,) = places
    body = page.split("\n", 1)[1].strip("\n").splitlines()
    atomic.write_text(document, "\n".join([*lines[: first + 1], "", *body, "", *lines[last:]]) + "\n")


def _left(jobs: Sequence[Job]) -> str:
    """Runs by task and seeds, those of variants with the same seeds together."""
    said = []
    for task in dict.fromkeys(job.task for job in jobs):
        by_variant: dict[str, list[int]] = {}
        for job in jobs:
            if job.task == task:
                by_variant.setdefault(job.variant, []).append(job.seed)
        by_seeds: dict[tuple[int, ...], list[str]] = {}
        for variant, seeds in by_variant.items():
            by_seeds.setdefault(tuple(sorted(seeds)), []).append(variant)
        said += [
            f"{task} {', '.join(names)} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})"
            for seeds, names in by_seeds.items()
        ]
    return "; ".join(said)


def plots(study: Study, results: Sequence[Result]) -> dict[str, str]:
    """One SVG a task that has something to show, by file name; the page refers to them."""
    found = {}
    for task in study.tasks:
        own = [r for r in results if r.job.task == task]
        rows = compare(study, own)
        if rows:
            warm = next((r for r in own if r.job.variant == WARM_UP), None)
            draws = min(r.problems[0]["samples"] for r in own)
            start = None if warm is None else (float(warm.accuracy_P().mean()), warm.distinct_among(draws))
            points = {row.variant: (row.accuracy, row.distinct) for row in rows}
            found[plot_name(study, task)] = front_plot(f"{study.name}: {task}", points, _front(rows), start)
    return found


def plot_name(study: Study, task: str) -> str:
    return f"{study.name}_{task}.svg"


def _front(rows: Sequence[Compared]) -> set[str]:
    return set(front({row.variant: (row.accuracy.mean, row.distinct.mean) for row in rows}))


def _task(study: Study, task: str, results: list[Result]) -> list[str]:
    rows = compare(study, results)
    lines = [f"### {task}", ""]
    warm = [r for r in results if r.job.variant == WARM_UP]
    if warm:
        first = warm[0]
        # as many as the runs that it is compared with have, where it has more
        draws = min(r.problems[0]["samples"] for r in results)
        ceiling = first.ceiling(draws)
        lines += [
            f"Test problems: {len(first.problems)}, {draws} samples each. Warm-up: accuracy "
            f"{first.accuracy_P().mean():.3f}, {first.distinct_among(draws):.2f} distinct right answers. "
            + (
                "Its own distribution, given that every sample is right, would show "
                f"{ceiling:.1f} (rejection-sampling ceiling, estimated from {first.right_samples():.1f} right samples a problem: a "
                "lower bound, the weaker the fewer these are; mean over the problems that it solved)."
                if ceiling is not None
                else "It solved no problem, so there is no rejection-sampling ceiling."
            ),
            "",
        ]
    if not rows:
        return [*lines, "No variant has a seed in common with the baseline yet."]
    best = _front(rows)
    others = [row for row in rows if row.variant != study.baseline]
    p = holm({row.variant: row.distinct_difference.p for row in others})
    lines += [
        "| variant | seeds | accuracy (pass@1) | distinct right answers | accuracy - baseline | distinct - baseline "
        "| distinct / baseline | Holm p (distinct) | distinct - baseline at equal accuracy | late loss of accuracy "
        "| tokens per right answer | weight syncs |",
        "|" + " --- |" * 12,
    ]
    for row in rows:
        own = row.variant == study.baseline
        cells = [
            f"{row.variant}{' *' if row.variant in best else ''}",
            " ".join(map(str, row.seeds)),
            str(row.accuracy),
            str(row.distinct),
            "baseline" if own else str(row.accuracy_difference),
            "baseline" if own else str(row.distinct_difference),
            "" if own or row.distinct_ratio is None else str(row.distinct_ratio),
            "" if own else f"{p[row.variant]:.3f}",
            "" if own or row.matched is None else f"{row.matched:+.2f}",
            f"{row.degradation:.3f}",
            f"{row.tokens_per_solution:.1f}",
            f"{row.syncs:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Test split; 95 % intervals from a bootstrap over seeds and problems, differences paired by both. `*`: no other variant "
        "is better in accuracy or distinct answers without being worse in the other. With one seed the intervals are over "
        "problems only.",
        "",
        f"![{task}: accuracy and distinct right answers]({plot_name(study, task)})",
    ]
    return lines


def compare(study: Study, results: Sequence[Result]) -> list[Compared]:
    """Each variant beside the baseline, in the study's order; variants without a seed in common with it are left out."""
    by_variant = {variant: {r.job.seed: r for r in results if r.job.variant == variant} for variant in study.variants}
    baseline = by_variant[study.baseline]
    rows = []
    for variant, runs in by_variant.items():
        seeds = sorted(runs.keys() & baseline.keys())
        if not seeds:
            continue
        ours, theirs = [runs[s] for s in seeds], [baseline[s] for s in seeds]
        accuracy, distinct = ((_stack(ours, what), _stack(theirs, what)) for what in ("accuracy", "distinct"))
        rows.append(
            Compared(
                variant,
                seeds,
                accuracy,
                distinct,
                bootstrap(accuracy[0]),
                bootstrap(distinct[0]),
                paired_difference(accuracy),
                paired_difference(distinct),
                paired_ratio(distinct),
                _matched(ours, theirs),
                float(np.mean([max(r.series["eval/pass@1"]) - r.series["eval/pass@1"][-1] for r in ours])),
                _tokens_per_solution(ours),
                float(np.mean([run.final["actor/refreshes"] for run in ours])),
            )
        )
    return rows


def _stack(runs: Sequence[Result], what: str) -> Array:
    return np.stack([run.accuracy_P() if what == "accuracy" else run.distinct_P() for run in runs])


def _matched(ours: Sequence[Result], theirs: Sequence[Result]) -> float | None:
    """Mean over seeds, each at the highest accuracy that both runs reached; None where no seed has one above the start."""
    differences = []
    for own, other in zip(ours, theirs, strict=True):
        level = min(max(run.series["eval/pass@1"]) for run in (own, other))
        if level <= max(run.series["eval/pass@1"][0] for run in (own, other)):
            continue
        here, there = (
            at_accuracy(run.series["eval/pass@1"], run.series["eval/distinct"], level) for run in (own, other)
        )
        if here is not None and there is not None:
            differences.append(here - there)
    return float(np.mean(differences)) if differences else None


def _tokens_per_solution(runs: Sequence[Result]) -> float:
    accuracy = np.mean([run.final["test/pass@1"] for run in runs])
    length = np.mean([run.final["test/response_length"] for run in runs])
    return float(length / accuracy) if accuracy > 0 else float("inf")

"""A report of one run or several: one HTML file that needs nothing else, drawn from their records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from megatron_vp2o import atomic
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.report import charts as specs
from megatron_vp2o.report import page
from megatron_vp2o.report.charts import Palette, Spec, chart
from megatron_vp2o.report.health import Finding, Level, findings
from megatron_vp2o.report.samples import samples
from megatron_vp2o.tracking import format as fmt
from megatron_vp2o.tracking.console import say_measure
from megatron_vp2o.tracking.runs import ACCURACY, Measure, Run, load_runs, measures, short_names

_PHASES = (
    ("rollout", "rollout", "#2f6690"),
    ("reward", "reward", "#7a5195"),
    ("train", "training", "#1f7a5c"),
    ("sync", "weight sync", "#bc5090"),
    ("other", "rest of the step", "#8a949e"),
    ("eval", "evaluation", "#c77700"),
    ("checkpoint", "checkpoint", "#5c4a3d"),
)
_MARKS = {Level.warning: "▲", Level.note: "●", Level.good: "✓"}


def write_report(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Draw the report of these runs and return its path.

    Runs that are still being written may be drawn. The same records give the same bytes.

    Args:
        run_dirs: folders with `metrics.jsonl` and, for names and versions, `config.yaml`.
        out: the file; by default `report.html` in the folder of the only run, `comparison.html` in that of the last.

    Raises:
        RecordError: if a run's record is missing, empty or damaged.
        ConfigError: if no run is given, or one twice.
    """
    runs = load_runs(_distinct(run_dirs))
    return atomic.write_text(_target(run_dirs, out), report(runs))


def report(runs: Sequence[Run]) -> str:
    """The report as HTML."""
    short = short_names([run.name for run in runs])
    palette = Palette(runs, short)
    learning = [run for run in runs if not run.supervised]
    warm_up = [run for run in runs if run.supervised]
    sections = [
        ("comparison", "Held-out results", _comparison(runs, palette)),
        ("learning", "Learning curves", _learning(learning, palette)),
        ("diversity", "Answer diversity", _diversity(learning, palette)),
        ("training", "Training", _section(specs.TRAINING, specs.SAMPLES, learning, palette)),
        ("experts", "Experts and proximal control", _section(specs.EXPERTS, specs.SAMPLES, learning, palette)),
        ("further", "Further measurements", _further(learning, palette)),
        ("samples", "Samples", samples(runs, short)),
        ("warm-up", "Supervised training", _warm_up(warm_up, palette)),
        ("time", "Where the time went", _time(runs, palette)),
        ("health", "Training health", _health(runs, palette)),
        ("runs", "What was run", _about(runs, palette)),
    ]
    shared = runs[0].name.removesuffix(short[0]).rstrip("_-./") if len(runs) > 1 else ""
    title = f"{shared}: {', '.join(short)}" if shared else ", ".join(short)
    head = page.paragraph(
        "Everything here comes from the records of the runs (metrics.jsonl). Held-out numbers are of validation problems, "
        "which training never sees; test problems are evaluated once, at the end. A number in a legend is the last "
        "value; thin lines are single steps, thick ones through them their moving average."
    )
    return page.page(title, sections, f'<div class="soft">{head}</div>{_tiles(runs, palette)}')


def _distinct(run_dirs: Sequence[str | Path]) -> list[Path]:
    folders = [Path(folder) for folder in run_dirs]
    if not folders:
        raise ConfigError("a report needs the folder of at least one run")
    resolved = [folder.resolve() for folder in folders]
    for folder, where in zip(folders, resolved, strict=True):
        if resolved.count(where) > 1:
            raise ConfigError(f"the run {folder} is given {resolved.count(where)} times: give each run once")
    return folders


def _target(run_dirs: Sequence[str | Path], out: str | Path | None) -> Path:
    if out is not None:
        return Path(out)
    return Path(run_dirs[-1]) / ("report.html" if len(run_dirs) == 1 else "comparison.html")


def _tiles(runs: Sequence[Run], palette: Palette) -> str:
    tiles = []
    for run in runs:
        accuracy = run.values(f"eval/{ACCURACY}")
        if len(accuracy) > 1:
            big = f"{fmt.percent(accuracy[0])} → {fmt.percent(accuracy[-1])}"
            small = f"greedy accuracy, {_in_points(accuracy[-1] - accuracy[0])} points"
        elif accuracy:
            big, small = fmt.percent(accuracy[0]), "greedy accuracy, one evaluation"
        elif loss := run.values("supervised/loss"):
            big, small = f"{fmt.number(loss[0])} → {fmt.number(loss[-1])}", "training loss (nats)"
        else:
            big, small = "–", "no evaluation yet"
        spent = f"{run.steps:,} steps, {fmt.duration(run.last(specs.ELAPSED) or 0.0)}"
        tiles.append(
            f'<div class="tile" style="--run:{palette.colour(run)}">'
            f'<span class="name">{escape(palette.name(run))}</span><b>{big}</b><span>{small}</span>'
            f"<span>{spent}</span><span>{_verdict(run)}</span></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _verdict(run: Run) -> str:
    levels = [finding.level for finding in findings(run)]
    said = []
    for level in (Level.warning, Level.note):
        if count := levels.count(level):
            said.append(
                f'<i class="{level.value}">{_MARKS[level]} {count} {level.value}{"" if count == 1 else "s"}</i>'
            )
    return f'<a href="#health">{" ".join(said)}</a>' if said else ""


def _comparison(runs: Sequence[Run], palette: Palette) -> str:
    evaluated = [run for run in runs if run.evaluations()]
    if not evaluated:
        return ""
    names, kinds = ["<th></th>"], ["<th></th>"]
    for run in evaluated:
        rows = run.evaluations()
        best = run.best_evaluation()
        names.append(
            f'<th colspan="4" class="run first" style="--run:{palette.colour(run)}">{escape(palette.name(run))}</th>'
        )
        first, last, top = (int(run.at("step", row) or 0) for row in (rows[0], rows[-1], best or 0))
        kinds += [f'<th class="first">step {first:,}</th><th>step {last:,}</th><th>change</th><th>best ({top:,})</th>']
    found = measures(evaluated)
    body = [
        f"<tr><th>{escape(_label(measure))}</th>{''.join(_four(run, measure) for run in evaluated)}</tr>"
        for measure in found
    ]
    note = page.paragraph(
        "Validation problems: the first and the last evaluation, the change (of shares: in points), and the evaluation "
        "with the best greedy accuracy, with its step."
    )
    return note + page.table(f"<tr>{''.join(names)}</tr><tr>{''.join(kinds)}</tr>", body) + _test(evaluated, palette)


def _four(run: Run, measure: Measure) -> str:
    rows = run.evaluations()
    key = f"eval/{measure.key}"
    first, last, best = (run.at(key, row) for row in (rows[0], rows[-1], run.best_evaluation() or 0))
    change = "–"
    if first is not None and last is not None and len(rows) > 1:
        change = _in_points(last - first) if measure.percent else fmt.signed(last - first)
    said = ["–" if value is None else say_measure(measure, value) for value in (first, last, best)]
    return (
        f'<td class="first">{said[0]}</td><td class="last">{said[1]}</td><td class="delta">{change}</td>'
        f'<td class="best">{said[2]}</td>'
    )


def _test(runs: Sequence[Run], palette: Palette) -> str:
    tested = [run for run in runs if run.evaluations("test")]
    if not tested:
        return ""
    rows = []
    for measure in measures(tested):
        values = [run.last(f"test/{measure.key}") for run in tested]
        cells = "".join(f"<td>{'–' if value is None else say_measure(measure, value)}</td>" for value in values)
        rows.append(f"<tr><th>{escape(_label(measure))}</th>{cells}</tr>")
    return page.paragraph("Test problems, after the last step.") + page.table(_heads(tested, palette), rows)


def _heads(runs: Sequence[Run], palette: Palette) -> str:
    cells = (f'<th class="run" style="--run:{palette.colour(run)}">{escape(palette.name(run))}</th>' for run in runs)
    return f"<tr><th></th>{''.join(cells)}</tr>"


def _learning(runs: Sequence[Run], palette: Palette) -> str:
    wanted = [specs.ACCURACY_CHART, *specs.pass_at_specs(runs)]
    figures = [
        chart(spec, x, runs, palette).html()
        for spec in wanted
        for x in (specs.SAMPLES, specs.ELAPSED)
        if _drawable(spec, runs)
    ]
    grid = page.charts(figures, pairs=True)
    note = page.paragraph("On validation problems: left over training samples, right over wall-clock time.")
    return note + grid if grid else ""


def _diversity(runs: Sequence[Run], palette: Palette) -> str:
    grid = _section(specs.DIVERSITY, specs.SAMPLES, runs, palette)
    note = page.paragraph(
        "In how many different ways problems are solved. Reinforcement tends to raise accuracy by giving up answers; "
        "these curves show how many."
    )
    return note + grid if grid else ""


def _further(runs: Sequence[Run], palette: Palette) -> str:
    drawn = [specs.ACCURACY_CHART, *specs.DIVERSITY, *specs.TRAINING, *specs.EXPERTS]
    return _section(specs.further_specs(runs, drawn), specs.SAMPLES, runs, palette)


def _warm_up(runs: Sequence[Run], palette: Palette) -> str:
    extra = specs.further_specs(runs, specs.WARM_UP)
    return _section([*specs.WARM_UP, *extra], specs.STEP, runs, palette)


def _section(wanted: Sequence[Spec], x: str, runs: Sequence[Run], palette: Palette) -> str:
    """Charts of what these runs measured; what never changed is said in a sentence instead."""
    figures, constant = [], []
    for spec in filter(lambda spec: _drawable(spec, runs), wanted):
        drawn = chart(spec, x, runs, palette)
        values = {value for run in runs for value in run.values(spec.key)}
        if len(values) > 1:
            figures.append(drawn.html())
        else:
            constant.append(f"{spec.title} {drawn.y.say(values.pop())}")
    grid = page.charts(figures)
    return grid + (page.paragraph(f"The same at every step: {'; '.join(constant)}.") if constant else "")


def _drawable(spec: Spec, runs: Sequence[Run]) -> bool:
    """Whether a run has two points to draw a line between."""
    return any(len(run.values(spec.key)) > 1 for run in runs)


def _time(runs: Sequence[Run], palette: Palette) -> str:
    bars: list[str] = []
    used: set[str] = set()
    for run in runs:
        spent = _seconds_by_phase(run)
        total = sum(spent.values())
        if total <= 0:
            continue
        used |= spent.keys()
        parts = []
        for phase, name, colour in _PHASES:
            if share := spent.get(phase, 0.0) / total:
                words = f"{name}: {fmt.percent(share)}, {fmt.duration(spent[phase])}"
                text = f"{100 * share:.0f}%" if share >= 0.05 else ""
                parts.append(
                    f'<div style="--run:{colour};flex:{share:.5f} 0 0" title="{escape(words, quote=True)}">{text}</div>'
                )
        bars.append(
            f'<h3>{escape(palette.name(run))} <span class="soft">{fmt.duration(total)}</span></h3>'
            f'<div class="bar">{"".join(parts)}</div>'
        )
    if not bars:
        return ""
    legend = "".join(
        f'<li><span class="swatch" style="--run:{colour}"></span> {name}</li>'
        for phase, name, colour in _PHASES
        if phase in used
    )
    speed = _section(specs.SPEED, specs.ELAPSED, runs, palette)
    return f'<ul class="legend" style="margin:12px 0">{legend}</ul>{"".join(bars)}{speed}'


def _seconds_by_phase(run: Run) -> dict[str, float]:
    """Seconds of each phase over the whole record; "other" is what a step took beyond its phases."""
    spent = {phase: sum(run.values(f"time/{phase}_s")) for phase, _, _ in _PHASES if phase != "other"}
    inside = sum(spent[phase] for phase in ("rollout", "reward", "train", "sync"))
    spent["other"] = max(0.0, sum(run.values("time/step_s")) - inside)
    return {phase: seconds for phase, seconds in spent.items() if seconds > 0}


def _health(runs: Sequence[Run], palette: Palette) -> str:
    cards = []
    for run in runs:
        found = findings(run)
        loud = [finding for level in (Level.warning, Level.note) for finding in found if finding.level is level]
        quiet = [finding for finding in found if finding.level is Level.good]

        passed = f"{len(quiet)} check{'' if len(quiet) == 1 else 's'} passed"
        cards.append(
            f'<div><h3><span class="swatch" style="--run:{palette.colour(run)}"></span> {escape(palette.name(run))}</h3>'
            f"<ul>{_items(loud)}</ul><details{'' if loud else ' open'}><summary>{passed}</summary>"
            f"<ul>{_items(quiet)}</ul></details></div>"
        )
    return f'<div class="health">{"".join(cards)}</div>'


def _items(found: Sequence[Finding]) -> str:
    return "".join(
        f'<li><i class="{finding.level.value}">{_MARKS[finding.level]} {escape(finding.title)}.</i> '
        f"<span>{escape(finding.detail)}</span></li>"
        for finding in found
    )


def _about(runs: Sequence[Run], palette: Palette) -> str:
    facts = [_facts(run) for run in runs]
    rows = []
    for name in dict.fromkeys(name for fact in facts for name in fact):
        cells = "".join(f"<td>{escape(fact.get(name, '–'))}</td>" for fact in facts)
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return page.table(_heads(runs, palette), rows, "about")


def _facts(run: Run) -> dict[str, str]:
    wanted = run.setting("algorithm", "steps")
    facts = {
        "name": run.name,
        "algorithm": run.setting("algorithm", "name") or ("supervised" if run.supervised else "reinforcement"),
        "steps": f"{run.steps:,}" + (f" of {wanted:,}" if isinstance(wanted, int) else ""),
        "training samples": fmt.number(int(run.last("samples") or 0)),
        "loss tokens": fmt.number(int(run.last("tokens") or 0)),
        "wall-clock": fmt.duration(run.last(specs.ELAPSED) or 0.0),
    }
    model, task = run.setting("model"), run.setting("task")
    if isinstance(task, Mapping) and task.get("name"):
        facts["task"] = str(task["name"])
    if isinstance(model, Mapping):
        facts["model"] = ", ".join(
            f"{word} {model[key]}" if after else f"{model[key]} {word}"
            for key, word, after in (
                ("num_layers", "layers", False),
                ("hidden_size", "hidden size", True),
                ("num_moe_experts", "experts", False),
                ("moe_router_topk", "top", True),
                ("precision", "in", True),
            )
            if model.get(key) is not None
        )
    layout = run.setting("parallel")
    if isinstance(layout, Mapping):
        sizes = (("TP", "tensor"), ("PP", "pipeline"), ("CP", "context"), ("EP", "expert"), ("ETP", "expert_tensor"))
        split = [f"{word}={layout[f'{key}_parallel']}" for word, key in sizes if layout.get(f"{key}_parallel", 1) != 1]
        facts["layout"] = " ".join(split) or "not split"
    for key, word in (("init_from", "started from"), ("seed", "seed"), ("notes", "notes")):
        if run.setting(key) is not None:
            facts[word] = str(run.setting(key))
    if run.versions:
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in run.versions.items() if version)
    return facts


def _label(measure: Measure) -> str:
    return f"{measure.label} ({measure.unit})" if measure.unit else measure.label


def _in_points(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "−")

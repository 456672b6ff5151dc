"""The metrics reference, made from the registry: `python -m megatron_vp2o.tracking.reference > docs/metrics.md`."""

from __future__ import annotations

from megatron_vp2o.config.schema import Algorithm
from megatron_vp2o.tracking.metric import ALL, Section
from megatron_vp2o.tracking.sections import SECTIONS

INTRODUCTION = """\
# Metrics

Made from `megatron_vp2o/tracking/sections.py` by `python -m megatron_vp2o.tracking.reference > docs/metrics.md`; edit
there.

`metrics.jsonl` in the run folder is the record of a run. TensorBoard and wandb get copies; the report is drawn from the
record alone, with `config.yaml` beside it for names and versions:

    python tools/report.py RUN [RUN ...] [--out FILE]

- One line for each training step, a JSON object, in order of `step`; the line of step 0 is the evaluation before
  training.
- Every line has every key of its algorithm, `null` where the metric was not measured at that step.
- Numbers are written so that they read back exactly. JSON has no NaN and no infinity: they are the strings `"NaN"`,
  `"Infinity"` and `"-Infinity"`.
- A line is on disk before the next step begins. A run that was killed and resumed cuts its record back to the
  checkpoint and goes on from there, so that the file ends up as if nothing had happened.
- Two runs of one configuration and seed differ only in `time/*`.

From Python, `megatron_vp2o.tracking.record.read(run_dir)` gives the columns: a dictionary from key to a list with one
entry for each line, `None` where it was not measured.
"""


def _table(section: Section) -> str:
    rows = ["| key | unit | meaning | measured | algorithms |", "| --- | --- | --- | --- | --- |"]
    for metric in section.metrics:
        algorithms = "all" if metric.algorithms == ALL else ", ".join(_names(metric.algorithms))
        cells = (f"`{metric.key}`", metric.unit, metric.meaning, metric.when, algorithms)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return f"## {section.title}\n\n" + "\n".join(rows)


def _names(algorithms: frozenset[Algorithm]) -> list[str]:
    return [algorithm.name for algorithm in Algorithm if algorithm in algorithms]


def reference() -> str:
    """The whole of docs/metrics.md."""
    return "\n\n".join([INTRODUCTION.rstrip(), *map(_table, SECTIONS)]) + "\n"


if __name__ == "__main__":
    print(reference(), end="")

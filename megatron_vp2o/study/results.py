"""One line for each finished run of a study, and for each problem what its samples came to."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vp2o import atomic
from megatron_vp2o.core.evaluation import pass_at_k
from megatron_vp2o.study.runner import DONE
from megatron_vp2o.study.spec import WARM_UP, Job, portable
from megatron_vp2o.study.statistics import Array, expected_distinct
from megatron_vp2o.tracking.record import read

PROBLEMS = "problems_test.jsonl"
METRICS = (
    "test/greedy_accuracy",
    "test/pass@1",
    "test/distinct",
    "test/coverage",
    "eval/pass@1",
    "eval/distinct",
    "actor/refreshes",
)


@dataclass(frozen=True)
class Result:
    """A finished run."""

    job: Job
    done: dict[str, Any]  # what `runner` noted of it
    series: dict[str, list[float]]  # metrics at the evaluations
    final: dict[str, float]
    problems: list[dict[str, Any]]  # of the test split

    def accuracy_P(self) -> Array:
        """Share of right samples of each problem."""
        return np.array([sum(line["answers"].values()) / line["samples"] for line in self.problems])

    def distinct_P(self) -> Array:
        """Distinct right answers among the samples of each problem."""
        return np.array([float(len(line["answers"])) for line in self.problems])

    def right_samples(self) -> float:
        """Right samples of a problem that has any, mean."""
        right = [sum(line["answers"].values()) for line in self.problems if line["answers"]]
        return float(np.mean(right)) if right else 0.0

    def distinct_among(self, draws: int) -> float:
        """Distinct right answers expected among so many of the samples, mean over problems: unbiased, as pass@k is."""
        return float(
            np.mean(
                [
                    sum(pass_at_k(line["samples"], count, draws) for count in line["answers"].values())
                    for line in self.problems
                ]
            )
        )

    def ceiling(self, draws: int) -> float | None:
        """A warm-up's ceiling: distinct answers expected if so many draws were all right; mean over the problems that it solved."""
        expected = [
            expected_distinct(list(line["answers"].values()), draws) for line in self.problems if line["answers"]
        ]
        return float(np.mean(expected)) if expected else None


def collect(jobs: Iterable[Job], recorded: Mapping[str, Result] | None = None) -> list[Result]:
    """The finished ones among these runs.

    Args:
        recorded: those that were finished elsewhere, by the job's name; what is finished here comes first.
    """
    recorded = recorded or {}
    here = {job: (Path(job.folder) / DONE).is_file() for job in jobs}
    return [_result(job) if here[job] else recorded[job.name] for job in here if here[job] or job.name in recorded]


def _result(job: Job) -> Result:
    folder = Path(job.folder)
    record = read(folder)
    evaluated = [i for i, value in enumerate(record["eval/pass@1"]) if value is not None]
    keys = [key for key in record if key.startswith("eval/")]
    series = {key: [float(record[key][i] or 0.0) for i in evaluated] for key in keys}
    final = {key: float(values[-1]) for key, values in record.items() if values and values[-1] is not None}
    problems = [json.loads(line) for line in (folder / PROBLEMS).read_text(encoding="utf-8").splitlines()]
    return Result(job, json.loads((folder / DONE).read_text(encoding="utf-8")), series, final, problems)


def write_table(results: Sequence[Result], path: Path) -> None:
    """One line a run, as CSV: what ran, what it measured at its end, and where that came from. Sorted, so that it does not
    depend on the order in which runs came to their end; times are left out for the same reason."""
    passes = sorted(
        {key for r in results for key in r.final if key.startswith("test/pass@")}, key=lambda k: int(k[10:])
    )
    metrics = list(dict.fromkeys([*METRICS, *passes]))
    columns = ["task", "variant", "seed", *metrics, "best_eval/pass@1", "commit", "machine", "arguments"]
    rows = []
    for result in sorted(results, key=lambda r: (r.job.task, r.job.variant != WARM_UP, r.job.variant, r.job.seed)):
        job = result.job
        rows.append(
            {
                "task": job.task,
                "variant": job.variant,
                "seed": job.seed,
                **{key: result.final.get(key, "") for key in metrics},
                "best_eval/pass@1": max(result.series["eval/pass@1"]),
                "commit": result.done["commit"],
                "machine": result.done["machine"],
                "arguments": " ".join(portable(job.arguments)),
            }
        )
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    atomic.write_text(path, text.getvalue())

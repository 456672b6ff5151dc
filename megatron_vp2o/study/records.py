"""A study's finished runs in one file: another machine can go on from it, and table and page can be made again without the runs.

One line of JSON a run: which run it is, what `runner` noted of it, its evaluations, its last metrics of the test split and of the
actors, and of each test problem how many samples there were and how often each right answer was among them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vp2o import atomic
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.study.results import Result
from megatron_vp2o.study.spec import Job, portable

RECORDS = "records.jsonl"
_SERIES = ("eval/pass@1", "eval/distinct")
_FINAL = ("test/", "actor/")


def write_records(results: Sequence[Result], path: Path) -> None:
    """Write the file, sorted, so that it does not depend on the order in which runs came to their end."""
    ordered = sorted(results, key=lambda r: (r.job.task, r.job.variant, r.job.seed))
    atomic.write_text(path, "".join(json.dumps(_line(result), separators=(",", ":")) + "\n" for result in ordered))


def _line(result: Result) -> dict[str, Any]:
    job = result.job
    return {
        "task": job.task,
        "variant": job.variant,
        "seed": job.seed,
        "done": {**result.done, "arguments": portable(result.done["arguments"])},
        "series": {key: result.series[key] for key in _SERIES if key in result.series},
        "final": {key: value for key, value in result.final.items() if key.startswith(_FINAL) or key in _SERIES},
        "problems": [[line["samples"], *sorted(line["answers"].values(), reverse=True)] for line in result.problems],
    }


def read_records(paths: Sequence[Path], jobs: Sequence[Job]) -> dict[str, Result]:
    """The runs of these jobs that the files have, by the job's name; runs that the study does not have are left out.

    Raises:
        ConfigError: no such file, a line that is no record, or a run with other arguments than the study's.
    """
    by_name = {job.name: job for job in jobs}
    found: dict[str, Result] = {}
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"--records {path}: {error.strerror}; name a study's {RECORDS}") from error
        for number, text in enumerate(lines, 1):
            try:
                line = json.loads(text)
                name = Job(line["task"], line["variant"], line["seed"], ()).name
                problems = [
                    {"samples": samples, "answers": {str(place): count for place, count in enumerate(counts)}}
                    for samples, *counts in line["problems"]
                ]
                done, series, final = line["done"], line["series"], line["final"]
                arguments = list(done["arguments"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path}, line {number} is no record of a run ({error!r}): restore the file"
                ) from error
            if name not in by_name:
                continue
            if arguments != portable(by_name[name].arguments):
                raise ConfigError(
                    f"{path}, line {number}: {name} ran with other arguments ({' '.join(arguments)}; now "
                    f"{' '.join(portable(by_name[name].arguments))}): leave the file out, or take that line out"
                )
            found[name] = Result(by_name[name], done, series, final, problems)
    return found

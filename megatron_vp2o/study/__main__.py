"""`python -m megatron_vp2o.study NAME`: run what is missing of a study, then write its table and page."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

from megatron_vp2o.errors import ConfigError, UserError
from megatron_vp2o.study.records import RECORDS, read_records, write_records
from megatron_vp2o.study.report import insert, markdown, plots
from megatron_vp2o.study.results import collect, write_table
from megatron_vp2o.study.runner import run_all
from megatron_vp2o.study.spec import Study, jobs, load_study

TABLE, PAGE = "results.csv", "results.md"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 where every run is done, 1 where some failed or are left, 2 for what is no study."""
    options = _options(arguments)
    try:
        study = load_study(options.study)
        if options.against is not None:
            study = _against(study, options.against)
        folder = Path(options.folder or Path("runs") / "study" / study.name)
        todo, failures = jobs(study, folder), []
        recorded = read_records([Path(name) for name in options.records], todo)
        if not options.table_only and options.against is None:
            until = None if options.minutes is None else time.time() + 60 * options.minutes
            prefix = shlex.split(options.prefix)
            failures = run_all(
                todo,
                folder,
                slots=options.slots,
                prefix=prefix,
                preload=study.preload,
                until=until,
                known=recorded.keys(),
                say=_say,
            )
        results = collect(todo, recorded)
        page = markdown(study, todo, results, failures, f"make study STUDY={study.name}")
        if options.into is not None:
            insert(page, study.name, Path(options.into))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    if options.against is not None:
        (path := folder / f"results_against_{options.against}.md").write_text(page, encoding="utf-8")
        print(path)
        return 0 if len(results) == len(todo) else 1
    write_table(results, folder / TABLE)
    write_records(results, folder / RECORDS)
    (folder / PAGE).write_text(page, encoding="utf-8")
    for name, text in plots(study, results).items():
        for place in (folder, *([Path(options.into).parent] if options.into is not None else [])):
            (place / name).write_text(text, encoding="utf-8")
    print(f"{folder / TABLE}\n{folder / PAGE}")
    for failure in failures:
        print(f"failed: {failure.job.name} (status {failure.status})", file=sys.stderr)
    return 0 if len(results) == len(todo) else 1


def _against(study: Study, variant: str) -> Study:
    """The study with another baseline. Raises ConfigError."""
    if variant not in study.variants:
        raise ConfigError(f"--against {variant} is no variant: choose one of {', '.join(study.variants)}")
    return replace(study, baseline=variant)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m megatron_vp2o.study", description=__doc__)
    parser.add_argument("study", help="name of a file in study/, or the path of one")
    parser.add_argument("--folder", help="where its runs go (default: runs/study/NAME)")
    parser.add_argument("--slots", type=_count, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--prefix", default="", help="words before each run's command, `nice -n 10` for instance")
    parser.add_argument("--minutes", type=float, help="start nothing after so long, and let what runs save and stop")
    parser.add_argument("--table-only", action="store_true", help="run nothing; write table and page of what is done")
    parser.add_argument(
        "--against", metavar="VARIANT", help="run nothing; write a page of differences from this one, not the baseline"
    )
    parser.add_argument(
        "--records",
        metavar="FILE",
        nargs="+",
        default=[],
        help=f"{RECORDS} of other folders or machines: what they have is not run again, and is in table and page",
    )
    parser.add_argument(
        "--into",
        metavar="FILE",
        help="put the page into this Markdown file, too, between the lines `<!-- study NAME -->` and `<!-- end of study NAME -->`, "
        "and the plots beside it",
    )
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of runs: choose 1 or more")
    return int(text)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Draw and compare runs from their records: `python tools/report.py RUN [RUN ...] [--out FILE]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from megatron_vp2o.errors import UserError
from megatron_vp2o.report.report import write_report
from megatron_vp2o.tracking.console import comparison_table
from megatron_vp2o.tracking.runs import load_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison and the path of the page. Returns the exit status: 2 for a run that cannot be read."""
    parser = argparse.ArgumentParser(description="Write one self-contained HTML page about one run or several.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run (holds metrics.jsonl)")
    parser.add_argument(
        "--out", metavar="FILE", help="the page (default: RUN/report.html; comparison.html in the last of several)"
    )
    options = parser.parse_args(arguments)
    try:
        path = write_report(options.runs, options.out)
        Console(highlight=False).print(comparison_table(load_runs(options.runs)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

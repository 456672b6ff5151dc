"""task=rows over files of different length, made on the fly: seconds and memory of indexing, of a start, and of drawing prompts."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

MEASURE = """
import resource, sys, time
from megatron_vp2o.config.rows import RowsTaskConfig
from megatron_vp2o.rl.batching import PromptSchedule
from megatron_vp2o.rl.types import Split
from megatron_vp2o.tasks import make_task
from megatron_vp2o.tasks.tokenizer import CharTokenizer
import numpy, torch, json

def resident():
    pages = {line.split(":")[0]: int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(("Rss", "VmRSS"))}
    return pages["RssAnon"] / 1024, pages["VmRSS"] / 1024

before = resident()
start, busy = time.perf_counter(), time.process_time()
task = make_task(RowsTaskConfig(path=sys.argv[1], validation_size=100, test_size=200), room=4096)
made, busy = time.perf_counter() - start, time.process_time() - busy
schedule = PromptSchedule(task, per_step=256, seed=0, dp_rank=0, dp_size=1)
first = time.perf_counter()
schedule(0)
first = time.perf_counter() - first
draw = time.perf_counter()
for step in range(1, 9):
    schedule(step * 256)
draw = (time.perf_counter() - draw) / 8 / 256
after = resident()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
own, mapped = after[0] - before[0], after[1] - before[1]
print(json.dumps({"make": made, "busy": busy, "first": first, "draw": draw, "own": own, "mapped": mapped, "peak": peak}))
"""


def main(argv: list[str]) -> int:
    """Print a line a file and a start."""
    parser = argparse.ArgumentParser(prog="tools.bench rows", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl")
    options = parser.parse_known_args(argv)[0]
    print(
        "     rows     start  MB file       s   s CPU s first step us a prompt  MB own MB mapped too  MB peak",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for rows in options.rows:
            path = _write(Path(folder), rows, options.format)
            size = path.stat().st_size / 1e6
            for word in ("indexing", "again"):
                done = subprocess.run(
                    [sys.executable, "-c", MEASURE, str(path)],
                    check=True,
                    capture_output=True,
                    text=True,
                    env={**os.environ, "PYTHONPATH": "."},
                )
                seen = json.loads(done.stdout)
                print(
                    f"{rows:9} {word:>9} {size:8.1f} {seen['make']:7.2f} {seen['busy']:7.2f} "
                    f"{seen['first']:12.3f} {seen['draw'] * 1e6:11.0f} "
                    f"{seen['own']:7.1f} {seen['mapped']:13.1f} {seen['peak']:8.0f}",
                    flush=True,
                )
    return 0


def _write(folder: Path, rows: int, form: str) -> Path:
    """Questions of 60 to 700 characters."""
    random = Random(0)
    words = ["what", "is", "the", "sum", "of", "all", "even", "numbers", "below", "that", "divide", "a", "given", "one"]
    path = folder / f"{rows}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            text = " ".join(random.choices(words, k=random.randrange(12, 140)))
            file.write(
                json.dumps({"prompt": f"{i}: {text}?", "answer": str(random.randrange(1000)), "level": i % 5}) + "\n"
            )
    if form == "jsonl":
        return path
    import pyarrow.json
    import pyarrow.parquet

    target = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.json.read_json(path), target)
    return target

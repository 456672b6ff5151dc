"""Where a training step's time goes: short real runs of the tiny recipes, read back from their records."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WARMUP = 3  # steps that don't count: allocators, caches, compilation
# From random weights, so no earlier run is needed. Every response then has nearly the greatest length, and no group is
# left out, so that a step is a full one.
RUNS = {
    "supervised": ["--config-name", "countdown_tiny_supervised"],
    "grpo": ["--config-name", "countdown_tiny_grpo", "init_from=null", "algorithm.filter_uniform_groups=false"],
}
SHORT = ["evaluation=quick", "evaluation.interval=0", "evaluation.final_split=false", "checkpoint.interval=0"]
SHORT += ["checkpoint.save_at_end=false"]
PER_SECOND = {"time/tokens_per_s": "trained tokens/s", "time/rollout_tokens_per_s": "rollout tokens/s"}
PHASES = {"time/step_s": "step", **{f"time/{p}_s": p for p in ("rollout", "reward", "train", "sync")}}


def main(argv: list[str]) -> int:
    """Run each and print a table; medians over the steps after the warm-up."""
    parser = argparse.ArgumentParser(prog="tools.bench step", description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help=f"steps after {WARMUP} of warm-up")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of both runs; repeatable")
    arguments = parser.parse_known_args(argv)[0]
    for name, recipe in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            settings = [f"algorithm.steps={WARMUP + arguments.steps}", "optimizer.lr_warmup_steps=0"]
            command = [sys.executable, "-m", "megatron_vp2o.train", *recipe, *SHORT, *settings, *arguments.override]
            done = subprocess.run([*command, f"run_dir={folder}/run"], capture_output=True, text=True)
            if done.returncode != 0:
                print(done.stdout[-2000:], done.stderr[-4000:], f"\n{name}: status {done.returncode}", file=sys.stderr)
                return 1
            report(name, Path(folder) / "run" / "metrics.jsonl")
    return 0


def report(name: str, record: Path) -> None:
    """Print one run's medians."""
    rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["step"] > WARMUP]
    print(f"{name}, {len(rows)} steps:")
    for key, label in (PHASES | PER_SECOND).items():
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            middle = statistics.median(values)
            print(f"  {label:18}" + (f"{middle:12,.0f}" if key in PER_SECOND else f"{middle * 1e3:12,.1f} ms"))
            figure = (f"{middle:.6g}", "tokens/s") if key in PER_SECOND else (f"{middle * 1e3:.6g}", "ms")
            print("figure", f"step/{name}/{label.replace(' ', '_')}", *figure)  # tools.gpu_check collects these

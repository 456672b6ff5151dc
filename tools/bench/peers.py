"""TRL's GRPOTrainer and ours on the same work, in turn, each time in a fresh process; whole steps, as a ratio."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUSY = 0.5  # load average before the start above which the machine is not idle


def main(argv: list[str]) -> int:
    """Print a line a round and the ratio of medians; write build/bench/peers-DATE.json."""
    parser = argparse.ArgumentParser(prog="tools.bench peers", description=__doc__)
    parser.add_argument("--peer-python", type=Path, required=True, help="interpreter of the environment that has TRL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a process")
    parser.add_argument("--warmup", type=int, default=3, help="steps of a process that don't count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--wait-policy", default="", choices=["", "PASSIVE", "ACTIVE"], help="OMP_WAIT_POLICY of both")
    arguments = parser.parse_args(argv)
    sides = {
        "TRL": [str(arguments.peer_python), str(ROOT / "tools" / "bench" / "peer_trl.py")],
        "ours": [sys.executable, "-m", "tools.bench.peer_ours"],
    }
    load = os.getloadavg()[0]
    if load > BUSY:
        print(
            f"warning: other programs are running (load {load:.1f}); threads that wait for cores make this ratio worthless"
        )
    rounds = []
    for number in range(1, arguments.rounds + 1):
        results = {name: measure(command, arguments) for name, command in sides.items()}
        rounds.append(results)
        medians = ", ".join(f"{name} {result['median_s']:.3f} s" for name, result in results.items())
        ratio = results["TRL"]["median_s"] / results["ours"]["median_s"]
        print(f"round {number}/{arguments.rounds}: {medians} a step; TRL/ours {ratio:.2f}", flush=True)
    medians_s = {name: statistics.median(s for results in rounds for s in results[name]["step_s"]) for name in sides}
    ratio = medians_s["TRL"] / medians_s["ours"]
    first = rounds[0]
    print(
        f"all steps: TRL {first['TRL']['version']} {medians_s['TRL']:.3f} s, ours {medians_s['ours']:.3f} s;", end=" "
    )
    print(
        f"ours is {ratio:.2f} times as fast ({first['TRL']['parameters']} and {first['ours']['parameters']} parameters)"
    )
    out = ROOT / "build" / "bench" / f"peers-{date.today()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"load": load, "threads": arguments.threads, "wait_policy": arguments.wait_policy or "default"}
    record = settings | {"median_s": medians_s, "ratio": ratio, "rounds": rounds}
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"record: {out}")
    return 0


def measure(command: list[str], arguments: argparse.Namespace) -> dict:
    """One process of one side. Raises RuntimeError with its last output if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    # How idle threads wait: OpenMP's default unless asked for, on both sides (`train.py` would choose PASSIVE for ours).
    environment.pop("OMP_WAIT_POLICY", None)
    if arguments.wait_policy:
        environment["OMP_WAIT_POLICY"] = arguments.wait_policy
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        options = [f"--{key}={getattr(arguments, key)}" for key in ("steps", "warmup", "threads")]
        done = subprocess.run(
            [*command, *options, f"--out={out}"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
            )
        return json.loads(out.read_text(encoding="utf-8"))

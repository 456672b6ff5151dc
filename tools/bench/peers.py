"""TRL's GRPOTrainer and ours on the same work, in turn, each time in fresh processes; whole steps, as a ratio."""

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
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a side, over its processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="data-parallel processes to try")
    parser.add_argument("--prompt-tokens", type=int, help="length of every prompt; about 12 if not given")
    parser.add_argument("--new-tokens", type=int, help="length of every response; 16 if not given")
    parser.add_argument("--prompts", type=int, help="of a step; 32 if not given")
    parser.add_argument("--wait-policy", default="", choices=["", "PASSIVE", "ACTIVE"], help="OMP_WAIT_POLICY of both")
    arguments = parser.parse_args(argv)
    if bad := [n for n in arguments.processes if n < 1 or arguments.threads % n]:
        parser.error(f"--processes {bad[0]}: --threads {arguments.threads} have to be shared out evenly")
    sides = {
        "TRL": (str(arguments.peer_python), [str(ROOT / "tools" / "bench" / "peer_trl.py")]),
        "ours": (sys.executable, ["-m", "tools.bench.peer_ours"]),
    }
    load = os.getloadavg()[0]
    if load > BUSY:
        print(
            f"warning: other programs are running (load {load:.1f}); threads that wait for cores make this ratio worthless"
        )
    rounds = []
    for number in range(1, arguments.rounds + 1):
        results = {
            name: {n: measure(python, script, n, arguments) for n in arguments.processes}
            for name, (python, script) in sides.items()
        }
        rounds.append(results)
        said = [
            f"{name} {result['median_s']:.3f} s in {n} x {arguments.threads // n} threads"
            for name, found in results.items()
            for n, result in found.items()
        ]
        print(f"round {number}/{arguments.rounds}, a step: {', '.join(said)}", flush=True)
    # Each side in the way that is faster for it.
    medians_s: dict[str, float] = {}
    for name in sides:
        by_processes = {
            n: statistics.median(s for r in rounds for s in r[name][n]["step_s"]) for n in arguments.processes
        }
        best = min(by_processes, key=by_processes.__getitem__)
        medians_s[name] = by_processes[best]
        of = rounds[0][name][best]
        print(
            f"{name} {of['version']} at its best: {by_processes[best]:.3f} s a step, {best} x "
            f"{arguments.threads // best} threads ({of['parameters']} parameters)"
        )
    ratio = medians_s["TRL"] / medians_s["ours"]
    print(f"ours is {ratio:.2f} times as fast")
    out = ROOT / "build" / "bench" / f"peers-{date.today()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    shape = {name: getattr(arguments, name) for name in ("prompt_tokens", "new_tokens", "prompts")}
    settings = shape | {"load": load, "threads": arguments.threads, "wait_policy": arguments.wait_policy or "default"}
    record = settings | {"median_s": medians_s, "ratio": ratio, "rounds": rounds}
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"record: {out}")
    return 0


def measure(python: str, script: list[str], processes: int, arguments: argparse.Namespace) -> dict:
    """One run of one side, in data-parallel processes. Raises RuntimeError with its last output if it fails."""
    threads = arguments.threads // processes
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [python, *(launcher if processes > 1 else []), *script]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    # How idle threads wait: OpenMP's default unless asked for, on both sides (`train.py` would choose PASSIVE for ours).
    environment.pop("OMP_WAIT_POLICY", None)
    if arguments.wait_policy:
        environment["OMP_WAIT_POLICY"] = arguments.wait_policy
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        options = [f"--steps={arguments.steps}", f"--warmup={arguments.warmup}", f"--threads={threads}"]
        for name in ("prompt_tokens", "new_tokens", "prompts"):
            if (value := getattr(arguments, name)) is not None:
                options.append(f"--{name.replace('_', '-')}={value}")
        done = subprocess.run(
            [*command, *options, f"--out={out}"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
            )
        return json.loads(out.read_text(encoding="utf-8"))

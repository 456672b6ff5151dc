"""What `make gpu-check` runs on a CUDA machine that is lent for minutes: stages in order of worth, each with its own time limit.

A stage that fails or runs over does not stop the next. After each, its line is printed and everything known so far is written to
`build/gpu-check.json` and `build/gpu-check.md`. `--rehearse` runs the same commands with small shapes, where there is no CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stage:
    """One command and how long it may take, in seconds."""

    name: str
    limit: int
    command: tuple[str, ...]


@dataclass
class Result:
    """What became of a stage. `figures` maps a name to (value, unit)."""

    name: str
    status: str
    seconds: float
    figures: dict[str, tuple[float, str]] = field(default_factory=dict)
    tail: str = ""


def _bench(*arguments: str) -> tuple[str, ...]:
    return ("-m", "tools.bench", "gpu", *arguments)


STAGES = (
    Stage("smoke", 100, ("-m", "tools.gpu_smoke")),
    Stage("ceilings", 40, _bench("ceilings")),
    Stage("tests", 230, ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu")),
    Stage("layer_qwen3_30b_a3b", 90, _bench("layer", "--shape", "qwen3_30b_a3b")),
    Stage("layer_vp2o_33b_a4b", 90, _bench("layer", "--shape", "vp2o_33b_a4b")),
    Stage("layer_torch", 90, _bench("layer", "--shape", "qwen3_30b_a3b", "--implementation", "torch")),
    Stage("layer_local", 90, _bench("layer", "--shape", "qwen3_30b_a3b", "--implementation", "local")),
    Stage("experts", 90, _bench("experts")),
    Stage("logprobs", 60, _bench("logprobs")),
    Stage("decode", 90, _bench("decode")),
    Stage("step", 100, ("-m", "tools.bench", "step", "--steps", "6")),
)


def main() -> int:
    """Run the stages. The status is 1 where any of them failed."""
    parser = argparse.ArgumentParser(prog="tools.gpu_check", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="small shapes, for a machine without CUDA")
    parser.add_argument("--stages", default="", help="comma-separated names, run in this order; default: all")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no stage after so many seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder of the results")
    arguments = parser.parse_args()
    stages = {stage.name: stage for stage in STAGES}
    chosen = arguments.stages.split(",") if arguments.stages else list(stages)
    if unknown := [name for name in chosen if name not in stages]:
        parser.error(f"--stages {unknown[0]}: there are {', '.join(stages)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    begin, results = time.monotonic(), []
    about = _about()
    for stage in (stages[name] for name in chosen):
        if time.monotonic() - begin > arguments.seconds:
            results.append(Result(stage.name, "not started: no time left", 0.0))
        else:
            results.append(_run(stage, arguments.rehearse, arguments.out))
        _write(arguments.out, about, results)
    print((arguments.out / "gpu-check.md").read_text(encoding="utf-8"))
    return int(any(result.status != "ok" for result in results))


def _run(stage: Stage, rehearse: bool, out: Path) -> Result:
    small = ("--shrink", "16", "--rows", "2", "--width", "64", "--pairs", "1", "--precision", "fp32")
    command = [sys.executable, *stage.command, *(small if rehearse and "gpu" in stage.command[2:3] else ())]
    begin = time.monotonic()
    log = out / f"gpu-check-{stage.name}.log"
    with log.open("w", encoding="utf-8") as sink:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, timeout=stage.limit, stdin=subprocess.DEVNULL
            ).returncode
            status = "ok" if code == 0 else f"status {code}"
        except subprocess.TimeoutExpired:
            status = f"over its limit of {stage.limit} s"
    text = log.read_text(encoding="utf-8", errors="replace")
    figures = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 4 and words[0] == "figure":
            figures[words[1]] = float(words[2]), words[3]
    result = Result(stage.name, status, time.monotonic() - begin, figures, "" if status == "ok" else text[-3000:])
    print(f"{stage.name}: {result.status}, {result.seconds:.0f} s, {len(figures)} figures", flush=True)
    if status != "ok":
        print(result.tail, flush=True)
    return result


def _about() -> dict[str, Any]:
    code = (
        "import json, torch, megatron.core as m\n"
        "cuda = torch.cuda.is_available()\n"
        "print(json.dumps({'torch': torch.__version__, 'megatron-core': m.__version__,"
        " 'device': torch.cuda.get_device_name() if cuda else 'cpu'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    versions = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-500:]}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    name = os.environ.get("COMMIT") or commit.stdout.strip() or "unknown"  # a copied tree has no history
    return {"date": time.strftime("%Y-%m-%d"), "commit": name, "python": platform.python_version(), **versions}


def _write(out: Path, about: dict[str, Any], results: list[Result]) -> None:
    everything = {"about": about, "stages": [asdict(result) for result in results]}
    (out / "gpu-check.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    lines = [
        ", ".join(f"{key} {value}" for key, value in about.items()),
        "",
        "| stage | status | s |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {result.name} | {result.status} | {result.seconds:.0f} |" for result in results]
    lines += ["", "| figure | value | unit |", "| --- | --- | --- |"]
    lines += [f"| {n} | {v:,.4g} | {u} |" for result in results for n, (v, u) in result.figures.items()]
    (out / "gpu-check.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

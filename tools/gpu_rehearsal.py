"""What happens on a CUDA machine before the first CUDA call, in an environment like its own: `make gpu-rehearsal`.

Imports every module of the package, collects the tests marked `gpu`, goes through the stages of `tools.gpu_check` as far as the
smallest model, and asks for CUDA at the end, which has to be what is missing.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ELSEWHERE = {
    "verl": "megatron_vp2o.plugins.verl.",
    "vllm": "megatron_vp2o.rollout.server_side.",
    "math_verify": "megatron_vp2o.rewards.graders.math",
}
"""Packages that this environment lacks, and the modules that need them: of other programs, and of an extra."""


def main() -> int:
    """Returns 1 where anything failed that needs no GPU."""
    from megatron_vp2o.megatron.platform.cpu import enable_cpu

    enable_cpu()
    problems = _imports()
    print(f"gpu-rehearsal: every module was imported, {len(problems)} could not be", flush=True)
    for problem in problems:
        print(f"  {problem}")
    for label, command in (
        ("the tests marked gpu are collected", ("pytest", "--collect-only", "-q", "-m", "gpu", "tests/gpu")),
        (
            "the first stages",
            ("tools.gpu_check", "--rehearse", "--stages", "smoke,logprobs", "--out", "build/rehearsal"),
        ),
    ):
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=dict(os.environ))
        print(f"gpu-rehearsal: {label}: {'ok' if done.returncode == 0 else f'status {done.returncode}'}", flush=True)
        if done.returncode != 0:
            problems.append(label)
    return int(bool(problems))


def _imports() -> list[str]:
    import megatron_vp2o

    problems = []
    for module in pkgutil.walk_packages(megatron_vp2o.__path__, "megatron_vp2o."):
        if module.name.endswith(".__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            absent = (error.name or "").partition(".")[0]
            if not module.name.startswith(ELSEWHERE.get(absent, "nothing")):
                problems.append(f"{module.name}: {error}")
    return problems


if __name__ == "__main__":
    sys.exit(main())

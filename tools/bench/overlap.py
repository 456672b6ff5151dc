"""A step with rollout.ahead=1 over one without, where servers generate as long as the trainer trains.

    python -m tools.bench overlap [--steps 8 --prompts 64 --group 8 --epochs 16]

The servers are those of the tests, which wait and compute nothing (tests/rollout/any_model_server.py): how long a batch takes is
set to what a first run took for everything of a step but generation and synchronisation. Actors are refreshed each step. Medians,
without each run's first step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from megatron_vp2o.tracking.record import read
from tests.rollout.whole_runs import servers, train

PHASES = ("step", "rollout", "reference", "reward", "train", "sync")


def seconds_of(run_dir: Path) -> dict[str, float]:
    """Medians of the phases of a step."""
    record = read(run_dir)
    return {
        phase: statistics.median([float(value or 0.0) for value in record[f"time/{phase}_s"][2:]]) for phase in PHASES
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench overlap", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--prompts", type=int, default=64, help="of a step")
    parser.add_argument("--group", type=int, default=8, help="responses of a prompt")
    parser.add_argument(
        "--epochs", type=int, default=16, help="passes over a batch, so that a tiny model trains for seconds"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="overlap-") as folder:

        def run(name: str, ahead: int, wait: float) -> dict[str, float]:
            settings = [
                *(
                    "algorithm=grpo",
                    f"algorithm.steps={options.steps}",
                    f"algorithm.prompts_per_step={options.prompts}",
                ),
                *(
                    f"algorithm.group_size={options.group}",
                    f"rollout.ahead={ahead}",
                    f"algorithm.epochs={options.epochs}",
                ),
                *(
                    "evaluation.interval=0",
                    "checkpoint.interval=0",
                    "rollout.store=false",
                    "rollout.server.in_flight=1000",
                ),
            ]
            with servers(wait) as urls:
                train(Path(folder) / name, urls, *settings)
            found = seconds_of(Path(folder) / name)
            print(
                f"{name}, servers wait {wait:.2f} s: " + ", ".join(f"{key} {found[key]:.2f} s" for key in PHASES),
                flush=True,
            )
            return found

        first = run("measured", 0, 0.0)
        wait = max(0.0, first["step"] - first["sync"] - 2 * first["rollout"])
        plain, overlapped = run("ahead0", 0, wait), run("ahead1", 1, wait)
    print(f"a step with rollout.ahead=1 takes {100 * overlapped['step'] / plain['step']:.0f} % of one without")
    return 0

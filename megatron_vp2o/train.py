"""Composition root: `python -m megatron_vp2o.train --config-name RECIPE [key=value ...]`, alone or under torchrun."""

from __future__ import annotations

import os

from megatron_vp2o.cli import main_with_config
from megatron_vp2o.config.schema import TrainConfig


def run(config: TrainConfig) -> int:
    """One run; returns the exit status. What is heavy is imported here, after the configuration is known to be good."""
    # Idle OpenMP threads spin for 300,000 rounds by default: on a machine with other work a step then takes 20 to 40 times
    # as long. Not spinning at all (OMP_WAIT_POLICY=PASSIVE) halves the speed of an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from megatron_vp2o.session import train

    return train(config)


def main() -> None:
    """Entry point of the command line."""
    main_with_config(run)


if __name__ == "__main__":
    main()

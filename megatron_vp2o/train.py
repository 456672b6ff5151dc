"""Composition root: `python -m megatron_vp2o.train --config-name RECIPE [key=value ...]`, alone or under torchrun."""

from __future__ import annotations

import os

from megatron_vp2o.cli import main_with_config
from megatron_vp2o.config.schema import TrainConfig


def run(config: TrainConfig) -> int:
    """One run; returns the exit status. What is heavy is imported here, after the configuration is known to be good."""
    # OpenMP threads that spin while they wait cost nothing on an idle machine and slow a step 20 to 40 times on a busy one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from megatron_vp2o.session import train

    return train(config)


def main() -> None:
    """Entry point of the command line."""
    main_with_config(run)


if __name__ == "__main__":
    main()

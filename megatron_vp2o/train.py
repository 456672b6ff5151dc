"""Composition root: `python -m megatron_vp2o.train --config-name RECIPE [key=value ...]`, alone or under torchrun."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path

from megatron_vp2o.cli import main_with_config
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.config.status import PREEMPTED, STOPPED_FILE
from megatron_vp2o.hf.reader import read_models_of_checkpoints
from megatron_vp2o.rl import stop


def run(config: TrainConfig) -> int:
    """One run; returns the exit status. What is heavy is imported here, after the configuration is known to be good."""
    # Idle OpenMP threads spin for 300,000 rounds by default: on a machine with other work a step then takes 20 to 40 times
    # as long. Not spinning at all (OMP_WAIT_POLICY=PASSIVE) halves the speed of an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    _prepare_for_signals()
    from megatron_vp2o.parallel import failure

    with failure.ends_all_ranks():
        failure.join(timedelta(minutes=config.parallel.startup_minutes))
        from megatron_vp2o.session import train

        status = train(config)
    stop.finish()
    told = os.environ.get(STOPPED_FILE)
    if status == PREEMPTED and told is not None:
        Path(told).touch()
        return 0
    return status


def _prepare_for_signals() -> None:
    """A request to stop that comes while the run starts up is kept for its first step boundary.

    SIGTERM still ends a process that has nothing to save yet, also under the launcher's torchrun, which ignores it.
    """
    stop.listen(signal.SIGUSR1)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main() -> None:
    """Entry point of the command line."""
    read_models_of_checkpoints()
    main_with_config(run)


if __name__ == "__main__":
    main()

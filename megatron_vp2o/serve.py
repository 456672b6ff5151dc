"""`python -m megatron_vp2o.serve --config-name RECIPE [KEY=VALUE ...]`: the rollout servers of a run on this machine.

With the command line of the run (`megatron_vp2o.train`) and rollout.server.hosts > 0. It waits for the run's trainer, starts and
ends servers as that says, and ends with it. Imports no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.config.validate_rollout import rollout_outside, rollout_problems
from megatron_vp2o.errors import ConfigError, UserError
from megatron_vp2o.hf.reader import read_models_of_checkpoints
from megatron_vp2o.rollout.host import Host, end_with_signals, own_address
from megatron_vp2o.rollout.launch import (
    ServerProcess,
    free_port,
    gpu_shares,
    run_command,
    visible_gpus,
    vllm_environment,
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help says how")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 after the trainer's end, 2 for settings that cannot work."""
    try:
        parser = _Parser(prog="python -m megatron_vp2o.serve", description=(__doc__ or "").strip())
        parser.add_argument("--config-name", "-cn", required=True)
        parser.add_argument("--config-dir", "-cd")
        parser.add_argument("--ranks", type=int, default=0, help="ranks of the trainer on this node: its first GPUs")
        parser.add_argument("--address", help="of this machine, for other nodes (default: found out)")
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
        options = parser.parse_intermixed_args(arguments)
        read_models_of_checkpoints()
        folder = None if options.config_dir is None else Path(options.config_dir)
        config = compose(options.config_name, options.overrides, config_dir=folder)
        check(config)
        host = make_host(config, options.address or own_address(), options.ranks)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_status
    end_with_signals(host)
    print(f"rollout servers of {config.name}: waiting for the trainer in {meeting_folder(config)}", flush=True)
    print(f"rollout servers of {config.name} end: {host.serve()}", flush=True)
    return 0


def check(config: TrainConfig) -> None:
    """Raises ConfigError for a run that has no servers here."""
    problems = [*rollout_problems(config)]
    if not config.rollout.launch or not config.rollout.server.hosts:
        problems.append(
            f"rollout.launch={str(config.rollout.launch).lower()} and rollout.server.hosts={config.rollout.server.hosts}: the run "
            "waits for no host of servers; set rollout=vllm rollout.launch=true and rollout.server.hosts to their number, here and "
            "for the trainer"
        )
    if problems := problems or list(rollout_outside(config, host=True)):
        raise ConfigError("\n".join(problems))


def make_host(config: TrainConfig, address: str, ranks: int) -> Host:
    """The host of a run's servers on this machine. Raises RolloutError where GPUs are missing."""
    server = config.rollout.server
    # A host must not import torch to count them: it would take a GPU's memory, and seconds.
    gpus = visible_gpus(len(list(Path("/dev").glob("nvidia[0-9]*"))))
    shares = gpu_shares(gpus, ranks, server.count, server.tensor_parallel) if gpus else [""] * server.count
    command = run_command(config, cpu=not gpus, address=address)
    run_dir = Path(config.run_dir)
    processes = []
    for number, share in enumerate(shares):
        port = free_port(address) if server.port is None else server.port + number
        log = run_dir / f"server-{address}-{port}.log"
        processes.append(ServerProcess(command, vllm_environment(not gpus, share), port, log, address))
    return Host(processes, address, meeting_folder(config), 60 * server.idle_minutes)


def meeting_folder(config: TrainConfig) -> Path:
    """Where trainer and hosts of a run meet."""
    return Path(config.rollout.server.meeting_dir or Path(config.run_dir) / "servers")


if __name__ == "__main__":
    sys.exit(main())

"""`python -m megatron_vp2o.launch`: see `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_vp2o.config.reference import field_docstrings
from megatron_vp2o.config.register import recipe_list
from megatron_vp2o.errors import ConfigError, UserError
from megatron_vp2o.hf.reader import read_models_of_checkpoints
from megatron_vp2o.launch.checks import check
from megatron_vp2o.launch.jobs import make_jobs, world_size
from megatron_vp2o.launch.request import read
from megatron_vp2o.launch.settings import ExecutorSettings, SlurmSettings, TorchrunSettings

USAGE_STATUS = 2
USAGE = """\
Launch runs: on this machine, under torchrun, or under Slurm (through NeMo-Run).

  python -m megatron_vp2o.launch --config-name RECIPE executor=local|torchrun|slurm [executor.SETTING=VALUE ...] [KEY=VALUE ...]
  python -m megatron_vp2o.launch stages=[RECIPE,RECIPE,...] executor=... [RECIPE:KEY=VALUE ...]

  --dryrun               print the exact scripts and end; needs no Slurm
  --config-dir FOLDER    recipes of your own, and executor/NAME.yaml for executor=NAME
  seeds=[1,2,3]          one run for each, side by side: NAME_seed1, ...
  stages=[A,B,"COMMAND"] one after the other, each when the one before has succeeded; {run_dir} in a command is the folder
                         of the run before it. stages=auto: those that the recipe's init_from leads back to
  KEY=VALUE              a setting of every run; RECIPE:KEY=VALUE of one stage only

A run that is asked to stop (SIGUSR1, SIGTERM, a time limit, preemption) saves; under Slurm it queues again and goes on.
Everything is in docs/launching.md.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help says how")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a launch that was refused, with the reason."""
    parser = _Parser(prog="python -m megatron_vp2o.launch", add_help=False, allow_abbrev=False)
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--dryrun", "--dry-run", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("overrides", nargs="*")
    try:
        options = parser.parse_intermixed_args(arguments)
        if options.help:
            print(_help())
            return 0
        read_models_of_checkpoints()
        request = read(options.config_name, options.config_dir, options.overrides)
        check(request.executor, submit=not options.dryrun)
        jobs = make_jobs(request)
        ranks = world_size(request)
        names = ", ".join(job.name for job in jobs)
        print(f"{names}: {ranks} {'process' if ranks == 1 else 'processes'}", file=sys.stderr, flush=True)
        from megatron_vp2o.launch.experiment import launch

        return launch(jobs, request.executor, title=options.config_name or jobs[-1].name, dryrun=options.dryrun)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return USAGE_STATUS


def _help() -> str:
    parts = [USAGE, "Recipes", recipe_list()]
    seen: set[str] = set()
    for name, cls in (("local", ExecutorSettings), ("torchrun", TorchrunSettings), ("slurm", SlurmSettings)):
        more = " (and those above)" if seen else ""
        parts.append(f"\nexecutor={name}{more}: {' '.join((cls.__doc__ or '').split())}")
        for setting, text in field_docstrings(cls).items():
            if setting not in seen:
                parts.append(f"  executor.{setting}: {' '.join(text.split())}")
                seen.add(setting)
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())

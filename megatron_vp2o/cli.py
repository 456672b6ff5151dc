"""The frame of a command-line entry point: Hydra in, a validated TrainConfig out, and errors a person can read."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from megatron_vp2o.config.compose import to_config
from megatron_vp2o.config.explain import COMPOSITION_ERRORS, explain
from megatron_vp2o.config.register import register, resource_dir
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.config.validate import validate
from megatron_vp2o.config.written import as_written, is_swept, without_quotes
from megatron_vp2o.errors import ConfigError, UserError

USAGE_STATUS = 2  # of a run refused for its configuration or its input
_TRACEBACKS = "HYDRA_FULL_ERROR"  # Hydra's own switch
_FIRST_WORD_SECONDS = 5.0
_LONGEST_LABEL = 200  # bytes; a folder's name has at most 255


def main_with_config(run: Callable[[TrainConfig], int], hydra_main: Callable[..., Any] | None = None) -> None:
    """Compose and validate the configuration that the command line asks for, and call `run` with it.

    `run` returns the exit status; it should import what is heavy itself, so that `--help` and errors stay instant.
    Hydra's options work as ever (`--config-name`, `--config-dir`, `--cfg job`, `--multirun`, `--help`, ...). Under
    `--multirun` every job gets a folder of its own below run_dir, and the sweep ends at the first job whose status is
    not 0. `hydra_main` takes the place of `hydra.main` (NeMo's `hydra_runner` does, see nemo_train.py).

    A UserError, from here or from `run`, and whatever is wrong with the composition end the process with the error's status
    (2; 3 for a dead run) and its message after "error: ", without traceback (with one where the environment has
    HYDRA_FULL_ERROR=1). Any other exception is a defect and goes through.
    """
    register()
    wants_tracebacks = os.environ.get(_TRACEBACKS) == "1"
    started = False

    @functools.wraps(run)
    def job(node: DictConfig) -> None:
        nonlocal started
        try:
            config = _job_config(node)
            validate(config, _environment("WORLD_SIZE", 1))
            _configure_logging()
            started = True
            if not wants_tracebacks:
                os.environ.pop(_TRACEBACKS, None)  # of an error in `run` Hydra shows our own frames only
            status = run(config)
        except UserError as error:
            if wants_tracebacks:
                raise
            _refuse(str(error), error.exit_status)
        if status:
            sys.exit(status)

    # Hydra prints composition errors itself, over several lines, unless it is told to let them through.
    os.environ[_TRACEBACKS] = "1"
    try:
        options, overrides = _parse(sys.argv[1:])
        sys.argv[1:] = [*options, *as_written(overrides)]
        with ExitStack() as cleanup:
            if _environment("RANK", 0) != 0 and {"--multirun", "-m", "hydra.mode=MULTIRUN"} & set(sys.argv):
                # Hydra writes a sweep's multirun.yaml from every process; rank 0's is the one to keep.
                scratch = cleanup.enter_context(tempfile.TemporaryDirectory())
                sys.argv.append(f"hydra.sweep.dir={scratch}")
            decorate = hydra_main or functools.partial(hydra.main, version_base="1.3")
            decorate(config_path=_first_folder(), config_name="train")(job)()
    except COMPOSITION_ERRORS as error:
        if wants_tracebacks or started:
            raise
        _refuse(str(error) if isinstance(error, ConfigError) else explain(error))
    finally:
        if not wants_tracebacks:
            os.environ.pop(_TRACEBACKS, None)


def _first_folder() -> str:
    """The folder to search first: that of `--config-dir`, which Hydra itself would search last, else our recipes."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-dir", "-cd")
    folder = parser.parse_known_args()[0].config_dir
    if folder is None:
        return str(resource_dir("recipes"))
    if not Path(folder).is_dir():
        raise ConfigError(f"--config-dir {folder} is not a folder")
    return str(Path(folder).resolve())


def _job_config(node: DictConfig) -> TrainConfig:
    """The job's configuration; in a sweep, name and folder say which job it is."""
    try:
        config = to_config(node)
    except COMPOSITION_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise ConfigError(explain(error)) from error
    job = HydraConfig.get()
    if job.mode is RunMode.MULTIRUN:
        # What the sweep varies. Hydra respells what is fixed (False to false, 1e-3 to 0.001), but not its key.
        fixed = {
            override.partition("=")[0].lstrip("+~") for override in _parse(sys.argv[1:])[1] if not is_swept(override)
        }
        varied = [text for text in job.overrides.task if text.partition("=")[0].lstrip("+~") not in fixed]
        label = _folder_name(",".join(map(without_quotes, varied))) or str(job.job.num)
        config.name = f"{config.name},{label}"
        config.run_dir = str(Path(config.run_dir) / label)
    return config


def _folder_name(text: str) -> str:
    """A text as the name of a folder: on one line, without a slash, and cut to a length that file systems take."""
    name = "".join(character if character.isprintable() and character != os.sep else "_" for character in text)
    if len(os.fsencode(name)) <= _LONGEST_LABEL:
        return name
    start = os.fsencode(name)[:_LONGEST_LABEL].decode("utf-8", "ignore")
    return f"{start}...{blake2b(name.encode(), digest_size=4).hexdigest()}"


def _parse(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's options, each with its value, and the overrides: argparse itself wants all overrides side by side."""
    takes_value = {
        option: action.nargs != "?" or action.choices
        for action in get_args_parser()._actions
        for option in action.option_strings
        if action.nargs != 0
    }
    options: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        options.append(word)
        wanted = takes_value.get(word, False)
        if rest and (wanted is True or (wanted and rest[0] in wanted)):
            options.append(rest.pop(0))
    return options, overrides


def _configure_logging() -> None:
    """Our own messages from rank 0, warnings from all; everything with hydra.verbose=true."""
    if HydraConfig.get().verbose is not True:
        logging.getLogger("megatron_vp2o").setLevel(logging.INFO if _environment("RANK", 0) == 0 else logging.WARNING)


def _refuse(message: str, status: int = USAGE_STATUS) -> NoReturn:
    """Print the message once for all ranks and exit.

    torchrun ends all ranks when the first one fails. So the others give rank 0 time to speak, and speak themselves only
    if they are still alive then: an error that rank 0 does not have. (Once the ranks are on the line with each other,
    parallel/failure.py does this.)
    """
    rank = _environment("RANK", 0)
    if rank != 0:
        time.sleep(_FIRST_WORD_SECONDS)
        message = "\n".join(f"rank {rank}: {line}" for line in message.splitlines())
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(status)


def _environment(name: str, default: int) -> int:
    return int(os.environ.get(name, default))

"""A task of the user's, in one file: `task=own task.path=file.py:Class`."""

from __future__ import annotations

import inspect

from megatron_vp2o import own_code
from megatron_vp2o.config.schema import OwnTaskConfig
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.interfaces import Task

_PARTS = ("name", "tokenizer", "max_prompt_tokens", "size", "problem", "verify_all", "demonstration")


def own_task(config: OwnTaskConfig, *, progress: bool = False) -> Task:
    """The class's instance, made as `Class(config, progress=progress)`; most subclass `PooledTask`.

    Raises:
        ConfigError: the class is not there, takes other arguments, or what it makes is no task.
    """
    assert config.path is not None
    made_by = own_code.load("task.path", config.path, "class", ConfigError)
    if not isinstance(made_by, type):
        raise ConfigError(
            f"task.path={config.path} is a {type(made_by).__name__}, not a class: name a subclass of PooledTask"
        )
    if missing := sorted(getattr(made_by, "__abstractmethods__", ())):
        raise ConfigError(f"task.path={config.path} lacks {', '.join(missing)}: write them (CONTRIBUTING.md)")
    try:
        inspect.signature(made_by).bind(config, progress=progress)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"task.path={config.path} cannot be made as Class(config, progress=...): {error}") from error
    task = made_by(config, progress=progress)
    if missing := [part for part in _PARTS if not hasattr(task, part)]:
        raise ConfigError(
            f"task.path={config.path} is no task: it lacks {', '.join(missing)}; subclass megatron_vp2o.tasks.problems.PooledTask"
        )
    if not hasattr(task, "grades_elsewhere"):
        task.grades_elsewhere = False
    made: Task = task
    return made

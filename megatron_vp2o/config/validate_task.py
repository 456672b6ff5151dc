"""What the settings of a task must satisfy together; their single ranges stand beside them in `schema`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from megatron_vp2o.config.ranges import range_problems
from megatron_vp2o.config.register import GROUPS
from megatron_vp2o.config.rows import RowsTaskConfig, rows_problems
from megatron_vp2o.config.schema import (
    AddendsTaskConfig,
    BracketsTaskConfig,
    ChangeTaskConfig,
    ColoringTaskConfig,
    CountdownTaskConfig,
    LinearOrderTaskConfig,
    OwnTaskConfig,
    ShortestPathTaskConfig,
    TaskConfig,
)
from megatron_vp2o.errors import ConfigError


def task_problems(task: TaskConfig) -> Iterator[str]:
    """One line for each."""
    names = list(GROUPS["task"])
    if task.name not in names:
        near = difflib.get_close_matches(task.name, names, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."
        yield f"task.name={task.name} is unknown: {hint} Choose a task by its group, task=NAME (override /task in a recipe)"
    elif type(task) is not GROUPS["task"][task.name]:
        own = type(task)().name if type(task) in GROUPS["task"].values() else "no task"
        yield (
            f"task.name={task.name} does not go with the settings of {own}: "
            f"choose the group, task={task.name} (override /task in a recipe), not the name"
        )
    if isinstance(task, RowsTaskConfig):
        yield from rows_problems(task)
    if isinstance(task, OwnTaskConfig) and (task.path is None or ":" not in task.path):
        yield f"task.path={task.path}: name your class, task.path=file.py:Class or package.module:Class"
    if isinstance(task, CountdownTaskConfig):
        for kind in ("number", "target"):
            low, high = getattr(task, f"min_{kind}"), getattr(task, f"max_{kind}")
            if low > high:
                yield f"task.min_{kind}={low} and task.max_{kind}={high}: choose the smaller first"
    if isinstance(task, AddendsTaskConfig):
        if task.min_target > task.max_target:
            yield f"task.min_target={task.min_target} and task.max_target={task.max_target}: choose the smaller first"
        elif task.max_target < task.addends:
            yield (
                f"task.max_target={task.max_target} is no sum of task.addends={task.addends} numbers from 1 on: "
                f"choose at least {task.addends}"
            )
    if isinstance(task, ColoringTaskConfig) and task.edges > (most := task.nodes * (task.nodes - 1) // 2):
        yield f"task.edges={task.edges}: task.nodes={task.nodes} nodes have at most {most} edges; choose no more"
    if isinstance(task, LinearOrderTaskConfig) and task.precedences > (most := task.letters * (task.letters - 1) // 2):
        yield f"task.precedences={task.precedences}: task.letters={task.letters} letters have at most {most} pairs; choose no more"
    if isinstance(task, BracketsTaskConfig):
        if task.min_given > task.max_given:
            yield f"task.min_given={task.min_given} and task.max_given={task.max_given}: choose the smaller first"
        elif task.max_given > (most := 2 * task.pairs - 2):
            yield f"task.max_given={task.max_given}: task.pairs={task.pairs} leave {most} places between the ends; choose no more"
    if isinstance(task, ChangeTaskConfig):
        if task.min_amount > task.max_amount:
            yield f"task.min_amount={task.min_amount} and task.max_amount={task.max_amount}: choose the smaller first"
        elif task.min_amount > 9 * task.coins:
            yield (
                f"task.min_amount={task.min_amount} cannot be paid with task.coins={task.coins} coins of at most 9: "
                f"choose at most {9 * task.coins}"
            )
    if isinstance(task, ShortestPathTaskConfig) and task.rows * task.columns < 2:
        yield f"task.rows={task.rows} and task.columns={task.columns}: choose at least two cells"


def check_task(task: TaskConfig) -> None:
    """Refuse settings that give no task. `validate` does the same, before anything is made.

    Raises:
        ConfigError: everything that is wrong, one line each.
    """
    if problems := [*range_problems(task, "task.")] or [*task_problems(task)]:
        raise ConfigError("\n".join(problems))

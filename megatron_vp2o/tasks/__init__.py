"""Tasks: families of problems with a verifier. `make_task` makes the one that a configuration names."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vp2o.config.rows import RowsTaskConfig
from megatron_vp2o.config.schema import OwnTaskConfig, TaskConfig
from megatron_vp2o.config.validate_task import check_task
from megatron_vp2o.rl.interfaces import Reward, Task
from megatron_vp2o.tasks.addends import AddendsTask
from megatron_vp2o.tasks.brackets import BracketsTask
from megatron_vp2o.tasks.change import ChangeTask
from megatron_vp2o.tasks.coloring import ColoringTask
from megatron_vp2o.tasks.countdown import CountdownTask
from megatron_vp2o.tasks.linear_order import LinearOrderTask
from megatron_vp2o.tasks.open_path import OpenPathTask
from megatron_vp2o.tasks.own import own_task
from megatron_vp2o.tasks.rows import RowsTask
from megatron_vp2o.tasks.shortest_path import ShortestPathTask

TASKS: dict[str, Callable[..., Task]] = {
    "countdown": CountdownTask,
    "shortest_path": ShortestPathTask,
    "addends": AddendsTask,
    "coloring": ColoringTask,
    "open_path": OpenPathTask,
    "linear_order": LinearOrderTask,
    "brackets": BracketsTask,
    "change": ChangeTask,
}


def make_task(
    config: TaskConfig, progress: bool = False, *, reward: Reward | None = None, room: int | None = None
) -> Task:
    """The task `config.name` with its problems prepared: equal configurations give equal problems, on every rank.

    Args:
        progress: show a progress bar if preparing takes longer than a second (for one rank only).
        reward: grades responses of tasks that do not verify themselves.
        room: most tokens of a prompt that the model can take; only rows of files are chosen by it.

    Raises:
        ConfigError: an unknown name, a setting out of bounds, or fewer held-out problems than asked for.
    """
    check_task(config)
    if isinstance(config, RowsTaskConfig):
        return RowsTask(config, reward=reward, room=room, progress=progress)
    if isinstance(config, OwnTaskConfig):
        return own_task(config, progress=progress)
    return TASKS[config.name](config, progress=progress)

"""Run by test_grading in four processes: two by two tensor- and pipeline-parallel ranks."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist

from megatron_vp2o.parallel.groups import Groups, on_replica


def say(tensor: int, pipeline: int) -> list[Any]:
    """What each rank gets of what the speaking rank made, and how often this rank made something."""
    dist.init_process_group("gloo")
    world = dist.group.WORLD
    assert world is not None
    rank, made = dist.get_rank(), []
    tp = [dist.new_group(list(range(p * tensor, (p + 1) * tensor))) for p in range(pipeline)][rank // tensor]
    pp = [dist.new_group(list(range(t, tensor * pipeline, tensor))) for t in range(tensor)][rank % tensor]
    cp = [dist.new_group([r]) for r in range(tensor * pipeline)][rank]
    assert isinstance(tp, dist.ProcessGroup) and isinstance(pp, dist.ProcessGroup)
    names = [field.name for field in fields(Groups)]
    values: dict[str, Any] = {
        **dict.fromkeys(names, world),
        "tp": tp,
        "pp": pp,
        "cp": cp,
        "device": torch.device("cpu"),
        "timeout": None,
    }
    groups = Groups(**values)

    def make() -> str:
        made.append(rank)
        return f"made by {rank}"

    return [on_replica(make, groups), len(made)]

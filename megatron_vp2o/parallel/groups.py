"""The process groups of a run, as one frozen value, and the small reductions that the loop needs.

Nothing here knows Megatron: `megatron/platform/world.py` fills the bundle in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Groups:
    """Process groups by the dimension that varies inside them. Sizes and ranks are plain ints."""

    world: dist.ProcessGroup
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    cp: dist.ProcessGroup
    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    expert_dp: dist.ProcessGroup
    stage: dist.ProcessGroup
    """All ranks of this pipeline stage: those that see tokens of the same layers."""
    device: torch.device
    timeout: timedelta | None = None
    """How long a collective may wait; None: torch's default."""

    @property
    def rank(self) -> int:
        return self.world.rank()

    @property
    def world_size(self) -> int:
        return self.world.size()

    @property
    def dp_rank(self) -> int:
        return self.dp.rank()

    @property
    def dp_size(self) -> int:
        return self.dp.size()

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1

    @property
    def is_data_source(self) -> bool:
        """True on the one rank of each data-parallel replica that speaks for it."""
        return all(group.rank() == 0 for group in self._of_replica)

    @property
    def _of_replica(self) -> tuple[dist.ProcessGroup, ...]:
        """The dimensions of a data-parallel replica."""
        return self.cp, self.pp, self.tp


def reduce_scalars(values: dict[str, float], group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType) -> dict[str, float]:
    """All-reduce a dictionary of numbers (same keys on every rank) in one float64 collective."""
    if group.size() == 1 or not values:
        return dict(values)
    keys = sorted(values)
    buffer = torch.tensor([values[key] for key in keys], dtype=torch.float64, device=_collective_device(group))
    dist.all_reduce(buffer, op=op, group=group)
    return dict(zip(keys, buffer.tolist(), strict=True))


def sum_scalars(values: dict[str, float], group: dist.ProcessGroup) -> dict[str, float]:
    """Sums over the group."""
    return reduce_scalars(values, group, dist.ReduceOp.SUM)


def max_scalars(values: dict[str, float], group: dist.ProcessGroup) -> dict[str, float]:
    """Maxima over the group."""
    return reduce_scalars(values, group, dist.ReduceOp.MAX)


def any_rank(flag: bool, group: dist.ProcessGroup) -> bool:
    """True where any rank of the group says so."""
    return max_scalars({"flag": float(flag)}, group)["flag"] > 0


def first_rank_says(value: T, group: dist.ProcessGroup) -> T:
    """What the group's first rank has: for decisions that hang on what a rank sees outside of the run, such as files."""
    box = [value]
    if group.size() > 1:
        dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def speaks_for_replica(groups: Groups) -> bool:
    """Whether this is the rank on which `on_replica` makes its value."""
    return groups.is_data_source


def on_replica(make: Callable[[], T], groups: Groups) -> T:
    """What `make` returns on the one rank that speaks for a data-parallel replica, on all ranks of that replica.

    For what may come out differently when it is done twice, such as work within a time limit. A collective over the
    tensor-, pipeline- and context-parallel ranks; the value must be picklable.
    """
    if all(group.size() == 1 for group in groups._of_replica):
        return make()
    value: Any = make() if speaks_for_replica(groups) else None
    if groups.tp.rank() == 0:
        if groups.pp.rank() == 0:
            value = first_rank_says(value, groups.cp)
        value = first_rank_says(value, groups.pp)
    said: T = first_rank_says(value, groups.tp)
    return said


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate equally shaped tensors of all ranks along the first dimension, in rank order."""
    if group.size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(group.size())]
    dist.all_gather(parts, rows.contiguous(), group=group)
    return torch.cat(parts)


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """What every rank of the group has, in rank order."""
    if group.size() == 1:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


@dataclass(frozen=True)
class Place:
    """Where a rank is: its rank in the world, and in its groups of experts."""

    rank: int
    ep: int
    etp: int
    expert_dp: int


def gather_places(groups: Groups, group: dist.ProcessGroup) -> list[Place]:
    """The places of all ranks of a group, in its order. A collective over the group."""
    own = Place(groups.rank, groups.ep.rank(), groups.etp.rank(), groups.expert_dp.rank())
    return gather_objects(own, group)


def _collective_device(group: dist.ProcessGroup) -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else torch.device("cpu")
    )

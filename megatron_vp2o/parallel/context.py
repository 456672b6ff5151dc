"""Context parallelism: the positions of every sequence dealt to the ranks of a group, and gathered again.

A sequence is cut in 2 * CP chunks of equal length, and rank r has chunks r and 2 * CP - 1 - r, in this order. In causal attention
late positions look at more keys than early ones do; so dealt, all ranks have the same work. Megatron and transformer-engine deal
alike (megatron/core/utils.py, get_batch_on_this_cp_rank).

Shape legend: S positions of whole sequences (of several one after the other, where they are packed), s = S / CP positions of one
rank; any further dimensions "...".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class Dealt:
    """Which positions the ranks have. Made by `deal` and `deal_one`."""

    ranks: int
    order_S: Tensor
    """The positions of rank 0, then those of rank 1, and so on."""
    place_S: Tensor
    """Where each position stands in `order_S`."""

    def own(self, values: Tensor, rank: int, dim: int = 0) -> Tensor:
        """Those of a rank: S along `dim` becomes s. Differentiable."""
        return values.index_select(dim, self.order_S.view(self.ranks, -1)[rank])

    def whole(self, own: Tensor, group: dist.ProcessGroup, *, alike: bool = False) -> Tensor:
        """All positions, [S, ...], of the ranks' own ones, [s, ...]. Differentiable; a collective.

        Args:
            alike: all ranks go on alike, and their gradients of the whole are equal: each keeps that of its own positions.
                Otherwise each rank does a part of the work, and the gradients are summed over the group.
        """
        return _Gather.apply(own, self, group, alike)


def deal(lengths: Sequence[int], ranks: int, device: torch.device) -> Dealt:
    """Sequences one after the other, each dealt by itself; 2 * `ranks` divides their lengths."""
    chunks = 2 * ranks
    pieces: list[list[Tensor]] = [[] for _ in range(ranks)]
    first = 0
    for length in lengths:
        piece = torch.arange(first, first + length).view(chunks, -1)
        for rank, mine in enumerate(pieces):
            mine += [piece[rank], piece[chunks - 1 - rank]]
        first += length
    order_S = torch.cat([part for mine in pieces for part in mine])
    place_S = torch.empty_like(order_S).index_copy_(0, order_S, torch.arange(len(order_S)))
    return Dealt(ranks, order_S.to(device, non_blocking=True), place_S.to(device, non_blocking=True))


@lru_cache(maxsize=256)
def deal_one(length: int, ranks: int, device: torch.device) -> Dealt:
    """One sequence, or several beside each other that are dealt alike."""
    return deal([length], ranks, device)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, dealt: Dealt, group: dist.ProcessGroup, alike: bool) -> Tensor:
        ctx.dealt, ctx.group, ctx.alike = dealt, group, alike
        every = own.new_empty(dealt.ranks * own.shape[0], *own.shape[1:])
        dist.all_gather_into_tensor(every, own.contiguous(), group=group)
        return every.index_select(0, dealt.place_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        dealt, group = ctx.dealt, ctx.group
        if ctx.alike:
            return dealt.own(grad, group.rank()), None, None, None
        own = grad.new_empty(grad.shape[0] // dealt.ranks, *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.index_select(0, dealt.order_S), group=group)
        return own, None, None, None

"""Rows that change their data-parallel rank for a while.

Shape legend: N rows of this rank before, M after.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class RowExchange:
    """Sends rows to other ranks of a group, and what became of them back. All methods are collectives over the group.

    Args:
        rank_N: where each row of this rank goes.
        arriving: rows that come from each rank.
        device: that the group's collectives need.
    """

    def __init__(self, rank_N: Tensor, arriving: list[int], group: dist.ProcessGroup, device: torch.device) -> None:
        self._order_N = torch.argsort(rank_N, stable=True)
        self._leaving = torch.bincount(rank_N, minlength=group.size()).tolist()
        self._arriving, self._group, self._device = arriving, group, device

    def send(self, values_N: Tensor) -> Tensor:
        """Any tensor [N, ...] of rows, the same shape but for N on all ranks; [M, ...] by the ranks that they come from, each
        one's in its order. On the CPU."""
        return self._swap(values_N[self._order_N], self._leaving, self._arriving)

    def back(self, values_M: Tensor) -> Tensor:
        """The way back: [M, ...] to [N, ...], every row where it was."""
        values = self._swap(values_M, self._arriving, self._leaving)
        return torch.empty_like(values).index_copy_(0, self._order_N, values)

    def _swap(self, values: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        kind = values.dtype  # sent as bytes: backends know neither bool nor int16
        sent = values[..., None].contiguous().view(torch.uint8).to(self._device, non_blocking=True)
        received = sent.new_empty(sum(arriving), *sent.shape[1:])
        dist.all_to_all_single(received, sent, arriving, leaving, group=self._group)
        return received.cpu().view(kind).squeeze(-1)

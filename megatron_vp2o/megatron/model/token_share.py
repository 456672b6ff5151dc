"""Which tokens of a micro-batch a rank's layers see, where context and sequence parallelism split its positions.

Shape legend: L positions of the whole micro-batch (packed: T), l those of this rank, any further dimensions "...".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.megatron.model.packed import PackedRows
from megatron_vp2o.parallel.context import deal_one
from megatron_vp2o.parallel.groups import Groups


@dataclass(frozen=True)
class TokenShare:
    """How positions are split. None: every rank of the dimension has all of them."""

    context: dist.ProcessGroup | None = None
    sequence: dist.ProcessGroup | None = None
    """The tensor-parallel group, under sequence parallelism: contiguous shares of what context parallelism leaves."""

    @staticmethod
    def of(config: Any, groups: Groups) -> TokenShare:
        """That of a model with this TransformerConfig."""
        return TokenShare(
            groups.cp if config.context_parallel_size > 1 else None, groups.tp if config.sequence_parallel else None
        )

    def on_context_rank(self, values: Tensor, packed: PackedRows | None = None, dim: int = 0) -> Tensor:
        """[L, ...] of the whole micro-batch to those of this context-parallel rank."""
        if self.context is None:
            return values
        if packed is not None:
            return packed.own(values, dim)
        ranks = self.context.size()
        return deal_one(values.shape[dim], ranks, values.device).own(values, self.context.rank(), dim)

    def own(self, values_L: Tensor, packed: PackedRows | None = None) -> Tensor:
        """[L, ...] to [l, ...], in the order of the hidden states."""
        values_l = self.on_context_rank(values_L, packed)
        if self.sequence is not None:
            values_l = values_l.chunk(self.sequence.size())[self.sequence.rank()]
        return values_l

    def whole(self, values_l: Tensor, packed: PackedRows | None = None) -> Tensor:
        """[l, ...] of the context-parallel ranks to [L, ...], for what all of them then do alike. Differentiable; a collective."""
        if self.context is None:
            return values_l
        ranks = self.context.size()
        dealt = deal_one(len(values_l) * ranks, ranks, values_l.device) if packed is None else packed.dealt
        assert dealt is not None
        return dealt.whole(values_l, self.context, alike=True)

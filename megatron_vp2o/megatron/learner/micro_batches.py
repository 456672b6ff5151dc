"""From the rows of an optimizer step, or of a scoring pass, to micro-batches.

Shape legend: N sequences of this rank, S padded length of one micro-batch, R rows of all data-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_vp2o.config.parameters import attention_cost
from megatron_vp2o.config.schema import GRPOConfig, TrainConfig
from megatron_vp2o.data.row_slots import row_slots
from megatron_vp2o.megatron.model.packed import PackedRows, pack_rows
from megatron_vp2o.parallel.groups import Groups, any_rank, gather_rows, max_scalars
from megatron_vp2o.parallel.row_exchange import RowExchange
from megatron_vp2o.rl.types import TrainBatch


@dataclass(frozen=True)
class TokenBudget:
    """How rows are packed into micro-batches."""

    tokens: int
    """Of a micro-batch."""
    quadratic: float = 0.0
    """A row of n tokens costs as much as n + quadratic n^2."""


def token_budget(config: TrainConfig) -> TokenBudget | None:
    """As the settings have it; None where rows are padded."""
    algorithm = config.algorithm
    if not isinstance(algorithm, GRPOConfig) or algorithm.micro_batch_tokens is None:
        return None
    return TokenBudget(algorithm.micro_batch_tokens, attention_cost(config.model))


@dataclass(frozen=True)
class MicroBatch:
    """Some rows, and how the model sees them."""

    batch: TrainBatch
    """On the CPU; [N, S] whether they are packed or not."""
    index_N: Tensor
    """Which rows of the whole they are; empty where they are padding alone."""
    lengths: tuple[int, ...] = ()
    """Of the rows, in descending order."""
    multiple: int = 1
    dealt: tuple[int, int] = (0, 1)
    """This rank among the context-parallel ones that packed rows are dealt to, and how many these are."""
    packed: bool = False
    """One sequence [1, T] for the model, in place of N padded ones."""

    def layout(self, device: torch.device) -> PackedRows | None:
        """Where the packed tokens come from; None where rows are padded."""
        if not self.packed:
            return None
        rank, ranks = self.dealt
        return pack_rows(self.lengths, self.batch.tokens_NS.shape[1], self.multiple, device, rank=rank, ranks=ranks)


def micro_batches(batch: TrainBatch, size: int, groups: Groups, multiple: int) -> list[MicroBatch]:
    """Cut a batch into micro-batches of similar lengths, each trimmed to its longest row.

    Every rank gets the same number (collectives must pair up); a rank that has too few rows adds dummy ones, all padding, so
    that they count nowhere.
    """
    rows = len(batch.length_N)
    count = max(1, int(max_scalars({"count": -(-rows // size)}, groups.dp)["count"]))
    order = torch.argsort(batch.length_N, descending=True, stable=True)
    parts = []
    for index in order.split(size) if rows else ():
        longest = int(batch.length_N[index].max())
        width = -(-longest // multiple) * multiple
        parts.append(MicroBatch(_take(batch, index, width), index))
    while len(parts) < count:
        parts.append(MicroBatch(_dummy(batch, multiple), order[:0]))
    return parts


class PackedBatches:
    """The rows of all data-parallel ranks, dealt to them anew and packed. A collective over these ranks.

    Args:
        batch: this rank's rows; it may have none.
        multiple: a packed sequence has a multiple of so many tokens.
        dealt: whether each row is dealt to the context-parallel ranks.
    """

    def __init__(
        self, batch: TrainBatch, budget: TokenBudget, groups: Groups, multiple: int, *, dealt: bool = False
    ) -> None:
        self._dealt = (groups.cp.rank(), groups.cp.size()) if dealt else (0, 1)
        self._given = batch.tokens_NS.shape
        length_R, first = _lengths(batch, groups)
        ranks, rank, rows = groups.dp_size, groups.dp_rank, len(batch.length_N)
        slots = row_slots(length_R, budget=budget.tokens, ranks=ranks, quadratic=budget.quadratic)
        mine_R = slots.rank_R == rank
        self._exchange: RowExchange | None = None
        if ranks > 1:
            arriving = [int(mine_R[first[r] : first[r + 1]].sum()) for r in range(ranks)]
            rank_N = torch.from_numpy(slots.rank_R[first[rank] : first[rank] + rows])
            self._exchange = RowExchange(rank_N, arriving, groups.dp, groups.device)
            batch = self._sent(batch, max(1, int(length_R.max(initial=1))), groups)
        self.batch = batch
        """The rows that this rank computes with."""
        slot_N = torch.from_numpy(slots.slot_R[mine_R])
        self.parts = [self._part((slot_N == slot).nonzero().squeeze(1), multiple) for slot in range(slots.count)]
        """The micro-batches; their `index_N` counts the rows of `batch`."""

    def _sent(self, batch: TrainBatch, width: int, groups: Groups) -> TrainBatch:
        exchange = self._exchange
        assert exchange is not None
        if batch.gate_row_N is not None:
            batch = replace(batch, gate_rank_N=torch.full_like(batch.gate_row_N, groups.dp_rank))
        return batch.map(exchange.send, lambda value_NS, padding: exchange.send(_fit(value_NS, width, padding)))

    def _part(self, index: Tensor, multiple: int) -> MicroBatch:
        if not len(index):
            return MicroBatch(_dummy(self.batch, 1), index, (0,), multiple, self._dealt, packed=True)
        index = index[torch.argsort(self.batch.length_N[index], descending=True, stable=True)]
        lengths = tuple(self.batch.length_N[index].tolist())
        batch = _take(self.batch, index, max(1, lengths[0]))
        return MicroBatch(batch, index, lengths, multiple, self._dealt, packed=True)

    def back(self, values_NS: Tensor) -> Tensor:
        """Of the rows of `batch`, to where they came from: the rows and the width of the batch that was given."""
        if self._exchange is not None:
            values_NS = self._exchange.back(values_NS)
        return _fit(values_NS, self._given[1], 0.0)


def _lengths(batch: TrainBatch, groups: Groups) -> tuple[np.ndarray, list[int]]:
    """Lengths of all ranks' rows in rank order, and where each rank's begin (and end)."""
    length_N = batch.length_N
    has = {name: float(isinstance(value, Tensor)) for name, value in vars(batch).items()}
    agreed = max_scalars({"rows": float(len(length_N)), **has}, groups.dp)
    without = [name for name in has if agreed[name] > has[name]]
    if any_rank(bool(without), groups.dp):
        raise ValueError(
            f"rows cannot change their rank: data-parallel ranks have batches with different fields (here {without} are missing)"
        )
    most = int(agreed["rows"])
    padded = torch.full((most,), -1, dtype=torch.int64)
    padded[: len(length_N)] = length_N
    if groups.dp_size > 1:  # alone, there is nothing to wait for
        padded = gather_rows(padded.to(groups.device, non_blocking=True), groups.dp).cpu()
    length_DN = padded.view(groups.dp_size, most)
    first = [0, *(length_DN >= 0).sum(1).cumsum(0).tolist()]
    return length_DN[length_DN >= 0].numpy(), first


def _fit(values_NS: Tensor, width: int, fill: float) -> Tensor:
    """Cut or padded to `width` positions; further dimensions stay."""
    missing = width - values_NS.shape[1]
    if missing <= 0:
        return values_NS[:, :width]
    padding = (0, 0) * (values_NS.dim() - 2) + (0, missing)
    return torch.nn.functional.pad(values_NS, padding, value=fill)


def _take(batch: TrainBatch, index: Tensor, width: int) -> TrainBatch:
    return batch.map(lambda value_N: value_N[index], lambda value_NS, padding: _fit(value_NS[index], width, padding))


def _dummy(batch: TrainBatch, width: int) -> TrainBatch:
    """One row of nothing but padding, of document 0 where there are documents: a row of no document would attend to nothing."""
    dummy = batch.map(
        lambda value_N: value_N.new_zeros(1),
        lambda value_NS, padding: value_NS.new_full((1, width, *value_NS.shape[2:]), padding),
    )
    return dummy if dummy.segment_NS is None else replace(dummy, segment_NS=torch.zeros_like(dummy.segment_NS))

"""From the rows of an optimizer step, or of a scoring pass, to micro-batches.

Shape legend: N sequences of this rank, S padded length of one micro-batch, R rows of all data-parallel ranks, F families of rows
with the same prefix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_vp2o.config.parameters import attention_cost
from megatron_vp2o.config.schema import GRPOConfig, PrefixSharing, TrainConfig
from megatron_vp2o.data.prefix_slots import SHARED_FROM, families, prefix_slots, shared_tokens
from megatron_vp2o.data.row_slots import Slots, row_slots
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.megatron.model.packed import PackedRows, pack_rows
from megatron_vp2o.megatron.model.shared_prefix import pack_shared_rows
from megatron_vp2o.megatron.model.specs import use_transformer_engine
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
    prefixes: PrefixSharing = PrefixSharing.off
    """Whether rows with the same prompt share it."""


def token_budget(config: TrainConfig) -> TokenBudget | None:
    """As the settings have it; None where rows are padded.

    Raises:
        ConfigError: prompts are to be shared, and attention is transformer-engine's.
    """
    algorithm = config.algorithm
    if not isinstance(algorithm, GRPOConfig) or algorithm.micro_batch_tokens is None:
        return None
    sharing = algorithm.prefix_sharing
    if sharing is not PrefixSharing.off and use_transformer_engine(config.model.implementation):
        if sharing is PrefixSharing.on:
            raise ConfigError(
                "algorithm.prefix_sharing=on needs this project's attention, and transformer-engine is used here: set "
                "model.implementation=local, or algorithm.prefix_sharing=auto (which shares nothing with transformer-engine)"
            )
        sharing = PrefixSharing.off
    if config.parallel.context_parallel > 1:  # `on` was refused before
        sharing = PrefixSharing.off
    return TokenBudget(algorithm.micro_batch_tokens, attention_cost(config.model), sharing)


@dataclass(frozen=True)
class MicroBatch:
    """Some rows, and how the model sees them."""

    batch: TrainBatch
    """On the CPU; [N, S] whether they are packed or not."""
    index_N: Tensor
    """Which rows of the whole they are; empty where they are padding alone."""
    lengths: tuple[int, ...] = ()
    """Of the rows, in descending order, or family by family."""
    multiple: int = 1
    dealt: tuple[int, int] = (0, 1)
    """This rank among the context-parallel ones that packed rows are dealt to, and how many these are."""
    packed: bool = False
    """One sequence [1, T] for the model, in place of N padded ones."""
    families: tuple[tuple[int, int], ...] = ()
    """Numbers of rows that share a prefix, and its length; empty where each has its own."""

    def layout(self, device: torch.device) -> PackedRows | None:
        """Where the packed tokens come from; None where rows are padded."""
        if not self.packed:
            return None
        rank, ranks = self.dealt
        width = self.batch.tokens_NS.shape[1]
        if self.families:
            return pack_shared_rows(self.lengths, self.families, width, self.multiple, device)
        return pack_rows(self.lengths, width, self.multiple, device, rank=rank, ranks=ranks)


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
    """The rows of all data-parallel ranks, dealt to them anew and packed. A collective over these ranks, and where rows have routes
    and may share prefixes over pipeline stages, too.

    Args:
        batch: this rank's rows; it may have none.
        multiple: a packed sequence has a multiple of so many tokens.
        dealt: whether each row is dealt to the context-parallel ranks, which share no prefixes.
    """

    def __init__(
        self, batch: TrainBatch, budget: TokenBudget, groups: Groups, multiple: int, *, dealt: bool = False
    ) -> None:
        self._dealt = (groups.cp.rank(), groups.cp.size()) if dealt else (0, 1)
        self._given = batch.tokens_NS.shape
        prefixes = None if dealt or budget.prefixes is PrefixSharing.off else _prefixes(batch, groups)
        columns, first = _of_all_ranks(batch, prefixes, groups)
        length_R = columns[0]
        ranks, rank, rows = groups.dp_size, groups.dp_rank, len(batch.length_N)
        self.tokens = int(length_R.sum())
        """Of all rows of all ranks."""
        self.computed = self.tokens
        """Tokens that the model computes for them, in the best case: each shared prefix once."""
        family_R: np.ndarray | None = None
        if prefixes is not None:
            family_R = families(*columns[1:])
            self.computed = shared_tokens(length_R, columns[1], family_R)
            if budget.prefixes is PrefixSharing.auto and self.tokens < SHARED_FROM * self.computed:
                family_R, self.computed = None, self.tokens
        deal: Callable[..., Slots] = partial(row_slots, length_R)
        if family_R is not None:
            deal = partial(prefix_slots, length_R, columns[1], family_R)
        slots = deal(budget=budget.tokens, ranks=ranks, quadratic=budget.quadratic)
        mine_R = slots.rank_R == rank
        self._exchange: RowExchange | None = None
        if ranks > 1:
            arriving = [int(mine_R[first[r] : first[r + 1]].sum()) for r in range(ranks)]
            rank_N = torch.from_numpy(slots.rank_R[first[rank] : first[rank] + rows])
            self._exchange = RowExchange(rank_N, arriving, groups.dp, groups.device)
            batch = self._sent(batch, max(1, int(length_R.max(initial=1))), groups)
        self.batch = batch
        """The rows that this rank computes with."""
        shared = None
        if family_R is not None:
            shared = torch.from_numpy(np.stack([family_R[mine_R], columns[1][mine_R]], axis=1))
        slot_N = torch.from_numpy(slots.slot_R[mine_R])
        self.parts = [
            self._part((slot_N == slot).nonzero().squeeze(1), multiple, shared) for slot in range(slots.count)
        ]
        """The micro-batches; their `index_N` counts the rows of `batch`."""

    def _sent(self, batch: TrainBatch, width: int, groups: Groups) -> TrainBatch:
        exchange = self._exchange
        assert exchange is not None
        if batch.gate_row_N is not None:
            batch = replace(batch, gate_rank_N=torch.full_like(batch.gate_row_N, groups.dp_rank))
        return batch.map(exchange.send, lambda value_NS, padding: exchange.send(_fit(value_NS, width, padding)))

    def _part(self, index: Tensor, multiple: int, shared_N2: Tensor | None) -> MicroBatch:
        """Args: shared_N2: family and length of the prefix of each row of `batch`; None where none is shared."""
        if not len(index):
            return MicroBatch(_dummy(self.batch, 1), index, (0,), multiple, self._dealt, packed=True)
        if shared_N2 is not None and int(self.batch.length_N[index].min()) > 0:
            order, found = _by_family(shared_N2[index], self.batch.length_N[index])
            if len(found) < len(index):
                index = index[order]
                lengths = tuple(self.batch.length_N[index].tolist())
                batch = _take(self.batch, index, max(lengths))
                return MicroBatch(batch, index, lengths, multiple, packed=True, families=found)
        index = index[torch.argsort(self.batch.length_N[index], descending=True, stable=True)]
        lengths = tuple(self.batch.length_N[index].tolist())
        batch = _take(self.batch, index, max(1, lengths[0]))
        return MicroBatch(batch, index, lengths, multiple, self._dealt, packed=True)

    def back(self, values_NS: Tensor) -> Tensor:
        """Of the rows of `batch`, to where they came from: the rows and the width of the batch that was given."""
        if self._exchange is not None:
            values_NS = self._exchange.back(values_NS)
        return _fit(values_NS, self._given[1], 0.0)


def _prefixes(batch: TrainBatch, groups: Groups) -> Tensor:
    """Length of each row's prompt and what stands for its contents, int64 [N, 2]. A collective over pipeline stages where rows have
    routes.

    The prompt is what comes before the first loss token. Rows share it only where it is the same in all that the model sees:
    its tokens and, where routes are replayed, those of all layers. An engine may have routed one and the same prompt in two ways.
    """
    mask_NS, length_N = batch.loss_mask_NS, batch.length_N
    first_N = torch.where(mask_NS.any(1), mask_NS.int().argmax(1), length_N)
    prefix_N = torch.minimum(first_N.clamp(min=1), length_N)
    columns = [batch.tokens_NS] + ([] if batch.routes_NSLK is None else [batch.routes_NSLK])
    keys = [
        int.from_bytes(_digest([values[row, :prefix] for values in columns]), "little", signed=True)
        for row, prefix in enumerate(prefix_N.tolist())
    ]
    key_N = torch.tensor(keys, dtype=torch.int64)
    if batch.routes_NSLK is not None and groups.pp.size() > 1 and len(keys):  # each stage has its own layers' routes
        of_stages = gather_rows(key_N[None].to(groups.device, non_blocking=True), groups.pp).cpu()
        keys = [int.from_bytes(_digest([key]), "little", signed=True) for key in of_stages.t().contiguous()]
        key_N = torch.tensor(keys, dtype=torch.int64)
    return torch.stack([prefix_N, key_N], dim=1)


def _digest(values: Sequence[Tensor]) -> bytes:
    """Eight bytes that stand for the contents of tensors on the CPU."""
    found = hashlib.blake2b(digest_size=8)
    for value in values:
        found.update(value.contiguous().numpy().tobytes())
    return found.digest()


def _by_family(shared_N2: Tensor, length_N: Tensor) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Rows of a micro-batch in an order in which those of a family follow each other, the longest prefixes first; and the families:
    number of rows and length of the prefix. The only row of a family is all prefix."""
    _, family_N, rows_F = shared_N2[:, 0].unique(return_inverse=True, return_counts=True)
    prefix_N = torch.where(rows_F[family_N] > 1, shared_N2[:, 1], length_N)
    order = np.lexsort((-length_N.numpy(), family_N.numpy(), -prefix_N.numpy()))
    found: list[tuple[int, int]] = []
    last = -1
    for row in order.tolist():
        family = int(family_N[row])
        found = [*found[:-1], (found[-1][0] + 1, found[-1][1])] if family == last else [*found, (1, int(prefix_N[row]))]
        last = family
    return torch.from_numpy(order), tuple(found)


def _of_all_ranks(batch: TrainBatch, more: Tensor | None, groups: Groups) -> tuple[list[np.ndarray], list[int]]:
    """Lengths of all ranks' rows in rank order, and further int64 columns [N, ...] of theirs; and where each rank's begin (and
    end)."""
    length_N = batch.length_N
    has = {name: float(isinstance(value, Tensor)) for name, value in vars(batch).items()}
    agreed = max_scalars({"rows": float(len(length_N)), **has}, groups.dp)
    without = [name for name in has if agreed[name] > has[name]]
    if any_rank(bool(without), groups.dp):
        raise ValueError(
            f"rows cannot change their rank: data-parallel ranks have batches with different fields (here {without} are missing)"
        )
    most = int(agreed["rows"])
    columns_NC = length_N[:, None] if more is None else torch.cat([length_N[:, None], more], dim=1)
    padded = torch.full((most, columns_NC.shape[1]), -1, dtype=torch.int64)
    padded[: len(length_N)] = columns_NC
    if groups.dp_size > 1:  # alone, there is nothing to wait for
        padded = gather_rows(padded.to(groups.device, non_blocking=True), groups.dp).cpu()
    columns_DNC = padded.view(groups.dp_size, most, columns_NC.shape[1])
    there_DN = columns_DNC[:, :, 0] >= 0
    first = [0, *there_DN.sum(1).cumsum(0).tolist()]
    return list(columns_DNC[there_DN].t().numpy()), first


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

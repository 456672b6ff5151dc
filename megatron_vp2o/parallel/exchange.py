"""The expert exchange: mix rows of expert gradients that lie on different ranks, one all-to-all each way.

`G~ = w+ G` needs, for every column (one of an expert's P parameters), the rows of all E experts. A rank holds whole rows of
its own experts, or, under the distributed optimizer, arbitrary pieces of them. Each rank is made responsible for a share of
the columns: it receives that share of every row, multiplies it by [E, E], and sends it back. Each element travels once each
way, which is the least that a dense mixing matrix needs. Offsets, split sizes and views are laid out once.

Columns are taken in chunks, so that the workspace stays within its bound. A chunk takes a slice of every unit (a parameter
of a layer), so that all ranks have about the same share of it whatever piece of the buffers they own.

Shape legend: E experts, e local experts, L layers, P parameters of one expert, w columns of one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.core.stein import mix

Interval = tuple[int, int]


@dataclass(frozen=True)
class Unit:
    """One parameter of a layer's experts, as flat gradient rows."""

    layer: int
    """Index into the mixing matrices."""
    rows: Sequence[Tensor]
    """Gradient of each local expert, flat, all equally long; views that stay valid from step to step."""
    owned: Sequence[Sequence[Interval]]
    """owned[e][shard]: which columns of local expert e that shard of the expert-data-parallel group holds."""

    @property
    def columns(self) -> int:
        return self.rows[0].numel()


@dataclass(frozen=True)
class Members:
    """Who is who in the exchanging group."""

    group: dist.ProcessGroup
    expert_rank: Sequence[int]
    """Of each rank of the group: its place in the expert-parallel group."""
    shard: Sequence[int]
    """Of each rank of the group: which pieces it owns; all 0 where every rank owns whole rows."""

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()


@dataclass(frozen=True)
class _Piece:
    unit: int
    start: int
    stop: int


@dataclass
class _Chunk:
    """Views for one round. `sent` and `held` speak of this rank's own rows, `mine` of the columns it is responsible for."""

    send_splits: list[int]
    receive_splits: list[int]
    mine: list[tuple[int, Interval]]  # layer and range of each [E, w] matrix in the workspace
    held: list[Tensor] = field(default_factory=list)  # gradient views, by destination
    sent: list[Interval] = field(default_factory=list)  # the same, in a workspace of messages
    received: list[Interval] = field(default_factory=list)  # incoming messages' segments
    placed: list[Interval] = field(default_factory=list)  # the same, in the matrices

    @property
    def elements(self) -> int:
        matrices = sum(stop - start for _, (start, stop) in self.mine)
        return max(matrices, sum(self.send_splits), sum(self.receive_splits))

    @property
    def in_order(self) -> bool:
        """Whether messages arrive as the matrices lie."""
        return self.received == self.placed


class ExpertExchange:
    """Mixes expert gradients in place.

    Args:
        units: what is to be mixed; the same units in the same order on all ranks of the group.
        members: the group; with one rank nothing is sent.
        experts: E.
        chunk_bytes: most bytes of workspace.

    Raises:
        ValueError: if units disagree with each other, or the bound is too small for one column.
    """

    def __init__(self, units: Sequence[Unit], members: Members, experts: int, chunk_bytes: int) -> None:
        _check(units, members, experts)
        self.units, self.members, self.experts = units, members, experts
        first = units[0].rows[0]
        self.dtype, self.device = first.dtype, first.device
        self._local = len(units[0].rows)
        order = sorted(range(members.size), key=lambda rank: (members.shard[rank], members.expert_rank[rank]))
        self._turns = {rank: turn for turn, rank in enumerate(order)}
        # Products are taken in float32: lower precisions need two float32 copies of a piece besides the two workspaces.
        self._element_bytes = 2 * first.element_size() + (0 if self.dtype is torch.float32 else 8)
        self.chunks = self._plan(chunk_bytes)
        self.workspace_bytes = max(chunk.elements for chunk in self.chunks) * self._element_bytes
        self._space: tuple[Tensor, Tensor] | None = None
        self._views: list[tuple[list[Tensor], ...]] = []

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends to other ranks in one `apply`, both ways."""
        own = self.members.rank
        elements = sum(
            sum(splits) - splits[own] for chunk in self.chunks for splits in (chunk.send_splits, chunk.receive_splits)
        )
        return elements * self.dtype.itemsize

    def apply(self, weights_LEE: Tensor) -> None:
        """Replace every expert's gradient by the weighted sum of all experts' (`core.stein.mix`), in place.

        A collective over the group.

        Args:
            weights_LEE: w+, float32, the same on all ranks.
        """
        first, second = self._workspace()
        group, alone = self.members.group, self.members.size == 1
        for chunk, (messages, incoming, matrices, outgoing, results) in zip(self.chunks, self._views, strict=True):
            sends, receives = sum(chunk.send_splits), sum(chunk.receive_splits)
            _copy(messages, chunk.held)
            source, target = first, second
            if not alone:
                dist.all_to_all_single(
                    second[:receives], first[:sends], chunk.receive_splits, chunk.send_splits, group=group
                )
                source, target = second, first
            if not chunk.in_order:
                _copy(matrices, incoming)
                source, target = target, source
            for layer, (start, stop) in chunk.mine:
                self._mix(
                    weights_LEE[layer],
                    source[start:stop].view(self.experts, -1),
                    target[start:stop].view(self.experts, -1),
                )
            source, target = target, source
            if not chunk.in_order:
                _copy(outgoing, results)
                source, target = target, source
            if not alone:
                dist.all_to_all_single(
                    target[:sends], source[:receives], chunk.send_splits, chunk.receive_splits, group=group
                )
                source = target
            _copy(chunk.held, _cut(source, chunk.sent))

    def release(self) -> None:
        """Give the workspace back until the next `apply`."""
        self._space, self._views = None, []

    def _mix(self, weights_EE: Tensor, rows_Ew: Tensor, out_Ew: Tensor) -> None:
        if self.dtype is torch.float32:
            mix(weights_EE, rows_Ew, out=out_Ew)
        else:
            out_Ew.copy_(mix(weights_EE, rows_Ew.float()))

    def _workspace(self) -> tuple[Tensor, Tensor]:
        if self._space is None:
            size = max(chunk.elements for chunk in self.chunks)
            first, second = (torch.empty(size, dtype=self.dtype, device=self.device) for _ in range(2))
            self._space = first, second
            alone = self.members.size == 1
            arrived, free = (first, second) if alone else (second, first)
            self._views = [
                (
                    _cut(first, chunk.sent),
                    _cut(arrived, chunk.received),
                    _cut(free, chunk.placed),
                    # after mixing, results lie where messages arrived, and go out from the other buffer
                    _cut(free, chunk.received),
                    _cut(arrived, chunk.placed),
                )
                for chunk in self.chunks
            ]
        return self._space

    # --- the plan -----------------------------------------------------------------------------------------------------

    def _plan(self, chunk_bytes: int) -> list[_Chunk]:
        columns = sum(unit.columns for unit in self.units)
        least = self._element_bytes * self.experts
        if chunk_bytes < least:
            raise ValueError(f"chunk_bytes={chunk_bytes} is less than one column of {self.experts} experts ({least})")
        rounds = max(1, -(-least * columns // (self.members.size * chunk_bytes)))
        while True:
            largest = max(self._most_elements(k, rounds) for k in range(rounds)) * self._element_bytes
            if largest <= chunk_bytes or rounds >= columns:
                return [self._chunk(k, rounds) for k in range(rounds)]
            # Pieces of rows that the distributed optimizer cut are not all equally large.
            rounds = min(columns, max(rounds + 1, -(-rounds * largest // chunk_bytes)))

    def _most_elements(self, k: int, rounds: int) -> int:
        """`_Chunk.elements` of the rank that has most in chunk k: the same on all ranks, since their units are alike."""
        bounds = self._bounds(k, rounds)
        total, size = sum(stop - start for start, stop in bounds), self.members.size
        widest = max((turn + 1) * total // size - turn * total // size for turn in range(size))
        owned = [0] * (max(self.members.shard) + 1)
        for unit, (start, stop) in zip(self.units, bounds, strict=True):
            for intervals in unit.owned:
                for shard in range(len(owned)):
                    low, high = intervals[shard]
                    owned[shard] += max(0, min(high, stop) - max(low, start))
        return max(self.experts * widest, *owned)

    def _bounds(self, k: int, rounds: int) -> list[Interval]:
        """Which columns of each unit chunk k takes."""
        return [(k * unit.columns // rounds, (k + 1) * unit.columns // rounds) for unit in self.units]

    def _chunk(self, k: int, rounds: int) -> _Chunk:
        members, me = self.members, self.members.rank
        pieces = [list(self._pieces(rank, k, rounds)) for rank in range(members.size)]
        chunk = _Chunk([], [], [])
        cursor = 0
        for destination in range(members.size):
            before = cursor
            for piece in pieces[destination]:
                unit = self.units[piece.unit]
                for slot in range(self._local):
                    start, stop = self._overlap(piece, slot, members.shard[me])
                    if stop > start:
                        chunk.held.append(unit.rows[slot][start:stop])
                        chunk.sent.append((cursor, cursor + stop - start))
                        cursor += stop - start
            chunk.send_splits.append(cursor - before)
        offsets, cursor = [], 0
        for piece in pieces[me]:
            size = self.experts * (piece.stop - piece.start)
            offsets.append(cursor)
            chunk.mine.append((self.units[piece.unit].layer, (cursor, cursor + size)))
            cursor += size
        cursor = 0
        for source in range(members.size):
            before = cursor
            for piece, offset in zip(pieces[me], offsets, strict=True):
                for slot in range(self._local):
                    start, stop = self._overlap(piece, slot, members.shard[source])
                    if stop > start:
                        expert = members.expert_rank[source] * self._local + slot
                        place = offset + expert * (piece.stop - piece.start) + start - piece.start
                        chunk.received.append((cursor, cursor + stop - start))
                        chunk.placed.append((place, place + stop - start))
                        cursor += stop - start
            chunk.receive_splits.append(cursor - before)
        return chunk

    def _overlap(self, piece: _Piece, slot: int, shard: int) -> Interval:
        start, stop = self.units[piece.unit].owned[slot][shard]
        return max(start, piece.start), min(stop, piece.stop)

    def _pieces(self, rank: int, k: int, rounds: int) -> Iterator[_Piece]:
        """The columns of chunk k that a rank is responsible for: a contiguous share of all units' slices, laid end to end.

        Ranks come in the order of their shards. Where units come in the order of the sharded buffer, a rank then mixes columns
        of which it owns its own experts' rows, and these stay where they are.
        """
        bounds = self._bounds(k, rounds)
        total = sum(stop - start for start, stop in bounds)
        turn = self._turns[rank]
        first, last = turn * total // self.members.size, (turn + 1) * total // self.members.size
        passed = 0
        for index, (start, stop) in enumerate(bounds):
            low, high = max(first - passed, 0), min(last - passed, stop - start)
            if high > low:
                yield _Piece(index, start + low, start + high)
            passed += stop - start


def _cut(flat: Tensor, intervals: Sequence[Interval]) -> list[Tensor]:
    return [flat[start:stop] for start, stop in intervals]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _check(units: Sequence[Unit], members: Members, experts: int) -> None:
    if not units:
        raise ValueError("no expert parameters to exchange")
    local = len(units[0].rows)
    expert_ranks = max(members.expert_rank) + 1
    if local * expert_ranks != experts:
        raise ValueError(f"{expert_ranks} expert-parallel ranks with {local} experts each are not {experts} experts")
    dtypes = {row.dtype for unit in units for row in unit.rows}
    if len(dtypes) != 1:
        raise ValueError(f"gradients of several dtypes {sorted(map(str, dtypes))}: exchange them separately")
    for unit in units:
        if len({row.numel() for row in unit.rows}) != 1 or len(unit.rows) != local:
            raise ValueError("every unit needs one equally long row for each local expert")

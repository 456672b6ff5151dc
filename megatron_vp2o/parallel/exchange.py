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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.core.stein import mix
from megatron_vp2o.parallel.strided import Pair, StridedCopies, matrix_of

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
    """Place of each rank of the group in the expert-parallel group."""
    shard: Sequence[int]
    """Which pieces each rank of the group owns; all 0 where every rank owns whole rows."""

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()


@dataclass(frozen=True)
class _Piece:
    """Columns start..stop of a unit, for which one rank is responsible."""

    unit: int
    start: int
    stop: int


@dataclass
class _Chunk:
    """One round. `held` and `sent` speak of this rank's own rows, the rest of the columns that it is responsible for."""

    send_splits: list[int]
    receive_splits: list[int]
    mine: list[tuple[_Piece, Interval]]  # pieces, and the range of each one's [E, w] matrix in a buffer
    held: list[Tensor] = field(default_factory=list)  # gradient views, by destination
    sent: list[Interval] = field(default_factory=list)  # the same, in a buffer of messages
    received: list[Interval] = field(default_factory=list)  # incoming messages' segments
    placed: list[Interval] = field(default_factory=list)  # the same, in the matrices

    @property
    def elements(self) -> int:
        matrices = sum(stop - start for _, (start, stop) in self.mine)
        return max(matrices, sum(self.send_splits), sum(self.receive_splits))

    @property
    def in_order(self) -> bool:
        """True if received segments are already in matrix order, so that no copy is needed."""
        return self.received == self.placed


@dataclass
class _Copies:
    """The copies of one round between gradients and the two buffers."""

    pack: StridedCopies  # gradients -> first, by destination
    gather: StridedCopies  # second, by source -> first, as matrices
    scatter: StridedCopies  # second, as matrices -> first, by source
    unpack: StridedCopies  # second, by destination -> gradients


class ExpertExchange:
    """Mixes expert gradients in place.

    Args:
        units: what is to be mixed; the same units in the same order on all ranks of the group.
        members: the group; with one rank nothing is sent.
        experts: E.
        chunk_bytes: most bytes of workspace.
        tf32: on a GPU products of float32 gradients may take their factors with 10 bits of mantissa, three more than the bfloat16
            in which such gradients were computed; sums stay in float32.

    Raises:
        ValueError: if units disagree with each other, or the bound is too small for one column.
    """

    def __init__(
        self, units: Sequence[Unit], members: Members, experts: int, chunk_bytes: int, *, tf32: bool = False
    ) -> None:
        _check(units, members, experts)
        self.units, self.members, self.experts, self.tf32 = units, members, experts, tf32
        first = units[0].rows[0]
        self.dtype, self.device = first.dtype, first.device
        self._local = len(units[0].rows)
        order = sorted(range(members.size), key=lambda rank: (members.shard[rank], members.expert_rank[rank]))
        self._turns = {rank: turn for turn, rank in enumerate(order)}
        # Products are taken in float32: lower precisions need two float32 copies of a piece besides the two buffers.
        self._element_bytes = 2 * first.element_size() + (0 if self.dtype is torch.float32 else 8)
        self.chunks = self._plan(chunk_bytes)
        self.workspace_bytes = max(chunk.elements for chunk in self.chunks) * self._element_bytes
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._copies: list[_Copies] = []
        self._matrices = [matrix_of(unit.rows) for unit in units] if members.size == 1 else []

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends to other ranks in one `mix`, both ways."""
        own = self.members.rank
        elements = sum(
            sum(splits) - splits[own] for chunk in self.chunks for splits in (chunk.send_splits, chunk.receive_splits)
        )
        return elements * self.dtype.itemsize

    def mix(self, weights_LEE: Tensor) -> None:
        """Replace every expert's gradient by the weighted sum of all experts' (`core.stein.mix`), in place.

        A collective over the group.

        Args:
            weights_LEE: w+, float32, the same on all ranks.
        """
        with _tf32() if self.tf32 else nullcontext():
            if self._matrices and None not in self._matrices:
                self._mix_in_place(weights_LEE)
            else:
                self._mix_by_messages(weights_LEE)

    def _mix_in_place(self, weights_LEE: Tensor) -> None:
        """One rank whose rows lie at equal distances: products read them where they are, and results are copied back."""
        results, _ = self._workspace()
        backwards_LEE = weights_LEE.flip(1, 2)  # for rows that lie in reverse order
        for chunk in self.chunks:
            for piece, (start, stop) in chunk.mine:
                matrix_EP, reverse = self._matrices[piece.unit]  # type: ignore[misc]
                rows_Ew = matrix_EP[:, piece.start : piece.stop]
                mixed_Ew = results[: stop - start].view(self.experts, -1)
                weights = backwards_LEE if reverse else weights_LEE
                self._product(weights[self.units[piece.unit].layer], rows_Ew, mixed_Ew)
                rows_Ew.copy_(mixed_Ew)

    def _mix_by_messages(self, weights_LEE: Tensor) -> None:
        """Two buffers. Who reads what, for each round:

        | step | from | to |
        | --- | --- | --- |
        | pack | own rows of all columns | first: messages, by destination |
        | all-to-all | first | second: messages, by source |
        | gather | second | first: matrices [E, w] of this rank's columns |
        | product | first | second: mixed matrices |
        | scatter | second | first: answers, by source |
        | all-to-all back | first | second: answers, by destination |
        | unpack | second | own rows of all columns |

        Where messages arrive in matrix order, the product goes from second to first, without gather and scatter. With one
        rank nothing is sent: messages are packed into the place where they would arrive.
        """
        first, second = self._workspace()
        for chunk, copies in zip(self.chunks, self._copies, strict=True):
            copies.pack()
            self._send(second, first, chunk.receive_splits, chunk.send_splits)
            source, target = second, first
            if not chunk.in_order:
                copies.gather()
                source, target = first, second
            for piece, (start, stop) in chunk.mine:
                self._product(
                    weights_LEE[self.units[piece.unit].layer],
                    source[start:stop].view(self.experts, -1),
                    target[start:stop].view(self.experts, -1),
                )
            if not chunk.in_order:
                copies.scatter()
            self._send(second, first, chunk.send_splits, chunk.receive_splits)
            copies.unpack()

    def _send(self, to: Tensor, out: Tensor, receives: list[int], sends: list[int]) -> None:
        if self.members.size > 1:
            dist.all_to_all_single(to[: sum(receives)], out[: sum(sends)], receives, sends, group=self.members.group)

    def release(self) -> None:
        """Give the workspace back until the next `mix`."""
        self._buffers, self._copies = None, []

    def _product(self, weights_EE: Tensor, rows_Ew: Tensor, out_Ew: Tensor) -> None:
        if self.dtype is torch.float32:
            mix(weights_EE, rows_Ew, out=out_Ew)
        else:
            out_Ew.copy_(mix(weights_EE, rows_Ew.float()))

    def _workspace(self) -> tuple[Tensor, Tensor]:
        if self._buffers is None:
            size = max(chunk.elements for chunk in self.chunks)
            first, second = (torch.empty(size, dtype=self.dtype, device=self.device) for _ in range(2))
            self._buffers = first, second
            alone = self.members.size == 1
            for chunk in self.chunks if not self._matrices or None in self._matrices else ():
                self._copies.append(
                    _Copies(
                        StridedCopies(_pairs(_cut(second if alone else first, chunk.sent), chunk.held)),
                        StridedCopies(_pairs(_cut(first, chunk.placed), _cut(second, chunk.received))),
                        StridedCopies(_pairs(_cut(first, chunk.received), _cut(second, chunk.placed))),
                        StridedCopies(_pairs(chunk.held, _cut(first if alone else second, chunk.sent))),
                    )
                )
        return self._buffers

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
            chunk.mine.append((piece, (cursor, cursor + size)))
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


@contextmanager
def _tf32() -> Iterator[None]:
    """Inside, products of float32 on a GPU may use TF32, which torch has off unless it is asked."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _cut(flat: Tensor, intervals: Sequence[Interval]) -> list[Tensor]:
    return [flat[start:stop] for start, stop in intervals]


def _pairs(targets: list[Tensor], sources: list[Tensor]) -> list[Pair]:
    return list(zip(targets, sources, strict=True))


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

"""Rows of tokens one after the other in one sequence, without attention across them.

Shape legend: N rows, S positions of the longest, V tokens of all rows together, T = V rounded up, P places of the rows as
attention sees them (padded again, a few rows of similar length at a time), n query heads, g key/value heads, d head width. Under
context parallelism t = T / CP tokens of this rank, and Q places of their queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vp2o.parallel.context import Dealt, deal

SIMILAR = 0.7
"""Rows go through attention together whose lengths are at least this share of the longest one's."""


@dataclass
class PackedRows(PackedSeqParams):
    """Where each token of a packed sequence [1, T] comes from. Made by `pack_rows`.

    transformer-engine reads what Megatron's own class has; `FusedCoreAttention` and `CachedSelfAttention` read the rest.

    Attributes:
        rows: N.
        width: S.
        source_V: place of each packed token in the padded batch [N * S].
        token_V: where each of them stands among the packed ones; None: these are the first V.
        position_T: of each token in its row; tokens beyond the rows count from 0 as if they were a further one.
        padding_T: True for tokens of no row.
        groups: numbers of rows and their padded length, of rows that go through attention together.
        place_P: which packed token stands at each place of these groups; a row's last token fills it up.
        inverse_T: the place of each packed token.
        dealt: which tokens the context-parallel ranks have; None: every rank has all.
        rank: this one's, among them.
        queries: place and inverse (as above) of this rank's own tokens, and the number of places of each row, group by group.
    """

    rows: int = 0
    width: int = 0
    source_V: Tensor = None  # type: ignore[assignment]  # the base class has only fields with defaults
    token_V: Tensor | None = None
    position_T: Tensor = None  # type: ignore[assignment]
    padding_T: Tensor = None  # type: ignore[assignment]
    groups: tuple[tuple[int, int], ...] = ()
    place_P: Tensor = None  # type: ignore[assignment]
    inverse_T: Tensor = None  # type: ignore[assignment]
    dealt: Dealt | None = None
    rank: int = 0
    queries: _Queries | None = None
    _rotary: tuple[Tensor, Tensor] | None = None

    def pack(self, values_NS: Tensor, fill: float = 0) -> Tensor:
        """What belongs to the packed tokens, [T] and any further dimensions; `fill` for tokens of no row."""
        packed_V = values_NS.flatten(0, 1).index_select(0, self.source_V)
        if self.token_V is not None:
            packed_T = packed_V.new_full((len(self.position_T), *packed_V.shape[1:]), fill)
            return packed_T.index_copy_(0, self.token_V, packed_V)
        beyond = len(self.position_T) - len(packed_V)
        return torch.cat([packed_V, packed_V.new_full((beyond, *packed_V.shape[1:]), fill)])

    def unpack(self, values_T: Tensor) -> Tensor:
        """Back to [N, S]; zero outside the rows. Differentiable."""
        values_V = values_T[: len(self.source_V)] if self.token_V is None else values_T.index_select(0, self.token_V)
        return values_T.new_zeros(self.rows * self.width).index_copy(0, self.source_V, values_V).view(self.rows, -1)

    def row_of_tokens(self) -> Tensor:
        """Which row each token belongs to, [T]; N where to none."""
        row_N1 = torch.arange(self.rows, device=self.source_V.device)[:, None]
        return self.pack(row_N1.expand(self.rows, self.width), self.rows)

    def own(self, values_T: Tensor, dim: int = 0) -> Tensor:
        """Of all packed tokens, those of this context-parallel rank."""
        return values_T if self.dealt is None else self.dealt.own(values_T, self.rank, dim)

    def places(self) -> Tensor:
        """The packed token of each position of the padded batch, [N, S]; anything outside the rows."""
        token_V = self.token_V if self.token_V is not None else torch.arange(len(self.source_V)).to(self.source_V)
        place_X = self.source_V.new_zeros(self.rows * self.width)
        return place_X.index_copy_(0, self.source_V, token_V).view(self.rows, self.width)

    def inside(self) -> Tensor:
        """True at the positions of the padded batch that are packed, [N, S]."""
        inside = self.source_V.new_zeros(self.rows * self.width, dtype=torch.bool)
        return inside.index_fill_(0, self.source_V, True).view(self.rows, self.width)

    def pieces(self) -> tuple[Tensor, Tensor | None]:
        """Which piece each token belongs to, [T], and what rows are made of: row n of piece n and, where the second is there, of
        the piece that it names, [N]. Padding is one more piece, the last."""
        return self.row_of_tokens(), None

    def weights(self) -> Tensor | None:
        """Rows that each token stands for, float32 [T]; None: one."""
        return None

    def rotary(self, freqs_S11d: Tensor, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """cos and sin at each own token's position times `scale` (YaRN's), [t, 1, 1, d / 2], computed once for all layers."""
        if self._rotary is None:
            half = freqs_S11d[..., : freqs_S11d.shape[-1] // 2].index_select(0, self.own(self.position_T))
            self._rotary = (half.cos() * scale).to(dtype), (half.sin() * scale).to(dtype)
        return self._rotary

    def attend(
        self,
        query_t1nd: Tensor,
        key_t1gd: Tensor,
        value_t1gd: Tensor,
        group: dist.ProcessGroup | None = None,
        **settings: Any,
    ) -> Tensor:
        """Causal attention within each row, [t, 1, n * d]. T is t where there is no context parallelism.

        Args:
            group: of the context-parallel ranks.
            settings: of `torch.nn.functional.scaled_dot_product_attention`.
        """
        if self.dealt is not None:
            assert group is not None
            return self._attend_dealt(query_t1nd, key_t1gd, value_t1gd, group, settings)
        query_T1nd, key_T1gd, value_T1gd = query_t1nd, key_t1gd, value_t1gd
        regular = len(self.place_P) == len(self.inverse_T)  # then every group is a plain reshape
        parts = [x.squeeze(1) for x in (query_T1nd, key_T1gd, value_T1gd)]
        if not regular:
            parts = [Spread.apply(x, self.place_P, self.inverse_T) for x in parts]
        sizes = [rows * length for rows, length in self.groups]
        outputs = []
        for (rows, _), *some in zip(self.groups, *(x.split(sizes) for x in parts), strict=True):
            query, key, value = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in some)
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, **settings)
            outputs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        out_Px = torch.cat(outputs)
        return (out_Px if regular else Collect.apply(out_Px, self.inverse_T))[:, None]

    def _attend_dealt(
        self,
        query_t1nd: Tensor,
        key_t1gd: Tensor,
        value_t1gd: Tensor,
        group: dist.ProcessGroup,
        settings: dict[str, Any],
    ) -> Tensor:
        """This rank's queries, with the keys and values of all ranks."""
        queries = self.queries
        assert self.dealt is not None and queries is not None
        both_T1g2d = self.dealt.whole(torch.cat([key_t1gd, value_t1gd], dim=-1), group)
        both_Pg2d = Spread.apply(both_T1g2d.squeeze(1), self.place_P, self.inverse_T)
        query_Qnd = Spread.apply(query_t1nd.squeeze(1), queries.place_Q, queries.inverse_t)
        outputs, keys, asked = [], 0, 0
        for (rows, length), each in zip(self.groups, queries.each, strict=True):
            both = both_Pg2d[keys : keys + rows * length].unflatten(0, (rows, -1)).transpose(1, 2)
            key, value = both.chunk(2, dim=-1)
            query = query_Qnd[asked : asked + rows * each].unflatten(0, (rows, -1)).transpose(1, 2)
            position = queries.position_Q[asked : asked + rows * each].view(rows, 1, each, 1)
            allowed = torch.arange(length, device=query.device) <= position
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, **settings)
            outputs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
            keys, asked = keys + rows * length, asked + rows * each
        return Collect.apply(torch.cat(outputs), queries.inverse_t)[:, None]


@dataclass(frozen=True)
class _Queries:
    """A context-parallel rank's own tokens as attention sees them."""

    place_Q: Tensor
    """Which own token stands at each place; a row's last own token fills it up."""
    inverse_t: Tensor
    """The place of each own token."""
    position_Q: Tensor
    """Of the token at each place in its row."""
    each: tuple[int, ...]
    """Places of a row, for each group of rows."""


class Spread(torch.autograd.Function):
    """[T, ...] -> [P, ...]. What fills rows up gets no gradient: no token of a row attends to what comes after it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place_P: Tensor, inverse_T: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_T)
        return x.index_select(0, place_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse_T,) = ctx.saved_tensors
        return grad.index_select(0, inverse_T), None, None


class Collect(torch.autograd.Function):
    """[P, ...] -> [T, ...]: what fills rows up is left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse_T: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_T)
        ctx.places = len(x)
        return x.index_select(0, inverse_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inverse_T,) = ctx.saved_tensors
        return grad.new_zeros(ctx.places, *grad.shape[1:]).index_copy_(0, inverse_T, grad), None


def pack_rows(
    lengths: Sequence[int], width: int, multiple: int, device: torch.device, *, rank: int = 0, ranks: int = 1
) -> PackedRows:
    """The layout of rows of these lengths, one after the other.

    Args:
        lengths: of the rows, best in descending order; 0 for a row without tokens.
        width: S of the padded batch, at least the longest length.
        multiple: T is the smallest multiple of it, at least one, that holds all tokens.
        rank: this one's, among context-parallel ranks.
        ranks: so many. More than one share each row: it is then padded to a multiple of 2 * ranks, which has to divide `multiple`.
    """
    unit = 2 * ranks if ranks > 1 else 1
    padded = [-(-length // unit) * unit for length in lengths if length]
    taken = sum(padded)
    total = max(1, -(-taken // multiple)) * multiple
    pieces = padded + ([total - taken] if total > taken else [])
    lengths_R = torch.tensor(pieces)
    start_R = lengths_R.cumsum(0) - lengths_R
    groups = _groups(pieces)
    place_P, inverse_T = _places(lengths_R, groups)
    bounds = F.pad(lengths_R.cumsum(0), (1, 0)).int().to(device, non_blocking=True)
    position_T = torch.arange(total) - start_R.repeat_interleave(lengths_R)
    own_lengths = [length for length in lengths if length] + [0] * (len(pieces) - len(padded))
    padding_T = position_T >= torch.tensor(own_lengths).repeat_interleave(lengths_R)
    valid_NS = torch.arange(width) < torch.tensor(lengths, dtype=torch.int64).view(-1, 1)
    dealt, queries = None, None
    if ranks > 1:
        dealt = deal(pieces, ranks, torch.device("cpu"))
        shares = [(rows, length // ranks) for rows, length in groups]
        place_Q, inverse_t = _places(lengths_R // ranks, shares)
        position_Q = dealt.own(position_T, rank)[place_Q]
        each = tuple(length for _, length in shares)
        queries = _Queries(
            place_Q.to(device, non_blocking=True),
            inverse_t.to(device, non_blocking=True),
            position_Q.to(device, non_blocking=True),
            each,
        )
        dealt = deal(pieces, ranks, device)
    return PackedRows(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(pieces),
        max_seqlen_kv=max(pieces),
        rows=len(lengths),
        width=width,
        source_V=valid_NS.flatten().nonzero().squeeze(1).to(device, non_blocking=True),
        token_V=None if ranks == 1 else (~padding_T).nonzero().squeeze(1).to(device, non_blocking=True),
        position_T=position_T.to(device, non_blocking=True),
        padding_T=padding_T.to(device, non_blocking=True),
        groups=groups,
        place_P=place_P.to(device, non_blocking=True),
        inverse_T=inverse_T.to(device, non_blocking=True),
        dealt=dealt,
        rank=rank,
        queries=queries,
    )


def _places(lengths_R: Tensor, groups: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Which token stands at each place of the groups, where rows lie one after the other, and the place of each token."""
    start_R = lengths_R.cumsum(0) - lengths_R
    places, first = [], 0
    for rows, length in groups:
        within = torch.minimum(torch.arange(length), lengths_R[first : first + rows, None] - 1)
        places.append((start_R[first : first + rows, None] + within).flatten())
        first += rows
    place_P = torch.cat(places)
    fresh_P = torch.ones_like(place_P, dtype=torch.bool)  # a token's first place is its own
    fresh_P[1:] = place_P[1:] != place_P[:-1]
    return place_P, fresh_P.nonzero().squeeze(1)


def _groups(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Neighbours of similar length: how many, and the longest one's."""
    groups: list[tuple[int, int]] = []
    for length in lengths:
        rows, longest = groups[-1] if groups else (0, 0)
        if rows and SIMILAR * longest <= length <= longest:
            groups[-1] = (rows + 1, longest)
        else:
            groups.append((1, length))
    return tuple(groups)

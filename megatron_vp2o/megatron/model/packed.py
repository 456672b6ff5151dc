"""Rows of tokens one after the other in one sequence, without attention across them.

Shape legend: N rows, S positions of the longest, V tokens of all rows together, T = V rounded up, P places of the rows as
attention sees them (padded again, a few rows of similar length at a time), n query heads, g key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        position_T: of each token in its row; tokens beyond V count from 0 as if they were a further row.
        padding_T: True beyond V.
        groups: numbers of rows and their padded length, of rows that go through attention together.
        place_P: which packed token stands at each place of these groups; a row's last token fills it up.
        inverse_T: the place of each packed token.
    """

    rows: int = 0
    width: int = 0
    source_V: Tensor = None  # type: ignore[assignment]  # the base class has only fields with defaults
    position_T: Tensor = None  # type: ignore[assignment]
    padding_T: Tensor = None  # type: ignore[assignment]
    groups: tuple[tuple[int, int], ...] = ()
    place_P: Tensor = None  # type: ignore[assignment]
    inverse_T: Tensor = None  # type: ignore[assignment]
    _rotary: tuple[Tensor, Tensor] | None = None

    def pack(self, values_NS: Tensor, fill: float = 0) -> Tensor:
        """What belongs to the packed tokens, [T] and any further dimensions; `fill` beyond V."""
        packed_V = values_NS.flatten(0, 1).index_select(0, self.source_V)
        beyond = len(self.position_T) - len(packed_V)
        return torch.cat([packed_V, packed_V.new_full((beyond, *packed_V.shape[1:]), fill)])

    def unpack(self, values_T: Tensor) -> Tensor:
        """Back to [N, S]; zero outside the rows. Differentiable."""
        values_V = values_T[: len(self.source_V)]
        return values_T.new_zeros(self.rows * self.width).index_copy(0, self.source_V, values_V).view(self.rows, -1)

    def row_of_tokens(self) -> Tensor:
        """Which row each token belongs to, [T]; N beyond V."""
        row_V = self.source_V // self.width
        return F.pad(row_V, (0, len(self.position_T) - len(row_V)), value=self.rows)

    def rotary(self, freqs_S11d: Tensor, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """cos and sin at each token's position times `scale` (YaRN's), [T, 1, 1, d / 2], computed once for all layers."""
        if self._rotary is None:
            half = freqs_S11d[..., : freqs_S11d.shape[-1] // 2].index_select(0, self.position_T)
            self._rotary = (half.cos() * scale).to(dtype), (half.sin() * scale).to(dtype)
        return self._rotary

    def attend(self, query_T1nd: Tensor, key_T1gd: Tensor, value_T1gd: Tensor, **settings: Any) -> Tensor:
        """Causal attention within each row, [T, 1, n * d].

        Args:
            settings: of `torch.nn.functional.scaled_dot_product_attention`.
        """
        regular = len(self.place_P) == len(self.inverse_T)  # then every group is a plain reshape
        parts = [x.squeeze(1) for x in (query_T1nd, key_T1gd, value_T1gd)]
        if not regular:
            parts = [_Spread.apply(x, self.place_P, self.inverse_T) for x in parts]
        sizes = [rows * length for rows, length in self.groups]
        outputs = []
        for (rows, _), *some in zip(self.groups, *(x.split(sizes) for x in parts), strict=True):
            query, key, value = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in some)
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, **settings)
            outputs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        out_Px = torch.cat(outputs)
        return (out_Px if regular else _Collect.apply(out_Px, self.inverse_T))[:, None]


class _Spread(torch.autograd.Function):
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


class _Collect(torch.autograd.Function):
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


def pack_rows(lengths: Sequence[int], width: int, multiple: int, device: torch.device) -> PackedRows:
    """The layout of rows of these lengths, one after the other.

    Args:
        lengths: of the rows, best in descending order; 0 for a row without tokens.
        width: S of the padded batch, at least the longest length.
        multiple: T is the smallest multiple of it, at least one, that holds all tokens.
    """
    valid = sum(lengths)
    total = max(1, -(-valid // multiple)) * multiple
    pieces = [length for length in lengths if length] + ([total - valid] if total > valid else [])
    lengths_R = torch.tensor(pieces)
    start_R = lengths_R.cumsum(0) - lengths_R
    groups = _groups(pieces)
    places, first = [], 0
    for rows, length in groups:
        within = torch.minimum(torch.arange(length), lengths_R[first : first + rows, None] - 1)
        places.append((start_R[first : first + rows, None] + within).flatten())
        first += rows
    place_P = torch.cat(places)
    fresh_P = torch.ones_like(place_P, dtype=torch.bool)  # a token's first place is its own
    fresh_P[1:] = place_P[1:] != place_P[:-1]
    bounds = F.pad(lengths_R.cumsum(0), (1, 0)).int().to(device, non_blocking=True)
    valid_NS = torch.arange(width) < torch.tensor(lengths, dtype=torch.int64).view(-1, 1)
    return PackedRows(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(pieces),
        max_seqlen_kv=max(pieces),
        rows=len(lengths),
        width=width,
        source_V=valid_NS.flatten().nonzero().squeeze(1).to(device, non_blocking=True),
        position_T=(torch.arange(total) - start_R.repeat_interleave(lengths_R)).to(device, non_blocking=True),
        padding_T=(torch.arange(total) >= valid).to(device, non_blocking=True),
        groups=groups,
        place_P=place_P.to(device, non_blocking=True),
        inverse_T=fresh_P.nonzero().squeeze(1).to(device, non_blocking=True),
    )


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

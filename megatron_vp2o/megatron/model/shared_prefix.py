"""Packed rows whose common prefixes (the prompts of groups) are there once: each row attends to its prefix and to itself.

A family is rows that begin with the same prefix. The packed sequence has the prefixes of all families (the stems), then what is
the rows' own (the branches), then padding. A family of one row is a stem and nothing else. Positions go on from the prefix in
every branch, and the first token of each branch is predicted from the stem's last one.

Shape legend: N rows, S positions of the longest, F families, A tokens of all stems, V tokens of stems and branches, T = V rounded
up, P places of branches as attention sees them (padded again, a few of similar length at a time), m branches that go through
attention together, f families of these, r own positions of the longest of them, p prefix positions, n query heads, g key/value
heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vp2o.megatron.model.packed import SIMILAR, Collect, PackedRows, Spread, pack_rows

FEW = 4
"""Branches and stems go through attention together, too, whose lengths differ by no more than so many tokens."""
MASK_NUMBERS = 2**24
"""Branches of prefixes of different lengths need a mask each; together no more than so many numbers of masks are made."""


@dataclass(frozen=True)
class BranchGroup:
    """Branches that go through attention together."""

    branches: int
    own: int
    """r."""
    stem_fp: Tensor
    """Places in the packed sequence of each family's prefix; a prefix's last token fills it up."""
    family_m: Tensor
    """Which of these families each branch is of."""
    filled_fp: Tensor | None
    """Flat positions of `stem_fp` that are prefix tokens; None where all are."""
    allowed_m1rt: Tensor
    """What each own position may attend to, of prefix and own positions: [m or 1, 1, r, p + r]."""


@dataclass
class SharedRows(PackedRows):
    """Where each token of such a packed sequence comes from. Made by `pack_shared_rows`.

    Attributes:
        stems: the layout of the stems alone, as rows of their own.
        place_NS: the packed token of each position of the padded batch, 0 outside the rows.
        valid_NS: True inside the rows.
        before_T: the packed token that each token is predicted from.
        weight_T: rows that each token stands for, float32; 0 for padding.
        branch_groups: of branches, in the order in which these lie.
        stem_N: which family each row is of.
    """

    stems: PackedRows = None  # type: ignore[assignment]  # the base class has only fields with defaults
    place_NS: Tensor = None  # type: ignore[assignment]
    valid_NS: Tensor = None  # type: ignore[assignment]
    before_T: Tensor = None  # type: ignore[assignment]
    weight_T: Tensor = None  # type: ignore[assignment]
    branch_groups: tuple[BranchGroup, ...] = ()
    stem_N: Tensor = None  # type: ignore[assignment]

    def unpack(self, values_T: Tensor) -> Tensor:
        """See the base class. What belongs to a prefix goes to each of its rows."""
        values_NS = values_T.index_select(0, self.place_NS.flatten()).view(self.place_NS.shape)
        return torch.where(self.valid_NS, values_NS, 0.0)

    def places(self) -> Tensor:
        """See the base class."""
        return self.place_NS

    def inside(self) -> Tensor:
        """See the base class."""
        return self.valid_NS

    def pieces(self) -> tuple[Tensor, Tensor | None]:
        """See the base class."""
        rows, stems = self.rows, len(self.stems.cu_seqlens_q) - 1
        beyond = len(self.position_T) - len(self.source_V)
        row_V = self.source_V // self.width
        stem_V = self.stem_N[row_V] + rows
        in_stem_V = torch.arange(len(row_V), device=row_V.device) < len(self.stems.position_T)
        piece_V = torch.where(in_stem_V, stem_V, row_V)
        return F.pad(piece_V, (0, beyond), value=rows + stems), self.stem_N + rows

    def weights(self) -> Tensor:
        """See the base class."""
        return self.weight_T

    def attend(
        self,
        query_t1nd: Tensor,
        key_t1gd: Tensor,
        value_t1gd: Tensor,
        group: dist.ProcessGroup | None = None,
        **settings: Any,
    ) -> Tensor:
        """Attention of each row over its prefix and itself, [T, 1, n * d]; zero at padding.

        Args:
            group: is not used: context-parallel ranks share no prefixes.
            settings: of `torch.nn.functional.scaled_dot_product_attention`.
        """
        query_T1nd, key_T1gd, value_T1gd = query_t1nd, key_t1gd, value_t1gd
        stems, tokens = len(self.stems.position_T), len(self.source_V)
        stem_out = self.stems.attend(query_T1nd[:stems], key_T1gd[:stems], value_T1gd[:stems], **settings)
        outputs = [stem_out.squeeze(1)]
        if self.branch_groups:
            query_Bnd, key_Bgd, value_Bgd = (x[stems:tokens].squeeze(1) for x in (query_T1nd, key_T1gd, value_T1gd))
            keys, values = (
                _Prefixes.apply(x[:stems].squeeze(1).contiguous(), self.branch_groups) for x in (key_T1gd, value_T1gd)
            )
            outputs.append(self._attend_branches(query_Bnd, key_Bgd, value_Bgd, keys, values, **settings))
        out_Vx = torch.cat(outputs)
        return F.pad(out_Vx, (0, 0, 0, len(query_T1nd) - tokens))[:, None]

    def _attend_branches(
        self,
        query_Bnd: Tensor,
        key_Bgd: Tensor,
        value_Bgd: Tensor,
        key_prefixes: tuple[Tensor, ...],
        value_prefixes: tuple[Tensor, ...],
        **settings: Any,
    ) -> Tensor:
        regular = len(self.place_P) == len(self.inverse_T)
        own = [query_Bnd, key_Bgd, value_Bgd]
        if not regular:
            own = [Spread.apply(x, self.place_P, self.inverse_T) for x in own]
        sizes = [group.branches * group.own for group in self.branch_groups]
        outputs = []
        for group, key_prefix, value_prefix, *some in zip(
            self.branch_groups, key_prefixes, value_prefixes, *(x.split(sizes) for x in own), strict=True
        ):
            query, key, value = (x.unflatten(0, (group.branches, -1)) for x in some)
            out_mnrd = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                torch.cat([key_prefix, key], dim=1).transpose(1, 2),
                torch.cat([value_prefix, value], dim=1).transpose(1, 2),
                attn_mask=group.allowed_m1rt,
                **settings,
            )
            outputs.append(out_mnrd.transpose(1, 2).flatten(2).flatten(0, 1))
        out_Px = torch.cat(outputs)
        return out_Px if regular else Collect.apply(out_Px, self.inverse_T)


class _Prefixes(torch.autograd.Function):
    """Of keys or values of stems, [A, g, d]: each branch group's, [m, p, g, d]. Gradients of a family's branches add up."""

    @staticmethod
    def forward(ctx: Any, x_Agd: Tensor, groups: tuple[BranchGroup, ...]) -> tuple[Tensor, ...]:
        ctx.groups, ctx.shape = groups, x_Agd.shape
        return tuple(x_Agd[group.stem_fp].index_select(0, group.family_m) for group in groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dx_Agd = grads[0].new_zeros(ctx.shape)
        for group, grad_mpgd in zip(ctx.groups, grads, strict=True):
            families = len(group.stem_fp)
            sum_fpgd = grad_mpgd.new_zeros(families, *grad_mpgd.shape[1:])
            sum_fpgd.view(families, -1).index_add_(0, group.family_m, grad_mpgd.flatten(1))
            sum_Xgd, place_X = sum_fpgd.flatten(0, 1), group.stem_fp.flatten()
            if group.filled_fp is not None:
                sum_Xgd, place_X = sum_Xgd[group.filled_fp], place_X[group.filled_fp]
            dx_Agd[place_X] += sum_Xgd  # no place is there twice
        return dx_Agd, None


def pack_shared_rows(
    lengths: Sequence[int], families: Sequence[tuple[int, int]], width: int, multiple: int, device: torch.device
) -> SharedRows:
    """The layout of rows of these lengths.

    Args:
        lengths: of the rows, the rows of a family one after the other; none is 0.
        families: number of rows and length of the prefix of each family, best in descending order of the prefixes; the only row
            of a family may be all prefix.
        width: S of the padded batch, at least the longest length.
        multiple: T is the smallest multiple of it that holds all tokens.
    """
    rows_F, stem_F = (torch.tensor(column) for column in zip(*families, strict=True))
    length_N = torch.tensor(lengths)
    stem_N = torch.arange(len(families)).repeat_interleave(rows_F)
    own_N = length_N - stem_F[stem_N]
    groups, order_B = _branch_groups(own_N.tolist(), stem_F[stem_N].tolist())
    begin_F = stem_F.cumsum(0) - stem_F
    stems = int(stem_F.sum())
    begin_N = torch.zeros_like(length_N)
    own_B = own_N[order_B]
    begin_N[order_B] = stems + own_B.cumsum(0) - own_B
    s_S = torch.arange(width)
    valid_NS = s_S < length_N[:, None]
    prefix_N1 = stem_F[stem_N][:, None]
    place_NS = torch.where(s_S < prefix_N1, begin_F[stem_N][:, None] + s_S, begin_N[:, None] + s_S - prefix_N1)
    place_NS = torch.where(valid_NS, place_NS, 0)
    valid = stems + int(own_N.sum())
    total = max(1, -(-valid // multiple)) * multiple
    # of a prefix, its first row's
    first_N = torch.zeros_like(stem_N, dtype=torch.bool)
    first_N[rows_F.cumsum(0) - rows_F] = True
    fresh_NS = valid_NS & (first_N[:, None] | (s_S >= prefix_N1))
    source_V = torch.empty(valid, dtype=torch.int64)
    source_V[place_NS[fresh_NS]] = fresh_NS.flatten().nonzero().squeeze(1)
    position_V = source_V % width
    before_T = (torch.arange(total) - 1).clamp_(min=0)
    branches = own_N > 0
    before_T[begin_N[branches]] = (begin_F + stem_F - 1)[stem_N[branches]]
    row_V = source_V // width
    weight_V = torch.ones(valid)
    weight_V[:stems] = rows_F[stem_N[row_V[:stems]]].float()
    place_P, inverse_B = _places(own_B, groups)

    def moved(values: Tensor) -> Tensor:
        return values.to(device, non_blocking=True)

    def padded(values_V: Tensor) -> Tensor:
        return moved(F.pad(values_V, (0, total - valid)))

    longest = max(lengths)
    return SharedRows(
        qkv_format="thd",
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        rows=len(lengths),
        width=width,
        source_V=moved(source_V),
        position_T=padded(position_V),
        padding_T=moved(torch.arange(total) >= valid),
        place_P=moved(place_P),
        inverse_T=moved(inverse_B),
        stems=pack_rows(stem_F.tolist(), int(stem_F.max()), 1, device),
        place_NS=moved(place_NS),
        valid_NS=moved(valid_NS),
        before_T=moved(before_T),
        weight_T=padded(weight_V),
        branch_groups=tuple(
            _branch_group(order_B[first : first + count], own, stem_N, begin_F, stem_F, moved)
            for first, count, own in groups
        ),
        stem_N=moved(stem_N),
    )


def _branch_groups(own_N: list[int], stem_N: list[int]) -> tuple[list[tuple[int, int, int]], Tensor]:
    """Which branches go through attention together: (first, number, longest) in an order of the branches, and that order."""
    rows = [row for row, own in enumerate(own_N) if own]
    rows.sort(key=lambda row: -stem_N[row])
    level, levels = 0, {}  # prefixes of similar length
    for row in rows:
        if not _similar(stem_N[row], level):
            level = stem_N[row]
        levels[row] = level
    rows.sort(key=lambda row: (-levels[row], -own_N[row]))
    groups: list[tuple[int, int, int]] = []
    unequal = False
    for place, row in enumerate(rows):
        if groups:
            first, count, own = groups[-1]
            differs = unequal or stem_N[row] != stem_N[rows[first]]
            numbers = (count + 1) * own * (levels[row] + own)
            together = levels[row] == levels[rows[first]] and _similar(own_N[row], own)
            if together and not (differs and numbers > MASK_NUMBERS):
                groups[-1], unequal = (first, count + 1, own), differs
                continue
        groups.append((place, 1, own_N[row]))
        unequal = False
    return groups, torch.tensor(rows, dtype=torch.int64)


def _similar(length: int, longest: int) -> bool:
    return length <= longest and (length >= SIMILAR * longest or longest - length <= FEW)


def _branch_group(rows_m: Tensor, own: int, stem_N: Tensor, begin_F: Tensor, stem_F: Tensor, moved: Any) -> BranchGroup:
    family_f, family_m = stem_N[rows_m].unique(return_inverse=True)
    stem_f = stem_F[family_f]
    prefix = int(stem_f.max())
    within_fp = torch.minimum(torch.arange(prefix), stem_f[:, None] - 1)
    filled_fp = torch.arange(prefix) < stem_f[:, None]
    causal_rt = torch.ones(own, prefix + own, dtype=torch.bool).tril_(prefix)
    allowed_m1rt, filled = causal_rt[None, None], None
    if not filled_fp.all():
        seen_mt = F.pad(filled_fp[family_m], (0, own), value=True)
        allowed_m1rt = (causal_rt & seen_mt[:, None])[:, None]
        filled = moved(filled_fp.flatten().nonzero().squeeze(1))
    return BranchGroup(
        len(rows_m), own, moved(begin_F[family_f][:, None] + within_fp), moved(family_m), filled, moved(allowed_m1rt)
    )


def _places(own_B: Tensor, groups: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """As `PackedRows.place_P` and `inverse_T`, of the branches among themselves."""
    start_B = own_B.cumsum(0) - own_B
    places, inverses, taken = [own_B[:0]], [own_B[:0]], 0
    for first, count, own in groups:
        some_m = slice(first, first + count)
        position_r = torch.arange(own)
        places.append((start_B[some_m, None] + torch.minimum(position_r, own_B[some_m, None] - 1)).flatten())
        inverses.append(taken + (position_r < own_B[some_m, None]).flatten().nonzero().squeeze(1))
        taken += count * own
    return torch.cat(places), torch.cat(inverses)

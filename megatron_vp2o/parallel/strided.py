"""Copies between many one-dimensional views, with one operation for each run of views that lie at equal distances.

Expert gradients are such runs: Megatron's buffers hold the experts of a layer one after the other (in reverse order), so a
column range of all local experts is one strided matrix. A copy for each expert costs a kernel launch each.

Shape legend: n views of a run, w elements of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""(target, source): contiguous, equally long, one dimension, one dtype."""


class StridedCopies:
    """The copies of a list of pairs, planned once. The views must stay valid."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._blocks: list[tuple[Tensor, Tensor, Tensor | None]] = []
        single: list[Pair] = []
        for run in _runs(pairs):
            if len(run) == 1:
                single.append(run[0])
            else:
                self._blocks.append(_block(run))
        self._targets, self._sources = [target for target, _ in single], [source for _, source in single]

    @property
    def operations(self) -> int:
        """Number of operations that a call takes."""
        return len(self._blocks) + bool(self._targets)

    def __call__(self) -> None:
        """Copy."""
        for target_nw, source_nw, order_n in self._blocks:
            if order_n is None:
                target_nw.copy_(source_nw)
            elif target_nw.is_contiguous():
                torch.index_select(source_nw, 0, order_n, out=target_nw)
            else:
                target_nw.index_copy_(0, order_n, source_nw)
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)


def matrix_of(rows: Sequence[Tensor]) -> tuple[Tensor, bool] | None:
    """One strided matrix [n, w] over rows that lie at equal distances in one storage, and whether it has them in reverse order.

    None where they do not.
    """
    if len(rows) == 1:
        return rows[0][None], False
    step = int(rows[1].storage_offset()) - int(rows[0].storage_offset())
    run = next(_runs([(row, row) for row in rows]))
    if len(run) != len(rows):
        return None
    first = rows[0] if step > 0 else rows[-1]
    return _strided(first, len(rows), abs(step)), step < 0


def _runs(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Cut a list of pairs into the longest runs, greedily."""
    run: list[Pair] = []
    steps = (0, 0)
    for pair in pairs:
        if run:
            step = _distance(run[-1][0], pair[0]), _distance(run[-1][1], pair[1])
            width = pair[0].numel()
            apart = None not in step and all(abs(s or 0) >= width for s in step) and run[-1][0].numel() == width
            if apart and (len(run) == 1 or step == steps):
                steps = step  # type: ignore[assignment]
                run.append(pair)
                continue
            yield run
        run = [pair]
    if run:
        yield run


def _distance(one: Tensor, other: Tensor) -> int | None:
    """Elements from one view to the other; None where they are not of one storage."""
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return None
    return int(other.storage_offset()) - int(one.storage_offset())


def _block(run: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(target, source, order) as matrices; order is None where both go the same way."""
    (target, source), (next_target, next_source), (last_target, last_source) = run[0], run[1], run[-1]
    step_target = int(next_target.storage_offset()) - int(target.storage_offset())
    step_source = int(next_source.storage_offset()) - int(source.storage_offset())
    order = None
    if (step_target < 0) != (step_source < 0):
        order = torch.arange(len(run) - 1, -1, -1, device=target.device)
    target_nw = _strided(target if step_target > 0 else last_target, len(run), abs(step_target))
    source_nw = _strided(source if step_source > 0 else last_source, len(run), abs(step_source))
    return target_nw, source_nw, order


def _strided(first: Tensor, rows: int, step: int) -> Tensor:
    return first.as_strided((rows, first.numel()), (step, 1), first.storage_offset())

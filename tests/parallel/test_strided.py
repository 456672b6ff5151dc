"""Copies by runs against copies one by one, for rows at random places."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_vp2o.parallel.strided import StridedCopies, matrix_of


@pytest.mark.parametrize("seed", range(60))
def test_copies_are_those_of_single_pairs(seed: int) -> None:
    draw = random.Random(seed)
    base, other = torch.arange(4000.0), -torch.ones(4000)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    taken = cursor = 0
    for _ in range(draw.randint(1, 6)):  # runs, each forwards or backwards, of its own width and distance
        width, count, gap = draw.randint(1, 9), draw.randint(1, 7), draw.randint(0, 5)
        sources = [base[cursor + i * (width + gap) :][:width] for i in range(count)]
        cursor += count * (width + gap)
        targets = [other[taken + i * width :][:width] for i in range(count)]
        taken += count * width
        if draw.random() < 0.5:
            sources.reverse()
        if draw.random() < 0.3:
            targets.reverse()
        pairs += zip(targets, sources, strict=True)
    if draw.random() < 0.3:
        draw.shuffle(pairs)
    expected = other.clone()
    for target, source in pairs:
        start = target.storage_offset()
        expected[start : start + target.numel()] = source
    copies = StridedCopies(pairs)
    copies()
    assert torch.equal(other, expected) and other.max() >= 0
    assert copies.operations <= len(pairs)
    back = StridedCopies([(source, target) for target, source in pairs])
    whole = base.clone()
    base.zero_()
    back()
    for _, source in pairs:
        start = source.storage_offset()
        assert torch.equal(source, whole[start : start + source.numel()])


def test_a_run_is_one_operation_either_way() -> None:
    base, other = torch.randn(60), torch.zeros(30)
    rows = [base[i * 10 : i * 10 + 5] for i in range(6)]
    for order in (rows, rows[::-1]):
        copies = StridedCopies([(other[i * 5 : i * 5 + 5], row) for i, row in enumerate(order)])
        copies()
        assert copies.operations == 1
        assert torch.equal(other, torch.cat(order))


def test_rows_at_equal_distances_are_one_matrix() -> None:
    base = torch.randn(60)
    rows = [base[i * 10 + 2 : i * 10 + 7] for i in range(6)]
    for order, reverse in ((rows, False), (rows[::-1], True)):
        found = matrix_of(order)
        assert found is not None and found[1] is reverse
        assert torch.equal(found[0].flip(0) if reverse else found[0], torch.stack(order))
        assert found[0].untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    assert matrix_of([rows[0], rows[1], rows[3]]) is None
    assert matrix_of([rows[0], torch.zeros(5)]) is None
    assert matrix_of([base[:5], base[2:7]]) is None  # they overlap

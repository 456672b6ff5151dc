"""Orders: permutations, with and without a table."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from megatron_vp2o.data.shuffle import LARGEST_TABLE, Permutation, mixed, shuffled


def test_a_permutation_of_any_size():
    random = Random(0)
    for size in [1, 2, 3, 4, 5, 16, 17, *(random.randrange(1, 3000) for _ in range(40))]:
        order = Permutation(size, (random.randrange(100), random.randrange(100)))
        items = order.at(np.arange(size, dtype=np.uint64))
        assert sorted(items.tolist()) == list(range(size))
        assert [order[i] for i in range(min(size, 20))] == items[:20].tolist()
        with pytest.raises(IndexError):
            order[size]


def test_permutations_differ_and_look_random():
    size = 20_000
    position = np.arange(size, dtype=np.uint64)
    orders = [Permutation(size, (7, epoch)).at(position).astype(np.int64) for epoch in range(4)]
    assert np.array_equal(orders[0], Permutation(size, (7, 0)).at(position))
    for i, one in enumerate(orders):
        assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < 0.03
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.03
        for other in orders[:i]:
            assert np.mean(one == other) < 5 / size
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


def test_small_orders_are_numpys_and_large_ones_take_no_memory():
    assert shuffled(100, (3, 1))[5] == np.random.default_rng((3, 1)).permutation(100)[5]
    assert isinstance(shuffled(LARGEST_TABLE + 1, (0,)), Permutation)
    huge = shuffled(10**12, (0,))
    assert len({huge[i] for i in range(2000)}) == 2000 and max(huge[i] for i in range(50)) > 10**11


def test_mixing_is_a_bijection_with_even_bits():
    values = np.arange(100_000, dtype=np.uint64)
    out = mixed(values)
    assert len(np.unique(out)) == len(values)
    for bit in range(0, 64, 7):
        assert 0.49 < ((out >> np.uint64(bit)) & np.uint64(1)).mean() < 0.51

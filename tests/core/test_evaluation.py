"""Estimators over samples, against brute force."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations

import pytest

from megatron_vp2o.core.evaluation import answer_entropy, coverage, pass_at_k


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for correct in range(n + 1):
        samples = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            subsets = list(combinations(samples, k))
            want = Fraction(sum(any(subset) for subset in subsets), len(subsets))
            assert pass_at_k(n, correct, k) == pytest.approx(float(want), abs=1e-12)


def test_pass_at_k_is_stable_for_many_samples():
    assert pass_at_k(100_000, 3, 1) == pytest.approx(3e-5, rel=1e-9)
    exact = 1 - Fraction(math.comb(9_900, 500), math.comb(10_000, 500))
    assert pass_at_k(10_000, 100, 500) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2)])
def test_pass_at_k_refuses_impossible_numbers(n, correct, k):
    with pytest.raises(ValueError, match=str(k if k in (0, 5) else correct)):
        pass_at_k(n, correct, k)


def test_coverage():
    assert coverage(3, 12) == 0.25
    assert coverage(0, 5) == 0.0
    for found, solutions in ((4, 3), (0, 0)):
        with pytest.raises(ValueError, match="canonical form"):
            coverage(found, solutions)


def test_answer_entropy():
    assert answer_entropy(Counter(a=4, b=4)) == pytest.approx(math.log(2))
    assert answer_entropy(Counter(a=7)) == 0.0
    assert answer_entropy(Counter(a=1, b=3, c=0)) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert answer_entropy(Counter()) is None
    with pytest.raises(ValueError, match="negative"):
        answer_entropy({"a": -1})

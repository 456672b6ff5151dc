"""Statistics of studies against closed forms, simulation and hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_vp2o.study.statistics import (
    at_accuracy,
    bootstrap,
    expected_distinct,
    front,
    holm,
    paired_difference,
    paired_ratio,
)


def test_the_interval_of_one_seed_is_that_of_a_mean():
    values_SP = np.random.default_rng(0).normal(0.3, 1.0, size=(1, 400))
    found = bootstrap(values_SP)
    half = 1.96 * values_SP.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values_SP.mean())
    assert found.low == pytest.approx(found.mean - half, abs=0.02)
    assert found.high == pytest.approx(found.mean + half, abs=0.02)


def test_intervals_cover_the_truth():
    """Differences between seeds and between problems, both real: 95 % intervals of their mean, in about 95 % of cases."""
    random, covered, narrow = np.random.default_rng(1), 0, 0
    for _ in range(200):
        values_SP = (
            random.normal(0, 0.5, size=(8, 1)) + random.normal(0, 0.5, size=(1, 40)) + random.normal(size=(8, 40))
        )
        found = bootstrap(values_SP, resamples=400)
        covered += found.low <= 0 <= found.high
        flat = values_SP.ravel()
        narrow += abs(flat.mean()) <= 1.96 * flat.std() / math.sqrt(flat.size)
    assert covered >= 170 and narrow < 150, "taking all samples as independent would be far too sure"


def test_pairing_takes_out_what_is_common():
    random = np.random.default_rng(2)
    common_SP = random.normal(0, 5, size=(4, 50))
    ours_SP, theirs_SP = common_SP + 0.2 + random.normal(0, 0.1, size=(4, 50)), common_SP
    found = paired_difference((ours_SP, theirs_SP))
    assert 0.15 < found.low < 0.2 < found.high < 0.25 and found.p < 0.01
    assert paired_difference((theirs_SP, theirs_SP)).p == 1.0
    with pytest.raises(ValueError, match="cannot pair"):
        paired_difference((ours_SP, theirs_SP[:, :9]))


def test_a_ratio_is_that_of_resampled_means():
    """Against a loop over resamples with drawn indices, and where seeds and problems cancel."""
    random = np.random.default_rng(4)
    theirs_SP = random.gamma(2.0, 2.0, size=(6, 1)) * random.gamma(2.0, 1.0, size=(1, 80))
    exact = paired_ratio((2.2 * theirs_SP, theirs_SP))
    assert exact is not None and (exact.mean, exact.low, exact.high) == pytest.approx((2.2, 2.2, 2.2))
    ours_SP = 1.5 * theirs_SP * random.gamma(4.0, 0.25, size=theirs_SP.shape)
    found, drawn = paired_ratio((ours_SP, theirs_SP)), []
    for _ in range(4000):
        s, p = random.integers(0, 6, 6), random.integers(0, 80, 80)
        drawn.append(ours_SP[np.ix_(s, p)].mean() / theirs_SP[np.ix_(s, p)].mean())
    assert found is not None and found.mean == pytest.approx(ours_SP.mean() / theirs_SP.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), rel=0.02)
    same = paired_ratio((theirs_SP, theirs_SP))
    assert found.p < 0.01 and same is not None and same.p == 1.0
    with pytest.raises(ValueError, match="cannot pair"):
        paired_ratio((ours_SP, theirs_SP[:, :9]))


def test_nothing_has_a_ratio_to_no_answers():
    some_SP, none_SP = np.ones((2, 5)), np.zeros((2, 5))
    rare_SP = none_SP.copy()
    rare_SP[0, 0] = 1.0  # not in every resample
    assert [paired_ratio(pair) for pair in ((some_SP, none_SP), (none_SP, some_SP), (some_SP, rare_SP))] == [None] * 3


def test_several_tasks_together():
    """Means of what each task says, with intervals as much narrower as for independent measurements."""
    random = np.random.default_rng(5)
    tasks = [(random.normal(3.0 + t, 1.0, (5, 60 + t)), random.normal(2.0, 0.1, (5, 60 + t))) for t in range(4)]
    each, ratios = [paired_difference(pair) for pair in tasks], [ours.mean() / theirs.mean() for ours, theirs in tasks]
    together, ratio = paired_difference(*tasks), paired_ratio(*tasks)
    assert together.mean == pytest.approx(np.mean([e.mean for e in each]))
    assert ratio is not None and ratio.mean == pytest.approx(math.prod(ratios) ** 0.25)
    width = np.sqrt(np.mean([(e.high - e.low) ** 2 for e in each]) / 4)
    assert together.high - together.low == pytest.approx(width, rel=0.15)


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_front():
    points = {"a": (0.9, 1.0), "b": (0.8, 5.0), "c": (0.8, 4.0), "d": (0.7, 5.0), "e": (0.9, 1.0)}
    assert front(points) == {"a", "b", "e"}


def test_at_accuracy():
    accuracy, distinct = [0.2, 0.4, 0.3, 0.6], [8.0, 6.0, 5.0, 2.0]
    assert at_accuracy(accuracy, distinct, 0.3) == pytest.approx(7.0)
    assert at_accuracy(accuracy, distinct, 0.45) == pytest.approx(3.5)
    assert at_accuracy(accuracy, distinct, 0.1) == 8.0
    assert at_accuracy(accuracy, distinct, 0.7) is None


def test_expected_distinct_is_what_drawing_shows():
    counts, random = [5, 3, 1, 1], np.random.default_rng(3)
    drawn = random.choice(4, p=np.array(counts) / 10, size=(20_000, 6))
    assert expected_distinct(counts, 6) == pytest.approx(np.mean([len(set(row)) for row in drawn]), abs=0.02)
    assert expected_distinct([7], 32) == 1.0

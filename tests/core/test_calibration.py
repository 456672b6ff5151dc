"""The slope of drift over D against weighted least squares by numpy, and what it makes of numbers that say nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_vp2o.core.calibration import LARGEST_DELTA, MIN_PAIRS, Calibration


@pytest.mark.parametrize("seed", range(5))
def test_slope_is_that_of_weighted_least_squares(seed: int) -> None:
    random = np.random.default_rng(seed)
    distances = random.uniform(1e-3, 0.3, size=MIN_PAIRS + int(random.integers(40)))
    drifts = distances * random.uniform(0.5, 8) * random.uniform(0.5, 1.5, size=len(distances))
    decay = float(random.uniform(0.5, 0.99))
    calibration = Calibration(decay=decay)
    for distance, drift in zip(distances, drifts, strict=True):
        calibration.observe(distance, drift)
    root_weight = np.sqrt(decay ** np.arange(len(distances))[::-1])
    (expected,), *_ = np.linalg.lstsq((root_weight * distances)[:, None], root_weight * drifts, rcond=None)
    assert calibration.slope == pytest.approx(expected)
    assert calibration.delta(0.05, 0.1) == pytest.approx(min(0.05 / expected, LARGEST_DELTA))


def test_a_step_at_the_learnt_bound_costs_the_stated_nats() -> None:
    calibration = Calibration()
    for distance in np.linspace(0.01, 0.2, 12):
        calibration.observe(float(distance), 3.7 * float(distance))
    assert 3.7 * calibration.delta(0.05, 0.1) == pytest.approx(0.05)


def test_it_follows_a_slope_that_changes() -> None:
    calibration = Calibration()
    for slope in (2.0, 6.0):
        for _ in range(60):
            calibration.observe(0.1, slope * 0.1)
        assert calibration.slope == pytest.approx(slope, rel=0.02)


def test_pairs_that_say_nothing_are_left_out() -> None:
    calibration = Calibration()
    for pair in ((0.0, 0.3), (math.nan, 0.1), (0.1, math.nan), (math.inf, 0.1), (0.1, math.inf), (-0.1, 0.1)):
        calibration.observe(*pair)
    assert calibration == Calibration() and calibration.delta(0.05, 0.1) == 0.1
    for number in range(MIN_PAIRS):
        assert calibration.slope is None, number
        calibration.observe(0.1, 0.2)
    assert calibration.slope == pytest.approx(2.0)


def test_a_policy_that_did_not_move_leaves_delta_alone_and_no_delta_is_beyond_reach() -> None:
    still, slow = Calibration(), Calibration()
    for _ in range(10):
        still.observe(0.1, 0.0)
        slow.observe(0.1, 1e-6)
    assert still.delta(0.05, 0.1) == 0.1
    assert slow.delta(0.05, 0.1) == LARGEST_DELTA

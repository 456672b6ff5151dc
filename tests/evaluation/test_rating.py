"""Ratings: recovered from simulated solvers within the error that is stated, and simulated contests that agree with Elo's model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_vp2o.errors import DataError
from megatron_vp2o.evaluation.rating import (
    PRIOR_MEAN,
    PRIOR_SD,
    SMALLEST_CONTEST,
    Standings,
    chance,
    contest_rating,
    fit,
    fit_B,
    read_standings,
    simulated_contests,
)


@pytest.mark.parametrize("tries", [1, 4])
def test_true_ratings_are_recovered_within_the_stated_error(tries: int) -> None:
    """Over solvers from 800 to 3000: the standardised errors are a standard normal's, which a wrong error or a bias breaks."""
    random = np.random.default_rng(100)
    errors = []
    for true in np.linspace(800, 3000, 45):
        for _ in range(12):
            difficulty_P = random.choice(np.arange(800, 3501, 100), size=400).astype(float)
            solved_P = random.binomial(tries, chance(true, difficulty_P)) / tries
            rating = fit(difficulty_P, solved_P, np.full(400, float(tries)))
            errors.append((rating.value - true) / rating.error)
    standard = np.array(errors)
    assert abs(standard.mean()) < 4 / math.sqrt(len(standard))
    assert abs(standard.std() - 1) < 4 / math.sqrt(2 * len(standard))
    assert 0.92 < (abs(standard) < 1.96).mean() < 0.98


def test_the_fit_is_the_maximum_of_the_posterior() -> None:
    """Against a grid, written down anew; with tries of several kinds and fractions of them."""
    random = np.random.default_rng(0)
    difficulty, tries = random.uniform(800, 3000, 30), random.integers(1, 9, 30).astype(float)
    solved = random.binomial(tries.astype(int), 0.4) / tries
    grid = np.arange(0, 4000, 0.5)
    log_p = -np.log1p(10 ** ((difficulty[:, None] - grid) / 400))
    log_q = -np.log1p(10 ** ((grid - difficulty[:, None]) / 400))
    density = (tries[:, None] * (solved[:, None] * log_p + (1 - solved[:, None]) * log_q)).sum(0)
    density -= (grid - PRIOR_MEAN) ** 2 / (2 * PRIOR_SD**2)
    assert abs(fit(difficulty, solved, tries).value - grid[density.argmax()]) <= 0.5


def test_nothing_and_everything_solved_have_a_rating() -> None:
    difficulty, tries = np.linspace(800, 3000, 12), np.ones(12)
    low, high = (fit(difficulty, np.full(12, share), tries) for share in (0.0, 1.0))
    assert low.value < 800 < 3000 < high.value
    assert low.error > 100 and high.error > 100
    rows = fit_B(difficulty, np.full(12, 1.0), np.stack([tries, 0 * tries]))
    assert rows[1] == pytest.approx(PRIOR_MEAN, abs=1e-3) and rows[0] == pytest.approx(high.value, abs=1e-3)
    with pytest.raises(ValueError, match="share of solved tries"):
        fit(difficulty, np.full(12, 1.2), tries)


def _contest(random: np.random.Generator, name: str, icpc: bool = False) -> tuple[Standings, np.ndarray]:
    """Participants whose scores come from Elo's model on five problems."""
    rating_R = random.normal(1500, 350, 3000)
    difficulty = np.array([900.0, 1300.0, 1700.0, 2100.0, 2500.0])
    points = np.full(5, 1.0) if icpc else np.array([500.0, 1000.0, 1500.0, 2000.0, 2500.0])
    solved = random.random((3000, 5)) < chance(rating_R[:, None], difficulty[None])
    score_R = solved @ points
    return Standings(name, icpc, dict(zip("ABCDE", points, strict=True)), rating_R, score_R, np.zeros(3000)), difficulty


@pytest.mark.parametrize("icpc", [False, True])
def test_simulated_contests_rate_a_participant_like_the_others(icpc: bool) -> None:
    random = np.random.default_rng(3)
    for true in (1200.0, 1600.0, 2000.0):
        ratings = []
        for n in range(60):
            contest, difficulty = _contest(random, str(n), icpc)
            solved = {
                (str(n), index): [bool(random.random() < chance(true, np.array(d)))]
                for index, d in zip("ABCDE", difficulty, strict=True)
            }
            ratings += list(simulated_contests([contest], solved))
        # a rank says little of one contest with five problems; over many the mean is near, biased as ranks are
        assert abs(np.mean(ratings) - true) < 160, (true, np.mean(ratings))


def test_failed_tries_cost_points_and_unsolved_problems_none() -> None:
    contest, _ = _contest(np.random.default_rng(1), "1")
    at_once = contest_rating(contest, {"A": [True], "B": [True]})
    late = contest_rating(contest, {"A": [False, False, True], "B": [True]})
    failed = contest_rating(contest, {"A": [True], "B": [True], "C": [False] * 5})
    assert late < at_once == failed
    expected = 1 + chance(contest.rating_R, np.array(at_once)).sum()
    assert expected == pytest.approx(1 + (contest.score_R > 1500).sum() + (contest.score_R == 1500).sum() / 2, abs=1e-3)


def test_standings_are_read_small_ones_left_out_and_damaged_ones_named(tmp_path: Path) -> None:
    rows = [{"rating": 1500 + i, "points": i, "penalty": 0} for i in range(SMALLEST_CONTEST)]
    good = {"contest": 12, "type": "CF", "problems": [{"index": "A", "points": 500}], "rows": rows}
    (tmp_path / "12.json").write_text(json.dumps(good))
    (tmp_path / "13.json").write_text(json.dumps({**good, "rows": rows[1:]}))
    (found,) = read_standings(tmp_path)
    assert found.contest == "12" and len(found.rating_R) == SMALLEST_CONTEST and not found.icpc
    (tmp_path / "14.json").write_text('{"contest": 1}')
    with pytest.raises(DataError, match=r"14\.json is no cached standings"):
        read_standings(tmp_path)

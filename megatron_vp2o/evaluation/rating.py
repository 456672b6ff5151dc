"""Codeforces ratings of a solver: by maximum likelihood over problem ratings, and by simulated contests.

A solver of rating R solves a problem of rating d with probability 1 / (1 + 10^((d - R) / 400)), Elo's model, which
Codeforces uses to rate problems. Both definitions below are in public code for language models; the paper says neither which
one nor which problems it used.

Shape legend: P problems, B bootstrap resamples, C contests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_vp2o.errors import DataError

Array = NDArray[np.float64]

SCALE = math.log(10.0) / 400.0
PRIOR_MEAN, PRIOR_SD = 1500.0, 1000.0
"""A weak normal prior: it decides only where none or all is solved, and moves a rating from 400 problems by 2 points at most."""
LOWEST, HIGHEST = -3000.0, 7000.0
FAILED_TRY_POINTS = 50.0
FAILED_TRY_MINUTES = 20.0
SMALLEST_CONTEST = 200
"""Standings with fewer rows are no measure of a rating, and are left out."""


@dataclass(frozen=True)
class Rating:
    """A rating and its standard error, from the curvature of the posterior."""

    value: float
    error: float


def chance(rating: Array | float, difficulty: Array) -> Array:
    """Probability of solving a problem."""
    return 1.0 / (1.0 + np.exp(np.clip((difficulty - rating) * SCALE, -700, 700)))


def fit_B(difficulty_P: Array, solved_P: Array, tries_BP: Array) -> Array:
    """Most likely ratings under the prior, by bisection: the derivative of the posterior falls in the rating.

    Args:
        difficulty_P: ratings of the problems.
        solved_P: share of tries that solved each problem.
        tries_BP: tries of each problem; rows are fitted one by one.

    Returns:
        ratings [B].
    """
    low_B = np.full(len(tries_BP), LOWEST)
    high_B = np.full(len(tries_BP), HIGHEST)
    for _ in range(44):  # 10,000 points to below 1e-9
        middle_B = (low_B + high_B) / 2
        excess_B = (tries_BP * (solved_P - chance(middle_B[:, None], difficulty_P))).sum(axis=1) * SCALE
        slope_B = excess_B - (middle_B - PRIOR_MEAN) / PRIOR_SD**2
        low_B = np.where(slope_B > 0, middle_B, low_B)
        high_B = np.where(slope_B > 0, high_B, middle_B)
    return (low_B + high_B) / 2


def fit(difficulty_P: Array, solved_P: Array, tries_P: Array) -> Rating:
    """The most likely rating and its standard error.

    Raises:
        ValueError: no problems, or shares outside of 0 to 1.
    """
    if not len(difficulty_P) or not ((solved_P >= 0) & (solved_P <= 1)).all():
        raise ValueError("a rating needs problems, and a share of solved tries between 0 and 1 for each")
    value = float(fit_B(difficulty_P, solved_P, tries_P[None])[0])
    p_P = chance(value, difficulty_P)
    information = SCALE**2 * float((tries_P * p_P * (1 - p_P)).sum()) + 1 / PRIOR_SD**2
    return Rating(value, information**-0.5)


@dataclass(frozen=True)
class Standings:
    """A contest as it was: what its participants were rated before it, and what they scored."""

    contest: str
    icpc: bool
    """Problems solved, then penalty (ICPC), instead of points."""
    points: Mapping[str, float]
    """What each problem is worth, by index; 1 where they are worth the same."""
    rating_R: Array
    score_R: Array
    penalty_R: Array


def read_standings(folder: Path) -> list[Standings]:
    """Cached standings: one `CONTEST.json` for each contest.

    {"contest": "1234", "type": "CF" | "ICPC", "problems": [{"index": "A", "points": 500}, ...],
     "rows": [{"rating": 1512, "points": 1500, "penalty": 0}, ...]}

    Raises:
        DataError: a file that is not of this kind.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = content["rows"]
            columns = [np.array([float(row.get(key, 0.0)) for row in rows]) for key in ("rating", "points", "penalty")]
            points = {str(p["index"]): float(p.get("points") or 1.0) for p in content["problems"]}
            standings = Standings(str(content["contest"]), content["type"] == "ICPC", points, *columns)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no cached standings ({type(error).__name__}: {error})") from error
        if len(rows) >= SMALLEST_CONTEST:
            found.append(standings)
    return found


def contest_rating(standings: Standings, tries: Mapping[str, Sequence[bool]]) -> float:
    """The rating whose expected rank among the participants is the rank that these tries would have had.

    A problem counts from its first try that solved it; each failed one before it costs 50 points, or 20 minutes of
    penalty. Half of those with the same score count as better: with few problems they are many. The expected rank of R is
    1 + sum 1 / (1 + 10^((R - r_j) / 400)).

    Args:
        tries: for each problem's index, whether each try solved it, in order.
    """
    score, penalty = 0.0, 0.0
    for index, results in tries.items():
        if True not in results:
            continue
        failed = list(results).index(True)
        if standings.icpc:
            score, penalty = score + 1, penalty + FAILED_TRY_MINUTES * failed
        else:
            score += max(standings.points.get(index, 0.0) - FAILED_TRY_POINTS * failed, 0.0)
    better, same = standings.score_R > score, standings.score_R == score
    if standings.icpc:
        better |= same & (standings.penalty_R < penalty)
        same &= standings.penalty_R == penalty
    rank = 1 + float(better.sum()) + float(same.sum()) / 2
    low, high = LOWEST, HIGHEST
    for _ in range(44):
        middle = (low + high) / 2
        expected = 1 + float(chance(standings.rating_R, np.array(middle)).sum())
        low, high = (middle, high) if expected > rank else (low, middle)
    return (low + high) / 2


def simulated_contests(standings: Sequence[Standings], solved: Mapping[tuple[str, str], Sequence[bool]]) -> Array:
    """Ratings of the contests of which problems were tried, [C].

    Args:
        solved: by contest and index, whether each try solved the problem.
    """
    ratings = []
    for one in standings:
        tries = {index: results for (contest, index), results in solved.items() if contest == one.contest}
        if tries:
            ratings.append(contest_rating(one, tries))
    return np.array(ratings)

"""Comparing variants: paired bootstrap over seeds and problems, Holm's correction, fronts, accuracy-matched differences.

Shape legend: S seeds, P problems (the same ones, in the same order, for every seed and variant).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, and a two-sided bootstrap p-value against 0 (differences only)."""

    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values_SP: Array, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean of values by seed and problem, with a percentile interval from resampling seeds and problems, each as a whole.

    Seeds and problems are crossed, so both are drawn with replacement, and a problem keeps its values over seeds together. With
    one seed the interval is over problems only, and says nothing of other seeds.

    Raises:
        ValueError: for nothing.
    """
    return _estimate(float(values_SP.mean()), _resampled_means_R(values_SP, seed, resamples))


def _resampled_means_R(values_SP: Array, seed: int = 0, resamples: int = RESAMPLES) -> Array:
    """Means of R resamples. The same seed draws the same resamples of arrays that have the same shape, which pairs them."""
    seeds, problems = values_SP.shape
    if not values_SP.size:
        raise ValueError("no values to estimate a mean from")
    weights_RS, weights_RP = _weights(seeds, problems, seed, resamples)
    means_R: Array = np.einsum("rs,sp,rp->r", weights_RS, values_SP, weights_RP, optimize=True)
    return means_R


@lru_cache(maxsize=16)
def _weights(seeds: int, problems: int, seed: int, resamples: int) -> tuple[Array, Array]:
    """How much each seed and each problem counts in each resample. Drawn once for all comparisons of a table: it takes longer than
    the rest of them."""
    random = np.random.default_rng(seed)
    weights_RS = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    weights_RP = random.multinomial(problems, np.full(problems, 1 / problems), size=resamples) / problems
    return weights_RS, weights_RP


def bootstrap_over_problems(
    statistic: Callable[[Array], Array],
    problems: int,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    together: int = 250,
) -> Estimate:
    """Any statistic of weighted problems, with a percentile interval from resampling problems. The same seed and number of problems
    draw the same resamples: a difference of two statistics in one function is paired.

    Args:
        statistic: from how often each problem counts, [R, P], to values [R].
        together: resamples in one call, which bounds memory.

    Raises:
        ValueError: there are no problems.
    """
    if problems < 1:
        raise ValueError("no problems to resample")
    draws = [
        statistic(weights_RP.astype(np.float64)) for weights_RP in _problem_weights(problems, seed, resamples, together)
    ]
    return _estimate(float(statistic(np.ones((1, problems)))[0]), np.concatenate(draws))


@lru_cache(maxsize=8)
def _problem_weights(problems: int, seed: int, resamples: int, together: int) -> list[NDArray[np.uint16]]:
    """How often each problem is in each resample, in pieces of `together` resamples. Drawn once for all metrics of a table."""
    random = np.random.default_rng(seed)
    pieces = []
    for first in range(0, resamples, together):
        rows = min(together, resamples - first)
        chosen_RP = random.integers(0, problems, size=(rows, problems)) + np.arange(rows)[:, None] * problems
        counts = np.bincount(chosen_RP.ravel(), minlength=rows * problems)
        pieces.append(counts.reshape(rows, problems).astype(np.uint16))
    return pieces


def _estimate(value: float, draws: Array) -> Estimate:
    """A value with the percentile interval and p-value of its resamples."""
    low, high = np.quantile(draws, [0.025, 0.975])
    # at least one in the tail: no p-value of 0 from a finite number of resamples
    tail = (1 + min((draws <= 0).sum(), (draws >= 0).sum())) / (len(draws) + 1)
    return Estimate(value, float(low), float(high), float(min(1.0, 2 * tail)))


def paired_difference(*pairs: tuple[Array, Array], seed: int = 0) -> Estimate:
    """Mean of ours minus theirs, paired by seed and problem; of several tasks, the mean of their differences.

    Args:
        pairs: (ours_SP, theirs_SP), one a task. Tasks are resampled independently of each other, and each of them always counts.

    Raises:
        ValueError: the two of a pair have not the same shape.
    """
    _check_shapes(pairs)
    differences = [ours_SP - theirs_SP for ours_SP, theirs_SP in pairs]
    draws_R = np.mean([_resampled_means_R(d, seed + task) for task, d in enumerate(differences)], axis=0)
    return _estimate(float(np.mean([d.mean() for d in differences])), draws_R)


def paired_ratio(*pairs: tuple[Array, Array], seed: int = 0) -> Estimate | None:
    """Mean of ours over mean of theirs, as `paired_difference`; of several tasks, the geometric mean of their ratios.

    Its p-value is against 1. None where one of the means, or a resample of it, is 0.

    Raises:
        ValueError: the two of a pair have not the same shape.
    """
    _check_shapes(pairs)
    logs_TR = []
    for task, pair in enumerate(pairs):
        means_2R = np.stack(  # what was measured first, then the resamples
            [np.append(values_SP.mean(), _resampled_means_R(values_SP, seed + task)) for values_SP in pair]
        )
        if not (means_2R > 0).all():
            return None
        logs_TR.append(np.log(means_2R[0] / means_2R[1]))
    logs_R = np.mean(logs_TR, axis=0)
    found = _estimate(float(logs_R[0]), logs_R[1:])
    return Estimate(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.p)


def _check_shapes(pairs: Sequence[tuple[Array, Array]]) -> None:
    for ours_SP, theirs_SP in pairs:
        if ours_SP.shape != theirs_SP.shape:
            raise ValueError(f"cannot pair {ours_SP.shape} seeds and problems with {theirs_SP.shape}")


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number (Holm 1979): reject those below 0.05, and one error among them stays below 0.05."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for i, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - i) * p))
        corrected[name] = largest
    return corrected


def front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Names that no other is at least as good as in both coordinates and better in one."""
    return {
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a > x or b > y) for other, (a, b) in points.items() if other != name)
    }


def at_accuracy(accuracy: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """A metric where a run's accuracy first reaches `level`, between its evaluations by straight lines; None if never.

    Args:
        accuracy: of the run's evaluations, in order.
        values: the metric at the same evaluations.
    """
    if accuracy and accuracy[0] >= level:
        return values[0]
    for i in range(1, len(accuracy)):
        if accuracy[i] >= level:
            share = (level - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
            return values[i - 1] + share * (values[i] - values[i - 1])
    return None


def expected_distinct(counts: Sequence[int], draws: int) -> float:
    """Different answers expected among `draws` draws, with replacement, from the frequencies of a sample.

    From the warm-up's right answers this is what its own distribution, given that the answer is right, would show: the ceiling of
    every method whose target keeps the ratios between right answers. Answers that the sample missed are missed here too, so
    it is a lower bound of the ceiling.
    """
    total = sum(counts)
    return sum(1.0 - (1.0 - count / total) ** draws for count in counts)

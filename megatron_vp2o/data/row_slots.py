"""Which rank trains on which row, and in which of its micro-batches: rows packed up to a budget of tokens, ranks alike in cost.

Shape legend: R rows of all ranks, M micro-batches of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Slots:
    """Where each row goes."""

    rank_R: np.ndarray
    slot_R: np.ndarray
    """Number of the micro-batch among its rank's, below `count`."""
    count: int
    """M, the same for all ranks; some may have no row."""


def row_slots(length_R: np.ndarray, *, budget: int, ranks: int = 1, quadratic: float = 0.0, at_least: int = 1) -> Slots:
    """Deal rows to the micro-batches of all ranks, longest first, each to the cheapest that has room.

    A row longer than the budget gets a micro-batch of its own. The result depends on the arguments alone.

    Args:
        length_R: tokens of each row.
        budget: tokens of a micro-batch.
        ranks: that share the rows.
        quadratic: a row of n tokens costs n + quadratic n^2.
        at_least: smallest number of micro-batches of a rank.

    Example:
        >>> slots = row_slots(np.array([5, 3, 9, 2]), budget=8)
        >>> slots.slot_R.tolist(), slots.count
        ([1, 1, 0, 2], 3)
    """
    within = length_R[length_R <= budget]
    beyond = len(length_R) - len(within)
    halves = beyond + int((2 * within > budget).sum())  # no two of them go together
    full = beyond + -(-int(within.sum()) // budget)
    count = max(at_least, 1, -(-halves // ranks), -(-full // ranks))
    order = np.argsort(-length_R, kind="stable")
    cost_R = length_R + quadratic * length_R.astype(float) ** 2
    while (place_R := deal(length_R, cost_R, order, budget, ranks * count)) is None:
        count += 1
    return Slots(place_R % ranks, place_R // ranks, count)


def deal(tokens_R: np.ndarray, cost_R: np.ndarray, order: np.ndarray, budget: int, places: int) -> np.ndarray | None:
    """The place of each item, given in that order to the cheapest place that has room; None where one finds none.

    An item of more tokens than the budget goes to a place without another one.
    """
    place_R = np.zeros(len(tokens_R), dtype=np.int64)
    tokens, cost = np.zeros(places, dtype=np.int64), np.zeros(places)
    for row in order:
        length = int(tokens_R[row])
        free = (tokens + length <= budget) | (tokens == 0)
        place = int(np.where(free, cost, np.inf).argmin())
        if not free[place]:
            return None
        place_R[row] = place
        tokens[place] += length
        cost[place] += cost_R[row]
    return place_R

"""Which rank trains on which row where rows of a group share their prompt: groups packed up to a budget of tokens, ranks alike
in cost.

Shape legend: R rows of all ranks, F families (rows that begin with the same prefix), C pieces of families, M micro-batches of one
rank.
"""

from __future__ import annotations

import numpy as np

from megatron_vp2o.data.row_slots import Slots, deal

SHARED_FROM = 10 / 9
"""Unless asked to always do so, prompts are shared where all rows have so many times the tokens that are left if they are."""


def families(prefix_R: np.ndarray, key_R: np.ndarray) -> np.ndarray:
    """A number for each row, from 0 on, that two rows share if they have the same prefix.

    Args:
        prefix_R: length of each row's prefix.
        key_R: what stands for its contents.

    Example:
        >>> families(np.array([2, 3, 2]), np.array([7, 7, 7])).tolist()
        [0, 1, 0]
    """
    pairs = np.stack([prefix_R, key_R], axis=1)
    _, first, inverse = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))  # in the order in which they come
    return rank[inverse.reshape(-1)]


def shared_tokens(length_R: np.ndarray, prefix_R: np.ndarray, family_R: np.ndarray) -> int:
    """Tokens of all rows if each family's prefix is there once.

    Example:
        >>> shared_tokens(np.array([5, 6]), np.array([4, 4]), np.array([0, 0]))
        7
    """
    _, first = np.unique(family_R, return_index=True)
    return int((length_R - prefix_R).sum() + prefix_R[first].sum())


def prefix_slots(
    length_R: np.ndarray,
    prefix_R: np.ndarray,
    family_R: np.ndarray,
    *,
    budget: int,
    ranks: int = 1,
    quadratic: float = 0.0,
) -> Slots:
    """Deal families to the micro-batches of all ranks, whole where they fit, the costliest first, each to the cheapest that has
    room.

    A family that is longer than the budget is cut into pieces, each with its own copy of the prefix; so is one that would
    keep a rank busy while others wait. A row that is longer than the budget has a micro-batch of its own. The result
    depends on the arguments alone.

    Args:
        length_R: tokens of each row, its prefix included.
        prefix_R: tokens of its prefix; the same for all rows of a family.
        family_R: number of its family.
        budget: tokens of a micro-batch, each prefix counted once.
        ranks: that share the rows.
        quadratic: a token costs 1 + 2 quadratic times the tokens that it attends to, on average.

    Example:
        >>> slots = prefix_slots(np.array([5, 6, 5]), np.array([4, 4, 4]), np.array([0, 0, 1]), budget=8)
        >>> slots.slot_R.tolist(), slots.count
        ([0, 0, 1], 2)
    """
    if not len(length_R):
        return Slots(np.zeros(0, np.int64), np.zeros(0, np.int64), 1)
    even = -(-shared_tokens(length_R, prefix_R, family_R) // ranks)  # what a rank would have
    bounds = {budget, *(min(budget, max(1, even // parts)) for parts in (1, 2, 4) if ranks > 1)}
    found = [_dealt(length_R, prefix_R, family_R, bound, budget, ranks, quadratic) for bound in sorted(bounds)]
    return min(reversed(found), key=lambda one: one[0])[1]  # of equals the one that cuts least


def _dealt(
    length_R: np.ndarray,
    prefix_R: np.ndarray,
    family_R: np.ndarray,
    bound: int,
    budget: int,
    ranks: int,
    quadratic: float,
) -> tuple[float, Slots]:
    """How long the slowest ranks take for their micro-batches, one after the other, and the slots."""
    piece_R = _pieces(length_R, prefix_R, family_R, bound)
    _, first_C = np.unique(piece_R, return_index=True)
    own_R, prefix_C = length_R - prefix_R, prefix_R[first_C]
    tokens_C = prefix_C + np.bincount(piece_R, weights=own_R).astype(np.int64)
    pairs_C = prefix_C.astype(float) ** 2 + np.bincount(piece_R, weights=own_R * (own_R + 2.0 * prefix_R))
    cost_C = tokens_C + quadratic * pairs_C
    order = np.argsort(-cost_C, kind="stable")
    count = max(1, -(-int(np.minimum(tokens_C, budget).sum()) // (budget * ranks)))
    while (place_C := deal(tokens_C, cost_C, order, budget, ranks * count)) is None:
        count += 1
    cost = np.bincount(place_C, weights=cost_C, minlength=ranks * count).reshape(count, ranks)
    place_R = place_C[piece_R]
    return float(cost.max(axis=1).sum()), Slots(place_R % ranks, place_R // ranks, count)


def _pieces(length_R: np.ndarray, prefix_R: np.ndarray, family_R: np.ndarray, bound: int) -> np.ndarray:
    """A number for each row, from 0 on: the piece of its family that it is in, of at most `bound` tokens or one row."""
    own_R = length_R - prefix_R
    order = np.lexsort((-own_R, family_R))  # within a family the longest first, so that alike ones stay together
    piece_R = np.empty(len(length_R), dtype=np.int64)
    piece, family, tokens = -1, -1, 0
    for row in order.tolist():
        own = int(own_R[row])
        if family_R[row] != family or tokens + own > bound:
            piece, family, tokens = piece + 1, int(family_R[row]), int(prefix_R[row])
        tokens += own
        piece_R[row] = piece
    return piece_R

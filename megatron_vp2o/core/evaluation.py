"""What n samples of one problem say about accuracy and diversity. Plain numbers in, plain numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, from n samples of which `correct` were.

    `1 - C(n - c, k) / C(n, k)` as `1 - prod_{i = n-c+1..n} (1 - k / i)`, which neither overflows nor cancels.

    Raises:
        ValueError: unless 1 <= k <= n and 0 <= correct <= n.

    References:
        Chen et al., arXiv 2107.03374, equation 1 and figure 3.

    Example:
        >>> pass_at_k(n=4, correct=1, k=2)  # 3 of the 6 pairs contain the right one
        0.5
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples: k must be between 1 and {n}")
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} right answers among {n} samples is impossible")
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def coverage(distinct_right: int, n_solutions: int) -> float:
    """Fraction of a problem's right answers that were found.

    Raises:
        ValueError: if more were found than there are: verifier and solution count disagree on what is distinct.

    Example:
        >>> coverage(1, 4)
        0.25
    """
    if not 0 <= distinct_right <= n_solutions or n_solutions == 0:
        raise ValueError(
            f"{distinct_right} distinct right answers for a problem with {n_solutions}: the task's canonical form and "
            "its count of solutions disagree"
        )
    return distinct_right / n_solutions


def answer_entropy(counts: Mapping[Any, int]) -> float | None:
    """Entropy (nats) of the empirical distribution over canonical right answers; None without any right answer.

    Average it over solved problems only: counting unsolved ones as 0 would mix accuracy into diversity. It is the
    plug-in estimate, at most log(number of right samples), so compare runs at equal n.

    Args:
        counts: canonical form -> how many samples gave it (a Counter).

    Raises:
        ValueError: for a negative count.

    Example:
        >>> round(math.exp(answer_entropy({"8 * 3": 2, "6 * 4": 2})), 6)  # as many as 2 answers given alike
        2.0
    """
    if any(count < 0 for count in counts.values()):
        raise ValueError(f"counts of answers must not be negative: {dict(counts)}")
    total = sum(counts.values())
    if total == 0:
        return None
    return math.fsum(c / total * math.log(total / c) for c in counts.values() if c > 0)

"""What one reward says of one response; light enough for worker processes, which import no torch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

TIME, MEMORY, CRASH = "time limit of the reward", "memory limit of the reward", "crash of the reward"
"""Reasons of answers that could not be graded within the limits; they are worth 0."""


@dataclass(frozen=True)
class Grade:
    """What a reward says of one response. Fields as those of `rl.types.RewardResult`."""

    reward: float
    reason: str = ""
    canonical: Hashable | None = None
    correct: bool | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


class RowError(Exception):
    """A row that a reward cannot work with, whatever the response is; the message says why."""


def right(canonical: Hashable | None) -> Grade:
    """A right answer."""
    return Grade(1.0, "", canonical, True)


def wrong(reason: str) -> Grade:
    """A wrong answer."""
    return Grade(0.0, reason, None, False)


def as_grade(value: Any) -> Grade:
    """What a user's function returned for one response: a number, a truth value, a mapping, or an object with `reward`.

    Raises:
        RowError: it is none of these, or the reward is not a finite number.
    """
    if isinstance(value, Mapping):
        unknown = value.keys() - Grade.__dataclass_fields__.keys()
        if unknown or "reward" not in value:
            raise RowError(
                f"a mapping with the keys {', '.join(map(str, value))} is no result: it needs `reward`, and may have "
                "reason, canonical, correct, parts"
            )
        return as_grade(Grade(**value))
    if not hasattr(value, "reward"):
        return Grade(_number(value))
    return Grade(
        _number(value.reward),
        str(getattr(value, "reason", "")),
        _canonical(getattr(value, "canonical", None)),
        getattr(value, "correct", None),
        {str(name): _number(part) for name, part in getattr(value, "parts", {}).items()},
    )


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RowError(
            f"{value!r:.80} of type {type(value).__name__} is no reward: return a number or a result"
        ) from None
    if not math.isfinite(number):
        raise RowError(f"the reward {number} is not finite")
    return number


def _canonical(value: Any) -> Hashable | None:
    if isinstance(value, list | tuple):
        return tuple(map(_canonical, value))
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise RowError(f"canonical={value!r:.80} of type {type(value).__name__}: use text, numbers or tuples of them")

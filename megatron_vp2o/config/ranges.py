"""Ranges of single settings. A number's range stands in its annotation, beside its default and its documentation:
`lr: Annotated[float, Range(1e-12, 10)] = 1e-3`. `validate` checks ranges before it looks at combinations.

Bounds are wide: what lies outside cannot work (it overflows float32, allocates terabytes, or never ends). That a value is
wise is not claimed.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Allowed values of a number; a bound in `open_ends` ("low", "high") is itself excluded. None is always allowed, and so
    is what stands in `also`."""

    low: float = -math.inf
    high: float = math.inf
    open_ends: tuple[str, ...] = ()
    also: tuple[float, ...] = ()

    def __contains__(self, value: float | None) -> bool:
        if value is None or value in self.also:
            return True
        above = value > self.low if "low" in self.open_ends else value >= self.low
        below = value < self.high if "high" in self.open_ends else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{'above' if 'low' in self.open_ends else 'at least'} {plain(self.low)}" if self.low > -math.inf else ""
        high = (
            f"{'below' if 'high' in self.open_ends else 'at most'} {plain(self.high)}" if self.high < math.inf else ""
        )
        between = " and ".join(part for part in (low, high) if part)
        return " or ".join([*map(plain, self.also), between])


def plain(number: float) -> str:
    """A bound as a person writes it: 2147483647, 0.001, 1e-12."""
    return str(int(number)) if float(number).is_integer() and abs(number) < 1e12 else f"{number:g}"


SEED = Range(0, 2**31 - 1)
COUNT = Range(1, 10**9)
INDEX = Range(0, 10**9)
WIDTH = Range(1, 2**20)
COEFFICIENT = Range(1e-12, 10**6, also=(0,))
SHARE = Range(1e-6, 1)
DECAY = Range(1e-6, 1, open_ends=("high",), also=(0,))


def range_of(hint: Any) -> Range | None:
    """The Range in an annotation, if there is one."""
    return next((part for part in get_args(hint)[1:] if isinstance(part, Range)), None) if is_annotated(hint) else None


def is_annotated(hint: Any) -> bool:
    return get_origin(hint) is Annotated


def numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, float | None, Range | None]]:
    """Dotted name, value and range of every number in a tree of dataclasses; of a list, each of its numbers."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{name}.")
        elif is_number(hint):
            allowed = range_of(hint)
            if isinstance(value, list):
                yield from ((f"{name}[{i}]", item, allowed) for i, item in enumerate(value))
            else:
                yield name, value, allowed


def range_problems(config: Any, prefix: str = "") -> Iterator[str]:
    """One line for each number outside of its range."""
    for name, value, allowed in numbers(config, prefix):
        # OmegaConf lets a list of numbers hold lists and texts.
        if not isinstance(value, int | float) and (value is not None or name.endswith("]")):
            yield f"{name}={_short(value)} must be a number"
        elif allowed is not None and value not in allowed:
            yield f"{name}={_short(value)} must be {allowed}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def is_number(hint: Any) -> bool:
    """Whether a field of this type holds numbers: int, float, their Optional, a list of them."""
    if is_annotated(hint):
        return is_number(get_args(hint)[0])
    return hint in (int, float) or any(is_number(part) for part in get_args(hint))


def as_yaml(value: object) -> str:
    """A setting's value as a recipe has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value.name if isinstance(value, enum.Enum) else str(value)

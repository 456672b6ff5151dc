"""What a change to megatron.core is, and how a function of it is replaced.

Line numbers are of megatron/core in 0.16.1 and in 0.19.2.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """A line of megatron/core that a patch is about: file, number in 0.16.1 and in 0.19.2 (None: not there), text."""

    file: str
    line_0_16_1: int | None
    line_0_19_2: int | None
    text: str


@dataclass(frozen=True)
class Patch:
    """One change to megatron.core.

    Attributes:
        name: as `enable_cpu` and `prepare` report it.
        why: what goes wrong without it.
        until: the condition that retires it.
        targets: what is replaced, "module:attribute.path".
        sites: the lines that make it necessary.
        apply: makes the change. Once.
        needed: tests what of `until` can be tested; the patch is not applied where it returns False.
    """

    name: str
    why: str
    until: str
    targets: tuple[str, ...]
    sites: tuple[Site, ...]
    apply: Callable[[], None]
    needed: Callable[[], bool] = lambda: True


def in_place_of(original: Callable[..., T]) -> Callable[[Callable[[inspect.BoundArguments], T]], Callable[..., T]]:
    """Make a replacement of a function out of one that gets the whole call: every argument by name, defaults as well.

    Example:
        >>> @in_place_of(lambda tokens, scale=2: tokens * scale)
        ... def twice(call):
        ...     return 2 * call.arguments["tokens"] * call.arguments["scale"]
        >>> twice(3)
        12
    """
    signature = inspect.signature(original)

    def make(replacement: Callable[[inspect.BoundArguments], T]) -> Callable[..., T]:
        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> T:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            return replacement(call)

        return replaced

    return make

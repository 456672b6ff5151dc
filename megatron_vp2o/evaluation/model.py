"""What is evaluated: something that answers prompts. The embedded engine and an endpoint implement it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_vp2o.errors import ConfigError

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Response:
    """One answer, thinking and solution apart."""

    text: str
    solution: str
    thinking_tokens: int
    solution_tokens: int
    truncated: bool
    """Ended by the length limit."""


class Model(Protocol):
    """One checkpoint, or an endpoint."""

    label: str
    step: int
    own_numbers: bool
    """Whether what is drawn depends on what else is in the batch in the last bit: then a batch that was cut off is drawn
    again as a whole, so that an interruption changes nothing."""

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from another: part of each header."""
        ...

    def check(self, prompts: Sequence[str], length: int) -> None:
        """Raise a ConfigError that names the first prompt that cannot be answered with so many new tokens."""
        ...

    def generate(self, prompts: Sequence[str], uids: Sequence[int], sampling: Sampling) -> list[Response]:
        """One answer for each prompt. `uids` number samples for good: they fix the random numbers, where the model takes any."""
        ...


@dataclass(frozen=True)
class Named:
    """What a command line says of a model: `[LABEL[@LENGTH]=]PLACE`."""

    label: str
    length: int | None
    place: str


def named(text: str) -> Named:
    """Read `runs/x`, `vp2o=runs/x`, `vp2o@16k=runs/x`, `server=http://host:8000/v1#model`.

    Raises:
        ConfigError: the label is no name for a folder, or the length no length.
    """
    head, equals, place = text.partition("=")
    if not equals or "/" in head or "#" in head:
        place, head = text, ""
    label, at, length = head.partition("@")
    label = label or re.sub(r"[^A-Za-z0-9._+-]+", "_", place.rstrip("/").split("#")[-1].split("/")[-1]).strip("_.")
    if not LABEL.fullmatch(label):
        raise ConfigError(f"{text!r}: {label!r} is no label: letters, digits and . _ + - , as in vp2o=runs/x")
    if not place:
        raise ConfigError(f"{text!r} names no model: LABEL=FOLDER, or LABEL=http://host:port/v1#MODEL")
    return Named(label, token_count(length) if at else None, place)


def token_count(text: str) -> int:
    """`8k` is 8192, `512` is 512.

    Raises:
        ConfigError: it is neither.
    """
    match = re.fullmatch(r"(\d+)([kK]?)", text.strip())
    count = int(match[1]) * (1024 if match[2] else 1) if match else 0
    if not 1 <= count <= 2**20:
        raise ConfigError(f"length {text!r}: a number of tokens from 1 to {2**20}, or of thousands (1024) as in 8k")
    return count


def shown_length(tokens: int) -> str:
    """8192 as 8K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)

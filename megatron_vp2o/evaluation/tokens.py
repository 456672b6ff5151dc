"""Thinking and solution apart: `<think>...</think>`, and the channels of the harmony format (GPT-OSS)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

THINK, THINK_END = "<think>", "</think>"
_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*<\|message\|>")
_CHANNEL = "<|channel|>"
_ENDS = re.compile(r"(?:<\|(?:end|return|call)\|>|<\|start\|>).*\Z", re.DOTALL)


@dataclass(frozen=True)
class Parts:
    """A response in two. Where thinking never ended, there is no solution."""

    thinking: str
    solution: str
    start: int
    """Characters before the solution, marks of the format included."""


def split(response: str, *, opened: bool = False) -> Parts:
    """A response's thinking and solution.

    Args:
        opened: whether the prompt already opens the thinking, as some chat templates do.
    """
    if _CHANNEL in response:
        return _harmony(response)
    end = response.rfind(THINK_END)
    if end >= 0:
        start = end + len(THINK_END)
        return Parts(response[:end].replace(THINK, "", 1), response[start:], start)
    if opened or response.lstrip().startswith(THINK):
        return Parts(response.replace(THINK, "", 1), "", len(response))
    return Parts("", response, 0)


def _harmony(response: str) -> Parts:
    finals = list(_FINAL.finditer(response))
    if not finals:
        return Parts(response, "", len(response))
    start = finals[-1].end()
    return Parts(response[: finals[-1].start()], _ENDS.sub("", response[start:]), start)


def tokens_before(ids: Sequence[int], start: int, decode: Callable[[Sequence[int]], str]) -> int:
    """The least number of tokens whose text has at least `start` characters: what the thinking takes of a response.

    Decodes O(log n) prefixes.
    """
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if len(decode(ids[:middle])) >= start:
            high = middle
        else:
            low = middle + 1
    return low

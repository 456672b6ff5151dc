"""Rewards that look at the text itself: exact, regex, format, length."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_vp2o.config.reward import ExactConfig, FormatConfig, LengthConfig, RegexConfig
from megatron_vp2o.rewards.grade import Grade, RowError, right, wrong
from megatron_vp2o.rewards.graders.base import Grader, answer_of, answer_text

THINK_END = "</think>"


def solution(response: str) -> str:
    """What comes after the thinking, where the response thinks in <think>...</think>."""
    return response.rpartition(THINK_END)[2]


class Exact(Grader):
    """The response, after its thinking, is one of the row's answers."""

    def __init__(self, config: ExactConfig) -> None:
        self._config = config

    def grade(self, prompt: str, response: str, row: Mapping[str, Any]) -> Grade:
        answer = answer_of(row)
        answers = answer if isinstance(answer, list | tuple) else [answer]
        written = self._normal(solution(response))
        return right(written) if written in {self._normal(str(one)) for one in answers} else wrong("another text")

    def _normal(self, text: str) -> str:
        text = " ".join(text.split()) if self._config.ignore_space else text
        return text.casefold() if self._config.ignore_case else text


class Regex(Grader):
    """The last match of a pattern in the response is the row's answer (or what the pattern finds in that)."""

    def __init__(self, config: RegexConfig) -> None:
        self._pattern = re.compile(config.pattern)

    def grade(self, prompt: str, response: str, row: Mapping[str, Any]) -> Grade:
        answer = answer_text(row)
        found = self._find(response)
        if found is None:
            return wrong("no match")
        wanted = self._find(answer)
        return right(found) if found == (answer if wanted is None else wanted) else wrong("another answer")

    def _find(self, text: str) -> str | None:
        matches = list(self._pattern.finditer(text))
        if not matches:
            return None
        groups = matches[-1].groups()
        return (matches[-1].group() if not groups else next((g for g in groups if g is not None), "")).strip()


class Format(Grader):
    """1 where the whole response has the form of a pattern, else 0."""

    def __init__(self, config: FormatConfig) -> None:
        self._pattern = re.compile(config.pattern, re.DOTALL)

    def grade(self, prompt: str, response: str, row: Mapping[str, Any]) -> Grade:
        if self._pattern.fullmatch(response):
            return Grade(1.0)
        return Grade(0.0, "another form")


class Length(Grader):
    """1 up to `full_words` words, 0 from `zero_words` words, linear between them."""

    def __init__(self, config: LengthConfig) -> None:
        self._full, self._zero = config.full_words, config.zero_words

    def grade(self, prompt: str, response: str, row: Mapping[str, Any]) -> Grade:
        words = len(response.split())
        value = min(max((self._zero - words) / (self._zero - self._full), 0.0), 1.0)
        return Grade(value, "" if value == 1.0 else "long")


def check_pattern(name: str, pattern: str) -> str | None:
    """What is wrong with a regular expression of the settings; None if nothing is."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{name}={pattern!r} is no regular expression: {error}; correct it (quote it on the command line)"
    return None


__all__ = ["Exact", "Format", "Length", "Regex", "RowError", "check_pattern", "solution"]


_BOXED = "\\boxed{"


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, without white space; None where there is none that is closed."""
    begin = text.rfind(_BOXED)
    depth, start = 1, begin + len(_BOXED)
    for end in range(start, len(text) if begin >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return "".join(text[start:end].split())
    return None

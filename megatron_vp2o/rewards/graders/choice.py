"""Multiple choice: the letter that a response ends with, found as the evaluations of GPQA and MMLU-Pro find it.

In this order, the last match of the first pattern that matches anything: `Answer: C` (OpenAI's simple-evals, for GPQA),
`the answer is (C)` (MMLU-Pro's evaluation), `\\boxed{C}`, and, where the settings allow it, MMLU-Pro's last resort, the last
letter that stands alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_vp2o.config.reward import ChoiceConfig
from megatron_vp2o.rewards.grade import Grade, RowError, right, wrong
from megatron_vp2o.rewards.graders.base import Grader, answer_of
from megatron_vp2o.rewards.graders.text import solution

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DECORATION = re.compile(r"\*+|__|\\text(?:bf|rm)?\{|\\mathrm\{|\$")


class Choice(Grader):
    """1 where the chosen letter is the row's answer: a letter, the index in the row's `choices`, or one of their texts."""

    def __init__(self, config: ChoiceConfig) -> None:
        self._letters, self._last_letter = config.letters, config.last_letter

    def grade(self, prompt: str, response: str, row: Mapping[str, Any]) -> Grade:
        choices = row.get("choices")
        choices = [str(choice) for choice in choices] if isinstance(choices, list | tuple) else None
        letters = self._letters if choices is None else ALPHABET[: len(choices)]
        wanted = _wanted(answer_of(row), letters, choices)
        chosen = chosen_letter(solution(response), letters, last_letter=self._last_letter)
        if chosen is None:
            return wrong("no choice")
        return right(chosen) if chosen == wanted else wrong("another choice")


def chosen_letter(text: str, letters: str, *, last_letter: bool = True) -> str | None:
    """The letter that a response decides for, None where it does not decide.

    Args:
        last_letter: fall back on the last letter that stands alone.
    """
    plain = _DECORATION.sub("", text)
    for pattern in _patterns(letters):
        found = pattern.findall(plain)
        if found:
            return found[-1].upper()
    if not last_letter:
        return None
    # `A` and `I` are words, too: alone they count only in parentheses or at the end of a line or of a sentence.
    found = re.findall(rf"\(([{letters}])\)|(?<![A-Za-z'’-])([{letters}])(?=[.:)]?\s*(?:$|\n))", plain)
    if not found:
        found = re.findall(
            rf"()(?<![A-Za-z'’-])([{letters.replace('A', '').replace('I', '') or letters}])(?![A-Za-z'’-])", plain
        )
    return "".join(found[-1]) if found else None


def _patterns(letters: str) -> list[re.Pattern[str]]:
    end = r"(?![A-Za-z0-9'’-])"
    option = rf"\(?\[?([{letters}{letters.lower()}])\)?\]?{end}"
    return [
        re.compile(rf"(?i:answer)[ \t]*[:：][ \t]*(?:(?i:option|choice)[ \t]+)?{option}"),
        re.compile(rf"(?i:answer|choice|option)(?i:[ \t]+is)[ \t]*:?\s*(?:(?i:option|choice)[ \t]+)?{option}"),
        re.compile(rf"\\boxed\{{\s*{option}"),
    ]


def _wanted(answer: Any, letters: str, choices: list[str] | None) -> str:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        return letters[answer]
    if isinstance(answer, str):
        text = answer.strip()
        letter = text.strip("()[]. ").upper()
        if len(letter) == 1 and letter in letters:
            return letter
        if choices is not None and choices.count(text) == 1:
            return letters[choices.index(text)]
    where = (
        f"one of {', '.join(letters)}, an index"
        if choices is None
        else f"A to {letters[-1]}, an index, or one of its choices"
    )
    raise RowError(f"its `answer` is {answer!r:.60}; it must be {where}")

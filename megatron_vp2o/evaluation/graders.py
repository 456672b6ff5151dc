"""What answers are graded with, as functions of many answers: they run in the worker processes of `rewards.pool`.

Responses are solutions: what was thought before them is cut off already. Each result is a `Grade` whose `parts` are the
values of the sample.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_vp2o.config.reward import ChoiceConfig, CodeConfig, RewardConfig
from megatron_vp2o.errors import UserError
from megatron_vp2o.rewards.grade import Grade, RowError
from megatron_vp2o.rewards.graders import make_grader
from megatron_vp2o.rewards.graders.base import Grader
from megatron_vp2o.rewards.graders.choice import chosen_letter
from megatron_vp2o.rewards.graders.text import boxed

NOT_CHECKED = "not checked"
"""How the reason of an answer begins of which something could not be checked here, and so counts as failed."""
CODE_S = 300.0
"""Seconds on the clock for all tests of one program."""

_STATED = re.compile(r"(?i)\banswer(?:\s+is)?\s*[:=]?\s*(?:\\\(|\$|\*\*)*\s*(\d{1,4})(?![\d.,/^]*\d)(?!\s*[-+*/^=])")
_DRESS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|bf)\b|[{}$\s]|\\[,;!() ]|\\ ")


Results = list[Grade]
GradeMany = Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Results]


@dataclass(frozen=True)
class Prepared:
    """A function that grades many answers, and what it needs: a worker process makes these graders before its first answer, so
    that what is missing here ends the evaluation instead of making every answer wrong."""

    function: GradeMany
    graders: tuple[str, ...]

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Results:
        return self.function(prompts, responses, rows)

    def prepare(self) -> None:
        """Raises RewardError: a library, data or a sandbox is missing."""
        for name in self.graders:
            _grader(name).prepare()


def needs(*graders: str) -> Callable[[GradeMany], Prepared]:
    """Marks a function as one that needs these graders of `rewards`."""
    return lambda function: Prepared(function, graders)


def _correct(correct: bool, reason: str = "") -> Grade:
    return Grade(float(correct), reason, None, correct, {"correct": float(correct)})


def _of(grade: Grade) -> Grade:
    return _correct(bool(grade.correct), grade.reason)


def _each(
    grade: Callable[[str, Mapping[str, Any]], Grade], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[Grade]:
    """Grades one by one. A library that fails on what a model wrote makes the answer wrong, not the run."""
    grades = []
    for response, row in zip(responses, rows, strict=True):
        random.seed(0)  # some checkers draw: the same answer gets the same grade, whatever is graded before it
        try:
            grades.append(grade(response, row))
        except (UserError, RowError, MemoryError):  # something is missing here, and the answer cannot help it
            raise
        except Exception as error:
            grades.append(_correct(False, f"{type(error).__name__} in the grader"))
    return grades


@cache
def _grader(name: str) -> Grader:
    config = RewardConfig(choice=ChoiceConfig(), code=CodeConfig(total_s=CODE_S))
    made = make_grader(name, config)
    assert isinstance(made, Grader)
    return made


def stated_integer(text: str) -> int | None:
    """The integer that a solution ends with: in its last box, else after its last "answer is"; None where there is none.

    Leading zeros, dollar signs and text commands do not matter. A box with anything else in it is no integer.
    """
    box = boxed(text)
    if box is not None:
        plain = _DRESS.sub("", box).rstrip(".")
        return int(plain) if re.fullmatch(r"\d{1,6}", plain) else None
    stated = _STATED.findall(text)
    return int(stated[-1]) if stated else None


@needs("math")
def integer(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
    """AIME: integers are compared as such; math-verify decides where no integer is stated."""

    def grade(response: str, row: Mapping[str, Any]) -> Grade:
        stated = stated_integer(response)
        if stated is not None:
            right = stated == int(row["answer"])
            return _correct(right, "" if right else "another integer")
        return _of(_grader("math").grade("", response, row))

    return _each(grade, responses, rows)


@needs("math")
def mathematics(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
    """math-verify."""
    return _each(lambda response, row: _of(_grader("math").grade("", response, row)), responses, rows)


@needs("choice")
def choice(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
    """The letter that the response decides for."""

    def grade(response: str, row: Mapping[str, Any]) -> Grade:
        letter = chosen_letter(response, row["letters"], last_letter=bool(row["last_letter"]))
        return _correct(
            letter == row["answer"],
            "no choice" if letter is None else "" if letter == row["answer"] else "another choice",
        )

    return _each(grade, responses, rows)


@needs("code")
def code(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
    """All tests pass, in the sandbox."""
    return _each(lambda response, row: _of(_grader("code").grade("", response, row)), responses, rows)


@needs("instructions")
def instructions(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
    """IFEval and IFBench. Every instruction of the prompt counts: unknown ones, those whose checker lacks data, and those of an
    empty answer as not followed."""
    return _each(follow, responses, rows)


def follow(response: str, row: Mapping[str, Any]) -> Grade:
    """One answer's instructions, each checked alone, strictly and loosely."""
    checker: Any = _instructions()
    names, arguments = row["instruction_id_list"], row["kwargs"]
    strict, loose, reasons = 0, 0, []
    for name, one in zip(names, arguments, strict=True):
        try:
            found = [
                checker.followed(row["prompt"], response, [name], [dict(one)], loose=loosely)[0]
                for loosely in (False, True)
            ]
        except RowError as error:
            reasons.append(f"{NOT_CHECKED}: {error}")
            continue
        except Exception as error:
            reasons.append(f"{type(error).__name__} in the checker of {name}")
            continue
        strict, loose = strict + found[0], loose + found[1]
        if not found[0]:
            reasons.append(f"not followed: {name}")
    reasons.sort(key=lambda reason: not reason.startswith(NOT_CHECKED))
    followed = strict == len(names)
    parts = {
        "correct": float(followed),
        "strict_prompt": float(followed),
        "loose_prompt": float(loose == len(names)),
        "strict_followed": float(strict),
        "loose_followed": float(loose),
        "instructions": float(len(names)),
    }
    return Grade(float(followed), "; ".join(reasons), None, followed, parts)


@cache
def _instructions() -> Grader:
    grader = _grader("instructions")
    from langdetect import DetectorFactory

    DetectorFactory.seed = 0  # else the language of a short answer is a matter of luck
    return grader


LIMIT_S = {"integer": 10.0, "mathematics": 10.0, "choice": 10.0, "instructions": 20.0, "code": CODE_S + 90.0}
"""Seconds for one call of each."""
BATCH = {"integer": 16, "mathematics": 16, "choice": 64, "instructions": 8, "code": 1}
"""Answers of one call of each."""

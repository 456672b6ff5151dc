"""What a reward is inside a worker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vp2o.rewards.grade import Grade, RowError

ANSWER = "answer"


class Grader(ABC):
    """Grades one response at a time."""

    def prepare(self) -> None:  # noqa: B027, most rewards have nothing to prepare
        """Called once in every worker, after the fork."""

    @abstractmethod
    def grade(self, prompt: str, response: str, row: Mapping[str, Any]) -> Grade:
        """What `response` is worth.

        Raises:
            RowError: the row lacks something, whatever the response is.
        """


class BatchGrader(ABC):
    """Grades many responses in one call."""

    def prepare(self) -> None:  # noqa: B027, most rewards have nothing to prepare
        """Called once in every worker, after the fork."""

    @abstractmethod
    def grade_all(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[Grade | str]:
        """One grade for each response, or what is wrong with what was returned for it.

        Raises:
            RowError: what was returned is wrong as a whole.
            Exception: whatever the function raises.
        """


def answer_of(row: Mapping[str, Any]) -> Any:
    """The row's reference answer.

    Raises:
        RowError: there is none.
    """
    answer = row.get(ANSWER)
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        raise RowError(f"it has no `{ANSWER}`, but the columns {', '.join(map(str, row)) or '(none)'}")
    return answer


def answer_text(row: Mapping[str, Any]) -> str:
    """The row's reference answer as text.

    Raises:
        RowError: there is none, or it is no text and no number.
    """
    answer = answer_of(row)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise RowError(f"its `{ANSWER}` is {answer!r:.60} of type {type(answer).__name__}; text or a number is needed")
    return str(answer).strip()

"""The weighted sum of rewards: asks each for its grades, in this process or in workers, and adds them up."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_vp2o.config.reward import RewardConfig
from megatron_vp2o.errors import RewardError
from megatron_vp2o.rewards.grade import Grade, RowError
from megatron_vp2o.rewards.graders import ANSWERS, CHEAP, make_grader
from megatron_vp2o.rewards.graders.base import Grader
from megatron_vp2o.rewards.graders.own import Own
from megatron_vp2o.rewards.pool import Counts, Item, WorkerPool, describe_row, grade_of
from megatron_vp2o.rewards.worker import answer_batch
from megatron_vp2o.rl.types import RewardResult

PROGRESS_S = 15.0
"""Seconds of grading after which, and between which, a line says how far it is."""
CODE_MARGIN_S = 90.0
"""Beyond code.total_s: compiling, and the test that is under way."""

logger = logging.getLogger(__name__)


class ComposedReward:
    """A `Reward` (see rl.types) made of those that the configuration gives a weight.

    A response is right where all rewards that judge answers say so; length and format do not count for that, and a user's
    function beside others only where it says `correct`.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Raises RewardError where a reward cannot be used here."""
        self.weights = config.active()
        self._batch_size = config.batch_size
        here = [name for name in self.weights if name in CHEAP or (name == "own" and config.in_process)]
        self._here = {name: make_grader(name, config) for name in here}
        for grader in self._here.values():
            grader.prepare()
        limits = {
            name: config.code.total_s + CODE_MARGIN_S if name == "code" else config.timeout_s
            for name in self.weights
            if name not in here
        }
        self._pool = WorkerPool(config, limits, {"own": config.batch_size}) if limits else None

    def __enter__(self) -> ComposedReward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def grades_elsewhere(self) -> bool:
        """Whether worker processes do the work, and nothing of a user's runs in this one."""
        return self._pool is not None and "own" not in self._here

    @property
    def counts(self) -> Counts:
        """What happened to answers and workers so far."""
        return Counts() if self._pool is None else self._pool.counts

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.close()

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[RewardResult]:
        """One result for each response.

        Raises:
            RewardError: a row that a reward cannot work with, or a user's function that raises; names the row.
        """
        grades: dict[str, list[Grade | None]] = {name: [None] * len(responses) for name in self.weights}
        names = [name for name in self.weights if name not in self._here]
        items = (
            Item(number * len(names) + index, name, *answer)
            for number, answer in enumerate(zip(prompts, responses, rows, strict=True))
            for index, name in enumerate(names)
        )
        if self._pool is not None:
            total = len(names) * len(responses)
            for number, grade in _reported(self._pool.grade(items), total):
                grades[names[number % len(names)]][number // len(names)] = grade
        for name in self._here:
            grades[name] = list(self._grade_here(name, prompts, responses, rows))
        return [
            self._result({name: column[n] for name, column in grades.items()})  # type: ignore[misc]
            for n in range(len(responses))
        ]

    def _grade_here(
        self, name: str, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[Grade]:
        grader = self._here[name]
        items = [Item(n, name, *answer) for n, answer in enumerate(zip(prompts, responses, rows, strict=True))]
        if isinstance(grader, Grader):
            for item in items:
                try:
                    yield grader.grade(item.prompt, item.response, item.row)
                except RowError as error:
                    raise RewardError(f"reward {name}: {describe_row(item)}: {error}") from error
            return
        assert isinstance(grader, Own)
        for begin in range(0, len(items), self._batch_size):
            chunk = items[begin : begin + self._batch_size]
            for message in answer_batch(grader, [(i.number, i.prompt, i.response, i.row) for i in chunk]):
                if "error" in message:
                    raise RewardError(f"reward {name}: {describe_row(items[message['number']])}: {message['error']}")
                yield grade_of(message)

    def _result(self, grades: Mapping[str, Grade]) -> RewardResult:
        """The sum. Reasons are named where several rewards have one."""
        parts: dict[str, float] = {}
        for name, grade in grades.items():
            parts[name] = self.weights[name] * grade.reward
            parts |= {f"{name}.{part}": value for part, value in grade.parts.items()}
        reasons = {name: grade.reason for name, grade in grades.items() if grade.reason}
        alone = len(grades) == 1
        judged = [grade for name, grade in grades.items() if name in ANSWERS]
        own = grades.get("own")
        if own is not None and (own.correct is not None or not judged):
            judged.append(own)
        correct = all(grade.reward >= 1 if grade.correct is None else grade.correct for grade in judged)
        return RewardResult(
            reward=sum(parts[name] for name in grades),
            reason="; ".join(reason if alone else f"{name}: {reason}" for name, reason in reasons.items()),
            canonical=next((grade.canonical for grade in judged if grade.canonical is not None), None),
            correct=correct if judged else None,
            parts=parts,
        )


def _reported(grades: Iterable[tuple[int, Grade]], total: int) -> Iterator[tuple[int, Grade]]:
    """The same; where it takes long, lines in the log say how far it is."""
    began = said = time.monotonic()
    for done, grade in enumerate(grades, 1):
        yield grade
        now = time.monotonic()
        if now - said > PROGRESS_S:
            said = now
            left = (now - began) / done * (total - done)
            logger.info("graded %d of %d answers, about %.0f s to go", done, total, left)

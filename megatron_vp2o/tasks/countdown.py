"""Countdown: from the given numbers make the target, using each of them exactly once with + - * / and parentheses.

Prompt `4 8 6=24:`, a right answer `6*(8-4)`.  The numbers of a prompt may come in any order, and may repeat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from megatron_vp2o.config.schema import AnswerFormat, CountdownTaskConfig
from megatron_vp2o.config.validate_task import check_task
from megatron_vp2o.rl.types import Problem, Verdict
from megatron_vp2o.tasks.answers import Unfinished, extract
from megatron_vp2o.tasks.expressions import Rejected, normalise, parse, reword, solutions, write
from megatron_vp2o.tasks.notation import claimed, plain
from megatron_vp2o.tasks.problems import Draw, PooledTask, collect

MAX_NUMBERS = 4  # all right answers are enumerated; five numbers would take most of a second a problem


@dataclass(frozen=True, slots=True)
class Countdown:
    """One problem."""

    numbers: tuple[int, ...]  # sorted
    target: int


class CountdownTask(PooledTask):
    """Verdicts' reasons: length, parse, numbers (not the given ones, each once), division (by zero), value, unfinished (no answer
    after the thinking).

    With `task.answer_format=lenient` the answer may be marked and written as models do (`answers`, `notation`), and may be followed
    by `=` and the target. The limit of length counts the answer, not the text around it.

    `canonical` is the text of the answer's normal form (see `expressions`).
    """

    def __init__(self, config: CountdownTaskConfig, *, progress: bool = False) -> None:
        check_task(config)
        super().__init__("countdown", collect(_draws(config), config, progress=progress), config.tokenizer)
        self.form = config.answer_format

    def verify(self, problem: Problem, response: str) -> Verdict:
        """Exact, in bounded time, for any text."""
        data: Countdown = problem.data
        try:
            tree, numbers = parse(self._answer(response, data.target))
            if sorted(numbers) != list(data.numbers):
                return Verdict(False, None, "numbers")
            result = normalise(tree)
        except Unfinished:
            return Verdict(False, None, "unfinished")
        except Rejected as error:
            return Verdict(False, None, str(error))
        except ZeroDivisionError:
            return Verdict(False, None, "division")
        if result.value != data.target:
            return Verdict(False, None, "value")
        return Verdict(True, write(result.form), "")

    def _answer(self, response: str, target: int) -> str:
        answer = extract(response, self.form)
        return answer if self.form is AnswerFormat.strict else claimed(plain(answer), target)

    def demonstration(self, problem: Problem, seed: int) -> str:
        """One right answer, drawn uniformly from the distinct ones, in one of its wordings (operands may change places)."""
        answers, random = solutions(problem.data.numbers, problem.data.target), Random(seed)
        return reword(answers[random.randrange(len(answers))], random)

    def _put(self, problem: Problem, variant: int) -> str:
        """The numbers in another order."""
        numbers = list(problem.data.numbers)
        Random(variant * 1_000_003 + problem.uid).shuffle(numbers)
        return _prompt(numbers, problem.data.target)

    def _count(self, data: Countdown) -> int:
        return len(solutions(data.numbers, data.target))


def _draws(config: CountdownTaskConfig) -> Iterator[Draw | None]:
    from megatron_vp2o.tasks import generators  # seconds to import

    for draw in generators.countdown(config):
        if draw is None:
            yield None
            continue
        shown, target = draw
        data = Countdown(tuple(sorted(shown)), target)
        key = f"countdown {' '.join(map(str, data.numbers))}={target}"
        yield Draw(key, _prompt(shown, target), data)


def _prompt(numbers: Sequence[int], target: int) -> str:
    return f"{' '.join(map(str, numbers))}={target}:"

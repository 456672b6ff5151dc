"""Addends: write a given number of whole numbers from 1 on with a given sum, none above a given bound.

Prompt `57<30:`, a right answer (three addends) `12+20+25`. The order of the numbers does not matter, and they may repeat.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from megatron_vp2o.config.schema import AddendsTaskConfig, AnswerFormat
from megatron_vp2o.config.validate_task import check_task
from megatron_vp2o.rl.types import Problem, Verdict
from megatron_vp2o.tasks.answers import Unfinished, extract
from megatron_vp2o.tasks.problems import Draw, PooledTask, collect, stream_seed

ANSWER = re.compile(r"[1-9][0-9]{0,3}(?:\+[1-9][0-9]{0,3})*")


@dataclass(frozen=True, slots=True)
class Addends:
    """One problem: `count` numbers from 1 to `bound` with the sum `target`."""

    target: int
    bound: int
    count: int


class AddendsTask(PooledTask):
    """Verdicts' reasons: parse (not numbers joined by +), count (too many or too few of them), bound (one is too large), sum,
    unfinished (no answer after the thinking). `canonical` is the numbers in ascending order."""

    def __init__(self, config: AddendsTaskConfig, *, progress: bool = False) -> None:
        check_task(config)
        super().__init__("addends", collect(_draws(config), config, progress=progress), config.tokenizer)
        self.form = config.answer_format

    def verify(self, problem: Problem, response: str) -> Verdict:
        """Exact, in bounded time, for any text."""
        data: Addends = problem.data
        try:
            answer = extract(response, self.form)
        except Unfinished:
            return Verdict(False, None, "unfinished")
        if self.form is AnswerFormat.lenient:
            answer = re.sub(r"\s+", "", answer).removesuffix(f"={data.target}")
        if not ANSWER.fullmatch(answer):
            return Verdict(False, None, "parse")
        numbers = sorted(int(number) for number in answer.split("+"))
        if len(numbers) != data.count:
            return Verdict(False, None, "count")
        if numbers[-1] > data.bound:
            return Verdict(False, None, "bound")
        if sum(numbers) != data.target:
            return Verdict(False, None, "sum")
        return Verdict(True, "+".join(map(str, numbers)), "")

    def demonstration(self, problem: Problem, seed: int) -> str:
        """One right answer, drawn uniformly from the distinct ones, its numbers in any order."""
        random = Random(seed)
        left, most, numbers = problem.data.target, problem.data.bound, []
        for count in range(problem.data.count, 0, -1):  # the largest number first, each with its share of the answers
            rank = random.randrange(ways(left, count, most))
            for largest in range(1, most + 1):
                share = ways(left - largest, count - 1, largest)
                if rank < share:
                    break
                rank -= share
            numbers.append(largest)
            left, most = left - largest, largest
        random.shuffle(numbers)
        return "+".join(map(str, numbers))

    def _count(self, data: Addends) -> int:
        return ways(data.target, data.count, data.bound)


@lru_cache(maxsize=2**18)
def ways(target: int, count: int, bound: int) -> int:
    """Multisets of `count` whole numbers from 1 to `bound` with the sum `target`."""
    if count == 0 or target < count or target > count * bound:
        return int(count == 0 and target == 0)
    if count == 1:
        return 1
    # by their largest number
    return sum(ways(target - largest, count - 1, largest) for largest in range(1, min(bound, target) + 1))


def _draws(config: AddendsTaskConfig) -> Iterator[Draw | None]:
    random = Random(stream_seed("addends", config.seed))
    while True:
        target = random.randint(max(config.min_target, config.addends), config.max_target)
        bound = random.randint(-(-target // config.addends), target - config.addends + 1)
        data = Addends(target, bound, config.addends)
        if ways(target, config.addends, bound) < config.min_answers:
            yield None
        else:
            yield Draw(f"addends {config.addends} {target} {bound}", f"{target}<{bound}:", data)

"""Brackets: write a balanced string of round brackets that has a given number of peaks and some given brackets in their places.

Prompt `3 ??)????(????:` (three peaks, twelve places, two of them given), a right answer `(())(()(()))`. A peak is an opening
bracket that a closing one follows. Where no bracket is given, n pairs with k peaks have C(n, k) C(n, k - 1) / n right answers
(Narayana's numbers).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from megatron_vp2o.config.schema import BracketsTaskConfig
from megatron_vp2o.rl.types import Problem, Verdict
from megatron_vp2o.tasks.problems import Draw, stream_seed
from megatron_vp2o.tasks.strings import StringTask

FREE = "?"
BRACKETS = re.compile(r"[()]*")


@dataclass(frozen=True, slots=True)
class Brackets:
    """One problem: `template` has a place for each bracket, FREE where the answer is free."""

    template: str
    peaks: int


class BracketsTask(StringTask):
    """Verdicts' reasons: parse (not as many brackets as there are places), given (another bracket where one is given), balance,
    peaks (too many or too few of them), unfinished (no answer after the thinking). `canonical` is the answer."""

    def __init__(self, config: BracketsTaskConfig, *, progress: bool = False) -> None:
        super().__init__(config, _draws(config), progress=progress)

    def _judge(self, data: Brackets, answer: str) -> Verdict:
        if len(answer) != len(data.template) or not BRACKETS.fullmatch(answer):
            return Verdict(False, None, "parse")
        if any(given not in (FREE, bracket) for given, bracket in zip(data.template, answer, strict=True)):
            return Verdict(False, None, "given")
        height = 0
        for bracket in answer:
            height += 1 if bracket == "(" else -1
            if height < 0:
                break
        if height != 0:
            return Verdict(False, None, "balance")
        if answer.count("()") != data.peaks:
            return Verdict(False, None, "peaks")
        return Verdict(True, answer, "")

    def demonstration(self, problem: Problem, seed: int) -> str:
        """One right answer, drawn uniformly from all."""
        data, random = problem.data, Random(seed)
        height, peaks, answer = 0, data.peaks, ""
        for place in range(len(data.template)):
            rest = data.template[place + 1 :]
            closed = answer.endswith("(")  # a closing bracket would make a peak here
            up = ways(rest, height + 1, peaks, True) if data.template[place] != ")" else 0
            down = ways(rest, height - 1, peaks - closed, False) if data.template[place] != "(" else 0
            if random.randrange(up + down) < up:
                answer, height = answer + "(", height + 1
            else:
                answer, height, peaks = answer + ")", height - 1, peaks - closed
        return answer

    def _count(self, data: Brackets) -> int:
        return ways(data.template, 0, data.peaks, False)


@lru_cache(maxsize=2**18)
def ways(template: str, height: int, peaks: int, opened: bool) -> int:
    """Ways to fill the rest of a string: `height` brackets are open, `peaks` are still to come, and the last one was an opening one
    or not."""
    if height < 0 or height > len(template) or peaks < 0:
        return 0
    if not template:
        return int(peaks == 0)
    given, rest = template[0], template[1:]
    up = ways(rest, height + 1, peaks, True) if given != ")" else 0
    return up + (ways(rest, height - 1, peaks - opened, False) if given != "(" else 0)


def _draws(config: BracketsTaskConfig) -> Iterator[Draw | None]:
    random = Random(stream_seed("brackets", config.seed))
    length = 2 * config.pairs
    while True:
        given = random.sample(
            range(1, length - 1), random.randint(config.min_given, config.max_given)
        )  # the ends are known
        template = "".join(random.choice("()") if place in given else FREE for place in range(length))
        data = Brackets(template, random.randint(1, config.pairs))
        if ways(template, 0, data.peaks, False) < config.min_answers:
            yield None
        else:
            text = f"{data.peaks} {template}"
            yield Draw(f"brackets {text}", f"{text}:", data)

"""Change: pay an amount exactly with coins of given kinds, with no more coins than allowed.

Prompt `1358 23<6:` (coins of 1, 3, 5 and 8; the amount 23; at most six coins), a right answer `85811`. The order of the coins
does not matter, and a kind can be used again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from megatron_vp2o.config.schema import ChangeTaskConfig
from megatron_vp2o.rl.types import Problem, Verdict
from megatron_vp2o.tasks.problems import Draw, stream_seed
from megatron_vp2o.tasks.strings import StringTask

COINS = re.compile(r"[1-9]+")


@dataclass(frozen=True, slots=True)
class Change:
    """One problem."""

    kinds: tuple[int, ...]  # ascending, each from 1 to 9
    amount: int
    coins: int  # at most so many


class ChangeTask(StringTask):
    """Verdicts' reasons: parse (not a row of digits from 1 to 9), kind (a coin that is not among the given kinds), count (too many
    coins), sum, unfinished (no answer after the thinking). `canonical` is the coins in ascending order."""

    between = r"[\s,+]+"

    def __init__(self, config: ChangeTaskConfig, *, progress: bool = False) -> None:
        super().__init__(config, _draws(config), progress=progress)

    def _judge(self, data: Change, answer: str) -> Verdict:
        if not COINS.fullmatch(answer):
            return Verdict(False, None, "parse")
        if len(answer) > data.coins:
            return Verdict(False, None, "count")
        coins = sorted(map(int, answer))
        if not set(coins) <= set(data.kinds):
            return Verdict(False, None, "kind")
        if sum(coins) != data.amount:
            return Verdict(False, None, "sum")
        return Verdict(True, "".join(map(str, coins)), "")

    def demonstration(self, problem: Problem, seed: int) -> str:
        """One right answer, drawn uniformly from the distinct ones, its coins in any order."""
        data, random, answer = problem.data, Random(seed), ""
        kinds, amount, coins = data.kinds, data.amount, data.coins
        while kinds:  # the largest kind first: another coin of it, or none any more, each with its share of the answers
            one_more = ways(kinds, amount - kinds[-1], coins - 1)
            if random.randrange(one_more + ways(kinds[:-1], amount, coins)) < one_more:
                answer, amount, coins = answer + str(kinds[-1]), amount - kinds[-1], coins - 1
            else:
                kinds = kinds[:-1]
        return "".join(random.sample(answer, len(answer)))

    def _count(self, data: Change) -> int:
        return ways(data.kinds, data.amount, data.coins)


@lru_cache(maxsize=2**18)
def ways(kinds: tuple[int, ...], amount: int, coins: int) -> int:
    """Multisets of at most `coins` coins of these kinds that sum to `amount`."""
    if amount < 0 or coins < 0:
        return 0
    if not kinds or amount == 0:
        return int(amount == 0)
    # with a coin of the largest kind, and without one
    return ways(kinds, amount - kinds[-1], coins - 1) + ways(kinds[:-1], amount, coins)


def _draws(config: ChangeTaskConfig) -> Iterator[Draw | None]:
    random = Random(stream_seed("change", config.seed))
    while True:
        kinds = tuple(sorted(random.sample(range(1, 10), config.kinds)))
        data = Change(kinds, random.randint(config.min_amount, config.max_amount), config.coins)
        if ways(kinds, data.amount, data.coins) < config.min_answers:
            yield None
        else:
            text = f"{''.join(map(str, kinds))} {data.amount}<{data.coins}"
            yield Draw(f"change {text}", f"{text}:", data)

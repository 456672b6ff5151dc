"""Linear order: write given letters, each once, so that all given precedences hold (a linear extension of a partial order).

Prompt `a<d c<b e<f:` (a before d, c before b, e before f; six letters), a right answer `cabedf`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from string import ascii_lowercase

from megatron_vp2o.config.schema import LinearOrderTaskConfig
from megatron_vp2o.rl.types import Problem, Verdict
from megatron_vp2o.tasks.problems import Draw, stream_seed
from megatron_vp2o.tasks.strings import StringTask

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Precedences:
    """One problem: an order of the first `letters` letters in which the first of each pair comes before the second."""

    letters: int
    pairs: Pairs  # sorted


class LinearOrderTask(StringTask):
    """Verdicts' reasons: parse (not each of the letters once), order (a precedence does not hold), unfinished (no answer after the
    thinking). `canonical` is the letters as they are ordered."""

    between = r"[\s,<]+"

    def __init__(self, config: LinearOrderTaskConfig, *, progress: bool = False) -> None:
        super().__init__(config, _draws(config), progress=progress)

    def _judge(self, data: Precedences, answer: str) -> Verdict:
        if sorted(answer) != list(ascii_lowercase[: data.letters]):
            return Verdict(False, None, "parse")
        place = {ord(letter) - ord("a"): position for position, letter in enumerate(answer)}
        if any(place[first] > place[second] for first, second in data.pairs):
            return Verdict(False, None, "order")
        return Verdict(True, answer, "")

    def demonstration(self, problem: Problem, seed: int) -> str:
        """One right answer, drawn uniformly from all."""
        data, random = problem.data, Random(seed)
        ways, before = completions(data), _before(data)
        placed, answer = 0, ""
        while len(answer) < data.letters:
            rank = random.randrange(ways[placed])
            for letter in _next(placed, before):  # each with its share of the answers
                share = ways[placed | 1 << letter]
                if rank < share:
                    break
                rank -= share
            placed |= 1 << letter
            answer += ascii_lowercase[letter]
        return answer

    def _put(self, problem: Problem, variant: int) -> str:
        """The precedences in another order."""
        pairs = list(problem.data.pairs)
        Random(variant * 1_000_003 + problem.uid).shuffle(pairs)
        return _prompt(pairs)

    def _count(self, data: Precedences) -> int:
        return completions(data)[0]


@lru_cache(maxsize=2**14)
def completions(problem: Precedences) -> tuple[int, ...]:
    """Ways to write the letters that are not yet written, for each set of written ones (as bits; 0 where none is written).

    An exact count over 2^letters sets. Sets that no right answer passes through have a number, too, which is not used.
    """
    everything = (1 << problem.letters) - 1
    before = _before(problem)
    ways = [0] * everything + [1]
    for placed in range(everything - 1, -1, -1):
        ways[placed] = sum(ways[placed | 1 << letter] for letter in _next(placed, before))
    return tuple(ways)


def _before(problem: Precedences) -> list[int]:
    """The letters that must come before each letter, as bits."""
    before = [0] * problem.letters
    for first, second in problem.pairs:
        before[second] |= 1 << first
    return before


def _next(placed: int, before: list[int]) -> list[int]:
    """The letters that can be written next."""
    return [letter for letter, needed in enumerate(before) if not placed >> letter & 1 and needed & placed == needed]


def closure(problem: Precedences) -> Pairs:
    """All precedences that follow from the given ones, with them: equal for problems that have the same right answers."""
    before = _before(problem)
    for middle in range(problem.letters):  # Warshall's order: through ever more letters
        for letter in range(problem.letters):
            if before[letter] >> middle & 1:
                before[letter] |= before[middle]
    return tuple(
        (first, second)
        for first in range(problem.letters)
        for second in range(problem.letters)
        if before[second] >> first & 1
    )


def _draws(config: LinearOrderTaskConfig) -> Iterator[Draw | None]:
    random = Random(stream_seed("linear_order", config.seed))
    letters = range(config.letters)
    places = [(i, j) for j in letters for i in range(j)]
    while True:
        hidden = random.sample(letters, config.letters)  # an order that meets them all, so that they never contradict
        shown = [(hidden[i], hidden[j]) for i, j in random.sample(places, config.precedences)]
        data = Precedences(config.letters, tuple(sorted(shown)))
        if completions(data)[0] < config.min_answers:
            yield None
        else:
            yield Draw(f"linear_order {config.letters} {_prompt(closure(data))}", _prompt(shown), data)


def _prompt(pairs: list[tuple[int, int]] | Pairs) -> str:
    return " ".join(f"{ascii_lowercase[first]}<{ascii_lowercase[second]}" for first, second in pairs) + ":"

"""Coloring: give each node of a small graph a colour (a letter), so that no edge joins two nodes of the same colour.

Prompt `01 12 02 23:` (edges between nodes 0 to 3), a right answer `abca`. Answers that differ only in which letter names which
colour are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from random import Random
from string import ascii_lowercase

from megatron_vp2o.config.schema import ColoringTaskConfig
from megatron_vp2o.rl.types import Problem, Verdict
from megatron_vp2o.tasks.problems import Draw, stream_seed
from megatron_vp2o.tasks.strings import StringTask

Edges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Coloring:
    """One problem."""

    nodes: int
    colors: int
    edges: Edges  # sorted, each with the smaller node first


class ColoringTask(StringTask):
    """Verdicts' reasons: parse (not one of the colours' letters for each node), edge (joins two of one colour), unfinished (no
    answer after the thinking). `canonical` is the answer with its colours renamed in the order in which they appear."""

    def __init__(self, config: ColoringTaskConfig, *, progress: bool = False) -> None:
        super().__init__(config, _draws(config), progress=progress)

    def _judge(self, data: Coloring, answer: str) -> Verdict:
        if len(answer) != data.nodes or not set(answer) <= set(ascii_lowercase[: data.colors]):
            return Verdict(False, None, "parse")
        if any(answer[a] == answer[b] for a, b in data.edges):
            return Verdict(False, None, "edge")
        return Verdict(True, renamed(answer), "")

    def demonstration(self, problem: Problem, seed: int) -> str:
        """One right answer, drawn uniformly from the distinct ones, with colours named at random."""
        data, random = problem.data, Random(seed)
        letters = list(ascii_lowercase[: data.colors])
        random.shuffle(letters)
        answers = colorings(data)
        return "".join(letters[color] for color in answers[random.randrange(len(answers))])

    def _put(self, problem: Problem, variant: int) -> str:
        """The edges in another order."""
        edges = list(problem.data.edges)
        Random(variant * 1_000_003 + problem.uid).shuffle(edges)
        return _prompt(edges)

    def _count(self, data: Coloring) -> int:
        return len(colorings(data))


def renamed(answer: str) -> str:
    """The same colouring with `a` for the first node's colour, `b` for the next new one, and so on."""
    names: dict[str, str] = {}
    return "".join(names.setdefault(letter, ascii_lowercase[len(names)]) for letter in answer)


@lru_cache(maxsize=2**14)
def colorings(problem: Coloring) -> tuple[tuple[int, ...], ...]:
    """All right answers up to the names of colours: the first node has colour 0, and each new colour is the next number."""
    before = [[a for a, b in problem.edges if b == node] for node in range(problem.nodes)]
    partial: list[tuple[int, ...]] = [()]
    for node in range(problem.nodes):
        partial = [
            (*colors, color)
            for colors in partial
            for color in range(min(max(colors, default=-1) + 2, problem.colors))
            if all(colors[a] != color for a in before[node])
        ]
    return tuple(partial)


def _draws(config: ColoringTaskConfig) -> Iterator[Draw | None]:
    random = Random(stream_seed("coloring", config.seed))
    pairs = list(combinations(range(config.nodes), 2))
    while True:
        shown = random.sample(pairs, config.edges)
        data = Coloring(config.nodes, config.colors, tuple(sorted(shown)))
        if len(colorings(data)) < config.min_answers:
            yield None
        else:
            text = " ".join(f"{a}{b}" for a, b in data.edges)
            yield Draw(f"coloring {config.nodes} {config.colors} {text}", _prompt(shown), data)


def _prompt(edges: list[tuple[int, int]]) -> str:
    return " ".join(f"{a}{b}" for a, b in edges) + ":"

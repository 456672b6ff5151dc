"""Shortest path in a grid: the moves (U, D, L, R) of one of the shortest ways from S to G around blocked cells (#).

Prompt `S.#|..#|#.G:` (rows parted by |, open cells are dots), right answers `RDDR`, `DRDR`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from random import Random

from megatron_vp2o.config.schema import AnswerFormat, ShortestPathTaskConfig
from megatron_vp2o.config.validate_task import check_task
from megatron_vp2o.rl.types import Problem, Verdict
from megatron_vp2o.tasks.answers import Unfinished, extract
from megatron_vp2o.tasks.problems import Draw, PooledTask, collect

MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}  # row and column change
CELLS = {"*": "S", "#": "G", "O": ".", "X": "#"}  # reasoning-gym's characters to ours

Cell = tuple[int, int]
Grid = tuple[str, ...]  # rows


class ShortestPathTask(PooledTask):
    """Verdicts' reasons: length (more moves than cells), parse, wall (off the grid or into a blocked cell), goal (ends
    elsewhere), detour (gets there, but not in the fewest moves), unfinished (no answer after the thinking).  `canonical` is the
    moves themselves.

    With `task.answer_format=lenient` the answer may be marked as models do (`answers`), with white space or commas between moves.
    """

    def __init__(self, config: ShortestPathTaskConfig, *, progress: bool = False) -> None:
        check_task(config)
        super().__init__("shortest_path", collect(_draws(config), config, progress=progress), config.tokenizer)
        self.form = config.answer_format

    def verify(self, problem: Problem, response: str) -> Verdict:
        """Exact, in bounded time, for any text."""
        grid: Grid = problem.data
        try:
            response = extract(response, self.form)
        except Unfinished:
            return Verdict(False, None, "unfinished")
        if self.form is AnswerFormat.lenient:
            response = re.sub(r"[\s,]+", "", response)
        if len(response) > len(grid) * len(grid[0]):
            return Verdict(False, None, "length")
        if not response or not set(response) <= MOVES.keys():
            return Verdict(False, None, "parse")
        at = find(grid, "S")
        for move in response:
            at = step(at, move)
            if not is_free(grid, at):
                return Verdict(False, None, "wall")
        if at != find(grid, "G"):
            return Verdict(False, None, "goal")
        if len(response) > fewest_moves(grid):
            return Verdict(False, None, "detour")
        return Verdict(True, response, "")

    def demonstration(self, problem: Problem, seed: int) -> str:
        """One of the shortest paths, drawn uniformly."""
        grid: Grid = problem.data
        ways = ways_to_goal(grid)
        at = find(grid, "S")
        rank = Random(seed).randrange(ways[at][1])  # of the path in the order of MOVES
        path = ""
        while ways[at][0] > 0:
            for move in MOVES:
                after = step(at, move)
                if after in ways and ways[after][0] == ways[at][0] - 1:
                    if rank < ways[after][1]:
                        path, at = path + move, after
                        break
                    rank -= ways[after][1]
        return path

    def _count(self, data: Grid) -> int:
        return ways_to_goal(data)[find(data, "S")][1]


def find(grid: Grid, character: str) -> Cell:
    """Where the only such cell is."""
    row = next(r for r, cells in enumerate(grid) if character in cells)
    return row, grid[row].index(character)


def step(cell: Cell, move: str) -> Cell:
    """The cell one move on, perhaps off the grid."""
    return cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]


def is_free(grid: Grid, cell: Cell) -> bool:
    """Is this cell on the grid and not blocked?"""
    return 0 <= cell[0] < len(grid) and 0 <= cell[1] < len(grid[0]) and grid[cell[0]][cell[1]] != "#"


def fewest_moves(grid: Grid) -> int:
    """Moves of a shortest path; there must be one."""
    return ways_to_goal(grid)[find(grid, "S")][0]


@lru_cache(maxsize=8192)
def ways_to_goal(grid: Grid) -> dict[Cell, tuple[int, int]]:
    """For every cell that leads to the goal: its distance, and the number of shortest paths from it."""
    goal = find(grid, "G")
    ways = {goal: (0, 1)}
    queue = [goal]
    for cell in queue:
        distance, paths = ways[cell]
        for move in MOVES:
            before = step(cell, move)
            if not is_free(grid, before):
                continue
            if before not in ways:
                ways[before] = (distance + 1, paths)
                queue.append(before)
            elif ways[before][0] == distance + 1:
                ways[before] = (distance + 1, ways[before][1] + paths)
    return ways


def _draws(config: ShortestPathTaskConfig) -> Iterator[Draw | None]:
    from megatron_vp2o.tasks import generators  # seconds to import

    for matrix in generators.shortest_path(config):
        if matrix is None:
            yield None
            continue
        grid = tuple("".join(CELLS[cell] for cell in row) for row in matrix)
        text = "|".join(grid)
        yield Draw(f"shortest_path {text}", f"{text}:", grid)

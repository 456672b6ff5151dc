"""The shortest-path task against a search over all move strings."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_vp2o.config.schema import AnswerFormat, ShortestPathTaskConfig
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.types import Problem, Split
from megatron_vp2o.tasks.shortest_path import ShortestPathTask, ways_to_goal

DELTAS = dict(zip("UDLR", [(-1, 0), (1, 0), (0, -1), (0, 1)], strict=True))


def walk(grid: tuple[str, ...], moves: str) -> tuple[int, int] | None:
    """Where the moves lead from S; None if into a wall or off the grid."""
    row, column = next((r, c) for r, cells in enumerate(grid) for c, cell in enumerate(cells) if cell == "S")
    for move in moves:
        row, column = row + DELTAS[move][0], column + DELTAS[move][1]
        if not (0 <= row < len(grid) and 0 <= column < len(grid[0])) or grid[row][column] == "#":
            return None
    return row, column


def naive_answers(grid: tuple[str, ...]) -> set[str]:
    """All shortest move strings, by growing every walk that visits no cell twice."""
    goal = next((r, c) for r, cells in enumerate(grid) for c, cell in enumerate(cells) if cell == "G")
    walks: dict[str, set[tuple[int, int] | None]] = {"": {walk(grid, "")}}
    while walks:
        grown: dict[str, set[tuple[int, int] | None]] = {}
        for moves, visited in walks.items():
            for move in "UDLR":
                at = walk(grid, moves + move)
                if at is not None and at not in visited:
                    grown[moves + move] = visited | {at}
        answers = {moves for moves in grown if walk(grid, moves) == goal}
        if answers:
            return answers
        walks = grown
    return set()


def problem_of(grid: tuple[str, ...]) -> Problem:
    return Problem(0, "|".join(grid) + ":", grid, len(naive_answers(grid)))


@st.composite
def grids(draw: st.DrawFn) -> tuple[str, ...]:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    cells = draw(st.lists(st.sampled_from("...#"), min_size=rows * columns, max_size=rows * columns))
    start, goal = draw(st.permutations(range(rows * columns)))[:2]
    cells[start], cells[goal] = "S", "G"
    return tuple("".join(cells[row * columns : (row + 1) * columns]) for row in range(rows))


@pytest.fixture(scope="module")
def task() -> ShortestPathTask:
    return ShortestPathTask(
        ShortestPathTaskConfig(answer_format=AnswerFormat.strict, train_size=200, validation_size=40, test_size=40)
    )


def test_problems(task: ShortestPathTask) -> None:
    for i in range(task.size(Split.train)):
        problem = task.problem(Split.train, i)
        assert problem.prompt == "|".join(problem.data) + ":"
        assert [len(row) for row in problem.data] == [4] * 4
        assert set(problem.prompt[:-1]) <= set("SG.#|")
        assert Counter(problem.prompt)["S"] == Counter(problem.prompt)["G"] == 1
        answers = naive_answers(problem.data)
        assert problem.n_solutions == len(answers) >= 1
        for seed in range(3):
            answer = task.demonstration(problem, seed)
            assert answer in answers
            assert answer == task.demonstration(problem, seed)
            assert task.verify(problem, answer).canonical == answer


@settings(max_examples=100, deadline=None)
@given(grids())
def test_counts_and_answers(task: ShortestPathTask, grid: tuple[str, ...]) -> None:
    answers = naive_answers(grid)
    assume(answers)
    assert task._count(grid) == len(answers)
    assert all(task.verify(problem_of(grid), answer).correct for answer in answers)
    assert {task.demonstration(problem_of(grid), seed) for seed in range(40)} <= answers


@settings(max_examples=200, deadline=None)
@given(grids(), st.text("UDLR", min_size=1, max_size=10))
def test_any_moves_are_judged_right_just_if_they_are_an_answer(
    task: ShortestPathTask, grid: tuple[str, ...], moves: str
) -> None:
    answers = naive_answers(grid)
    assume(answers)
    assert task.verify(problem_of(grid), moves).correct == (moves in answers)


def test_demonstrations_are_uniform(task: ShortestPathTask) -> None:
    problem = problem_of(("S...", "....", "....", "...G"))
    assert problem.n_solutions == 20
    drawn = Counter(task.demonstration(problem, seed) for seed in range(4000))
    assert set(drawn) == naive_answers(problem.data)
    assert all(140 < count < 260 for count in drawn.values())  # 200 expected, standard deviation 14


def test_counting_does_not_enumerate() -> None:
    open_grid = ("S" + "." * 19, *["." * 20] * 18, "." * 19 + "G")
    assert ways_to_goal(open_grid)[0, 0] == (38, 35345263800)  # 38 choose 19


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("RDDR", ""),
        ("DRDR", ""),
        ("RD", "goal"),
        ("RRDD", "wall"),
        ("UDRDDR", "wall"),
        ("RLRDDR", "detour"),
        ("", "parse"),
        ("rddr", "parse"),
        ("R D D R", "parse"),
        ("RDDR\n", "parse"),
        ("ＲDDR", "parse"),
        ("RDDR" * 3, "length"),
        ("RL" * 10**6, "length"),
        ("__import__('os')", "length"),
    ],
)
def test_reasons(task: ShortestPathTask, response: str, reason: str) -> None:
    start = time.process_time()
    verdict = task.verify(problem_of(("S.#", "...", "#.G")), response)
    assert (verdict.reason, verdict.correct) == (reason, reason == "")
    assert (verdict.canonical is None) == (reason != "")
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("settings_", "quoted"),
    [
        ({"rows": 0}, "task.rows=0"),
        ({"rows": 1, "columns": 1}, "task.rows=1 and task.columns=1"),
        ({"blocked_probability": 1.0}, "task.blocked_probability=1.0"),
        ({"blocked_probability": -0.1}, "task.blocked_probability=-0.1"),
    ],
)
def test_bad_settings(settings_: dict[str, float], quoted: str) -> None:
    with pytest.raises(ConfigError, match=quoted):
        ShortestPathTask(ShortestPathTaskConfig(**settings_))  # type: ignore[arg-type]

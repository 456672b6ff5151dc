"""The countdown task: generator, verifier against Python's grammar, hostile answers, demonstrations."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_vp2o.config.schema import AnswerFormat, CountdownTaskConfig
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.types import Problem, Split
from megatron_vp2o.tasks.countdown import Countdown, CountdownTask
from megatron_vp2o.tasks.expressions import solutions
from tests.tasks.expression_reference import is_right


@pytest.fixture(scope="module")
def task() -> CountdownTask:
    return CountdownTask(
        CountdownTaskConfig(answer_format=AnswerFormat.strict, train_size=150, validation_size=30, test_size=30)
    )


@pytest.fixture(scope="module")
def task4() -> CountdownTask:
    return CountdownTask(
        CountdownTaskConfig(
            answer_format=AnswerFormat.strict, numbers=4, train_size=100, validation_size=20, test_size=20
        )
    )


def problem_of(numbers: list[int], target: int) -> Problem:
    data = Countdown(tuple(sorted(numbers)), target)
    return Problem(0, f"{' '.join(map(str, numbers))}={target}:", data, len(solutions(data.numbers, target)))


def test_prompts(task: CountdownTask) -> None:
    for i in range(task.size(Split.train)):
        problem = task.problem(Split.train, i)
        numbers, target = problem.prompt.removesuffix(":").split("=")
        assert tuple(sorted(map(int, numbers.split(" ")))) == problem.data.numbers
        assert int(target) == problem.data.target
        assert 1 <= problem.data.target <= 30
        assert len(problem.data.numbers) == 3
    # shown in any order
    assert any(
        task.problem(Split.train, i).prompt[0:5:2] != "".join(sorted(task.problem(Split.train, i).prompt[0:5:2]))
        for i in range(20)
    )


@pytest.mark.parametrize(("numbers", "max_number", "max_target"), [(3, 9, 30), (4, 9, 30), (4, 100, 999)])
def test_the_generator_is_reasoning_gyms(numbers: int, max_number: int, max_target: int) -> None:
    from reasoning_gym.games.countdown import CountdownConfig, CountdownDataset

    from megatron_vp2o.tasks.generators import IntegerCountdown

    config = CountdownConfig(
        min_numbers=numbers, max_numbers=numbers, max_value=max_number, min_target=1, max_target=max_target, seed=7
    )
    theirs, ours = CountdownDataset(config), IntegerCountdown(config)
    for i in range(60):
        expected, found = theirs[i]["metadata"], ours[i]["metadata"]
        assert (found["numbers"], found["target"]) == (expected["numbers"], expected["target"])


def key(problem: Problem) -> tuple[tuple[int, ...], int]:
    return problem.data.numbers, problem.data.target


def test_counts_and_demonstrations(task: CountdownTask, task4: CountdownTask) -> None:
    for some, size in ((task, 150), (task4, 40)):
        for i in range(size):
            problem = some.problem(Split.train, i)
            assert problem.n_solutions == len(solutions(problem.data.numbers, problem.data.target)) >= 1
            for seed in range(3):
                answer = some.demonstration(problem, seed)
                verdict = some.verify(problem, answer)
                assert verdict.correct and verdict.reason == "" and verdict.canonical in solutions(*key(problem))
                assert answer == some.demonstration(problem, seed)


def test_demonstrations_are_uniform(task: CountdownTask) -> None:
    problem = problem_of([2, 4, 6, 8], 24)
    drawn = Counter(
        task.verify(problem, task.demonstration(problem, seed)).canonical
        for seed in range(200 * (problem.n_solutions or 0))
    )
    assert set(drawn) == set(solutions((2, 4, 6, 8), 24))
    assert all(140 < count < 260 for count in drawn.values())  # 200 expected, standard deviation 14


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("6*(8-4)", ""),
        ("((8-4))*6", ""),
        ("(4-8)*6", "value"),
        ("6*4", "numbers"),
        ("6*4*8/8", "numbers"),
        ("24", "numbers"),
        ("6*8/4+0", "numbers"),
        ("64-8", "numbers"),
        ("6+8+4", "value"),
        ("6*(8-4)=24", "parse"),
        (" 6*(8-4)", "parse"),
        ("6*(8-4) ", "parse"),
        ("", "parse"),
        ("6*(8-4)" + " " * 200, "length"),
    ],
)
def test_reasons(task: CountdownTask, response: str, reason: str) -> None:
    verdict = task.verify(problem_of([4, 8, 6], 24), response)
    assert verdict.reason == reason
    assert verdict.correct == (reason == "")
    assert (verdict.canonical is None) == (reason != "")


def test_division_by_zero_and_exactness(task: CountdownTask) -> None:
    assert task.verify(problem_of([4, 4, 6], 24), "6/(4-4)").reason == "division"
    assert task.verify(problem_of([1, 3, 3], 1), "1/3*3").correct  # exact, though 1/3 is no binary fraction
    # off by less than a float can tell
    far = problem_of([10**8 - 1, 10**8 + 1, 10**8], 10**8)
    assert task.verify(far, f"{10**8 - 1}*{10**8 + 1}/{10**8}").reason == "value"


def test_repeated_numbers(task: CountdownTask) -> None:
    assert task.verify(problem_of([4, 4, 6], 24), "6*4").reason == "numbers"
    assert task.verify(problem_of([8, 8, 3], 24), "3*8*8/8").reason == "numbers"
    assert task.verify(problem_of([8, 8, 3], 3), "3*8/8").correct


given_numbers = st.lists(st.integers(1, 9), min_size=2, max_size=4)


@settings(max_examples=300, deadline=None)
@given(given_numbers, st.integers(1, 40), st.text("0123456789+-*/() ", max_size=14))
@example([2, 3], 5, "2+3")
@example([2, 3], 8, "2**3")
@example([2, 3], 6, "2(3)")
@example([7, 2], 3, "7//2")
@example([3, 2], 5, "+3+2")
@example([3, 2], 5, "2--3")
def test_any_text_is_judged_as_by_pythons_grammar(
    task: CountdownTask, numbers: list[int], target: int, text: str
) -> None:
    assert task.verify(problem_of(numbers, target), text).correct == is_right(text, numbers, target)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_near_answers_are_judged_as_by_pythons_grammar(task4: CountdownTask, data: st.DataObject) -> None:
    """Right answers with one character replaced, removed or put in."""
    problem = task4.problem(Split.train, data.draw(st.integers(0, 99)))
    text = task4.demonstration(problem, data.draw(st.integers(0, 1000)))
    at = data.draw(st.integers(0, len(text) - 1))
    text = text[:at] + data.draw(st.text("0123456789+-*/()", max_size=2)) + text[at + data.draw(st.integers(0, 1)) :]
    expected = is_right(text, list(problem.data.numbers), problem.data.target)
    assert task4.verify(problem, text).correct == expected


def test_hostile_answers(task: CountdownTask, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    answers = [
        f"__import__('os').system('touch {canary}')",
        f"__import__('pathlib').Path('{canary}').touch()",
        "67**50**20",
        "9**9**9**9+6*(8-4)",
        "6*(8-4)" * 10**5,
        "1" * 10**6,
        "(" * 10**4 + "6*(8-4)" + ")" * 10**4,
        "(" * 60 + "6*(8-4)" + ")" * 60,
        "6*(8-4)#",
        "6*(8-4);6",
        "6*(8-4)\n",
        "6*(8-4)\x00",
        "６*(８-４)",
        "6*(8-٤)",
        "6*(8-4_)",
        "0x6*(8-4)",
        "6*(8-0b100)",
        "06*(8-4)",
        "6.0*(8-4)",
        "--6*(8-4)",
        "-6*(4-8)",
        "6*+(8-4)",
        "6*~(8-4)",
        "6*(8-4)if 1 else 0",
        "(lambda:6*(8-4))()",
        "[6*(8-4)][0]",
        "6*(8-4),",
        "6 * (8 - 4)",
        "\t6*(8-4)",
        "   ",
        "",
        "⟨eos⟩",
    ]
    start = time.process_time()
    for answer in answers:
        verdict = task.verify(problem_of([4, 8, 6], 24), answer)
        assert not verdict.correct, answer[:50]
        assert verdict.reason in ("parse", "length", "numbers")
    assert time.process_time() - start < 1.0
    assert not canary.exists()


@pytest.mark.parametrize(
    ("settings_", "quoted"),
    [
        ({"numbers": 5}, "task.numbers=5"),
        ({"numbers": 1}, "task.numbers=1"),
        ({"min_number": 0}, "task.min_number=0"),
        ({"min_target": 31}, "task.min_target=31 and task.max_target=30"),
        ({"max_number": 10**9}, "task.max_number=1000000000"),
    ],
)
def test_bad_settings(settings_: dict[str, int], quoted: str) -> None:
    with pytest.raises(ConfigError, match=quoted):
        CountdownTask(CountdownTaskConfig(**settings_))  # type: ignore[arg-type]


def test_variants_are_the_same_problem_in_another_order(task: CountdownTask) -> None:
    for index in range(20):
        original = task.problem(Split.train, index)
        variants = [task.problem(Split.train, index, variant) for variant in range(1, 30)]
        assert all(v.data == original.data and v.n_solutions == original.n_solutions for v in variants)
        numbers, target = original.prompt[:-1].split("=")
        for variant in variants:
            ours, ours_target = variant.prompt[:-1].split("=")
            assert sorted(ours.split()) == sorted(numbers.split()) and ours_target == target
        if len(set(numbers.split())) > 1:
            assert len({v.prompt for v in variants}) > 1
        assert task.problem(Split.train, index, 7) == variants[6]

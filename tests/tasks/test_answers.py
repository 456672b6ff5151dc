"""Answers as pretrained models write them: right ones in any wrapping are right, wrong ones in any wrapping are wrong."""

from __future__ import annotations

import time
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vp2o.config.schema import AnswerFormat, CountdownTaskConfig, ShortestPathTaskConfig
from megatron_vp2o.rl.types import Problem, Split
from megatron_vp2o.tasks.answers import Unfinished, extract
from megatron_vp2o.tasks.countdown import Countdown, CountdownTask
from megatron_vp2o.tasks.expressions import solutions
from megatron_vp2o.tasks.shortest_path import ShortestPathTask
from tests.tasks.expression_reference import is_right

SMALL: dict[str, Any] = {"train_size": 60, "validation_size": 5, "test_size": 5}


@pytest.fixture(scope="module")
def countdown() -> CountdownTask:
    return CountdownTask(CountdownTaskConfig(numbers=4, **SMALL))


@pytest.fixture(scope="module")
def paths() -> ShortestPathTask:
    return ShortestPathTask(ShortestPathTaskConfig(**SMALL))


def problem_of(numbers: list[int], target: int) -> Problem:
    data = Countdown(tuple(sorted(numbers)), target)
    return Problem(0, "", data, len(solutions(data.numbers, target)))


def spaced(answer: str, random: Random, signs: str) -> str:
    """White space before and after characters that `signs` has, never inside a number."""
    gap = lambda: random.choice(["", "", " ", "  ", "\n", "\t"])  # noqa: E731
    return "".join(gap() + c + gap() if c in signs else c for c in answer)


def in_latex(answer: str, random: Random) -> str:
    names = {"*": [r"\times ", r"\cdot ", "×", "*"], "/": [r"\div ", "÷", "/"], "-": ["−", "-"]}
    names |= {"(": [r"\left(", "("], ")": [r"\right)", ")"]}
    return "".join(random.choice(names.get(c, [c])) for c in answer)


def wrapped(answer: str, random: Random) -> str:
    """The answer marked in one to three ways, with text around every mark that allows it."""
    prose = ["", "So:\n", "First 4*6=24. Then {x} and 7/2. ", "\\frac{1}{2} is not it; ", "I think <b>so</b> "]
    for _ in range(random.randrange(3)):
        answer = random.choice(
            [
                f"${answer}$",
                f"\\({answer}\\)",
                f" {answer}\n",
                f"$${answer}$$",
                f"\\[ {answer} \\]",
                f"\\boxed{{{answer}}}",
            ]
        )
    match random.randrange(4):
        case 0:
            answer = f"{random.choice(prose)}<answer>{answer}</answer>{random.choice(prose)}"
        case 1:
            answer = f"{random.choice(prose)}\\boxed{{{answer}}}{random.choice(['', '.', ' Done.'])}"
        case 2:
            answer = f"<answer>1+1</answer> No, wait. <answer>{answer}</answer>"
    if random.random() < 0.5:
        answer = f"<think>{random.choice(prose)}<answer>3*3</answer>\\boxed{{1}}</think>\n\n{answer}"
    elif random.random() < 0.3:
        answer = f"Hm </think>{random.choice(prose)}</think>\n{answer}" if answer.startswith("<") else answer
    return random.choice(["", " ", "\n"]) + answer + random.choice(["", " ", "\n", "\n\n"])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**9))
def test_right_countdown_answers_are_right_in_any_wrapping(countdown: CountdownTask, seed: int) -> None:
    random = Random(seed)
    problem = countdown.problem(Split.train, random.randrange(60))
    answer = countdown.demonstration(problem, seed)
    canonical = countdown.verify(problem, answer).canonical
    text = spaced(answer, random, "+-*/()")
    if random.random() < 0.5:
        text = in_latex(answer, random)
    if random.random() < 0.4:
        text += random.choice(["=", " = "]) + str(problem.data.target)
    verdict = countdown.verify(problem, wrapped(text, random))
    assert verdict.correct and verdict.canonical == canonical, wrapped(text, Random(seed))


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 10**9))
def test_wrong_countdown_answers_are_wrong_in_any_wrapping(countdown: CountdownTask, seed: int) -> None:
    """A right answer with random damage is judged as Python's grammar judges the damaged text, wrapped or not."""
    random = Random(seed)
    problem = countdown.problem(Split.train, random.randrange(60))
    answer = countdown.demonstration(problem, seed)
    for _ in range(random.randrange(1, 3)):
        at = random.randrange(len(answer) + 1)
        answer = answer[:at] + random.choice([*"0123456789+-*/()", ""]) + answer[at + random.randrange(2) :]
    right = is_right(answer, list(problem.data.numbers), problem.data.target)
    assert countdown.verify(problem, wrapped(answer, random)).correct == right, answer


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("6*(8-4)=24", ""),
        ("6*(8-4) = 24.", ""),
        (r"\frac{6}{1}*4", "numbers"),
        (r"\boxed{6 \times (8 - 4)}", ""),
        (r"\boxed{\left(8-4\right) \cdot 6 = 24}", ""),
        ("<think>\n\n</think>\n\n6*(8-4)", ""),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>6*(8-4)", ""),
        ("6*(8-4)=25", "value"),
        ("6*(8-4)=24=24", "parse"),
        ("6*(8-4)=4*6", "parse"),
        ("6*4=24", "numbers"),
        ("6*(8-4)=", "parse"),
        ("=24", "parse"),
        ("24=24", "numbers"),
        (r"6\,4-8", "parse"),  # not the number 64
        ("6 4-8", "parse"),
        (r"6\left4-8", "parse"),
        ("<think>6*(8-4)", "unfinished"),
        ("<think></think>", "parse"),
        ("<think>6*(8-4)</think>", "parse"),
        ("<|channel|>analysis<|message|>6*(8-4)", "unfinished"),
        ("<answer>6*(8-4)", "unfinished"),
        (r"\boxed{6*(8-4)", "unfinished"),
        ("<answer>6*(8-4)</answer><answer>1</answer>", "numbers"),
        (r"\boxed{6*(8-4)} or \boxed{6*8-4}", "value"),
        ("The answer is 6*(8-4)", "parse"),
        ("6*(8-4) or 8*6/4", "parse"),
        ("6*(8-4)6*(8-4)", "parse"),
        ("６*(８-４)", "parse"),
        ("6*(8-4_)", "parse"),
        ("\\frac{6*(8}{1)-4", "parse"),
        ("\\frac{6)*((8}{1}", "parse"),
        ("6*(8-4)" + "+0" * 80, "length"),
        (" " * 3000 + "6*(8-4)" + "\n" * 3000, ""),  # the length of the answer counts, not that of the text
        ("words " * 4000 + "<answer>6*(8-4)</answer>", ""),
        ("<answer>" + " " * 5000 + "6*" + " " * 5000 + "(8-4)</answer>", "length"),
    ],
)
def test_reasons(countdown: CountdownTask, response: str, reason: str) -> None:
    verdict = countdown.verify(problem_of([4, 8, 6], 24), response)
    assert (verdict.reason, verdict.correct) == (reason, reason == "")


def test_fractions(countdown: CountdownTask) -> None:
    assert countdown.verify(problem_of([4, 8, 6], 12), r"\boxed{\frac{8}{4}*6}").correct
    assert countdown.verify(problem_of([4, 8, 6], 12), r"\dfrac{8 \cdot 6}{4} = 12").correct
    assert countdown.verify(problem_of([1, 2, 3, 6], 9), r"\frac{6}{\frac{2}{3}}*1").correct
    assert not countdown.verify(problem_of([4, 8, 6], 12), r"\frac84*6").correct


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9))
def test_paths_in_any_wrapping(paths: ShortestPathTask, seed: int) -> None:
    random = Random(seed)
    problem = paths.problem(Split.train, random.randrange(60))
    moves = paths.demonstration(problem, seed)
    if random.random() < 0.5:
        at = random.randrange(len(moves))
        moves = moves[:at] + random.choice("UDLRx") + moves[at + 1 :]
    strict = ShortestPathTask.verify(paths, problem, moves)
    text = random.choice([moves, " ".join(moves), ", ".join(moves), "\n".join(moves)])
    verdict = paths.verify(problem, wrapped(text, random))
    assert (verdict.correct, verdict.canonical) == (strict.correct, strict.canonical)


@settings(max_examples=300, deadline=None)
@given(st.text(r"\boxed{}<answer>/think$() =24", max_size=60))
def test_any_text_has_one_answer_at_most(text: str) -> None:
    try:
        answer = extract(text, AnswerFormat.lenient)
    except Unfinished:
        return
    assert answer == answer.strip() and answer in text
    assert extract(text, AnswerFormat.strict) == text


def test_time_is_bounded(countdown: CountdownTask, paths: ShortestPathTask) -> None:
    problem, grid = problem_of([4, 8, 6], 24), paths.problem(Split.train, 0)
    hostile = [
        r"\boxed{" * 10**5,
        r"\boxed{1}" * 10**5,
        r"\frac{" * 10**5,
        r"\frac{1}{2}" * 300,
        "<answer>" * 10**5,
        "<answer></answer>" * 10**5,
        "</think>" * 10**5,
        "$" * 10**6,
        " " * 10**6,
        "1 " * 10**6,
        "R," * 10**6,
        "=" * 10**6,
        "(" * 10**6,
    ]
    start = time.process_time()
    for text in hostile:
        assert not countdown.verify(problem, text).correct
        assert not paths.verify(grid, text).correct
    assert time.process_time() - start < 5.0

"""Brackets and change, each against a search over everything that could be written, and against formulas."""

from __future__ import annotations

from itertools import combinations_with_replacement, product
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vp2o.config.schema import AnswerFormat, BracketsTaskConfig, ChangeTaskConfig
from megatron_vp2o.rl.types import Problem
from megatron_vp2o.tasks import brackets, change
from megatron_vp2o.tasks.brackets import Brackets, BracketsTask
from megatron_vp2o.tasks.change import Change, ChangeTask

SIZES = {"train_size": 20, "validation_size": 4, "test_size": 4, "min_answers": 2}
STRICT = {**SIZES, "answer_format": AnswerFormat.strict}
STRICT_BRACKETS, LENIENT_BRACKETS = (BracketsTask(BracketsTaskConfig(**form)) for form in (STRICT, SIZES))  # type: ignore[arg-type]
STRICT_CHANGE, LENIENT_CHANGE = (ChangeTask(ChangeTaskConfig(**form)) for form in (STRICT, SIZES))  # type: ignore[arg-type]


def balanced(text: str) -> bool:
    """By taking pairs out until nothing changes: another way than counting heights."""
    while "()" in text:
        text = text.replace("()", "")
    return not text


@pytest.mark.parametrize("pairs", range(1, 11))
def test_without_given_brackets_there_are_narayanas_numbers(pairs):
    counts = [brackets.ways("?" * (2 * pairs), 0, peaks, False) for peaks in range(pairs + 2)]
    assert counts == [0, *(comb(pairs, k) * comb(pairs, k - 1) // pairs for k in range(1, pairs + 1)), 0]
    assert sum(counts) == comb(2 * pairs, pairs) // (pairs + 1), "Catalan's number"


@st.composite
def bracket_problems(draw):
    places = draw(st.integers(1, 4)) * 2
    template = "".join(draw(st.lists(st.sampled_from("???()"), min_size=places, max_size=places)))
    return Brackets(template, draw(st.integers(1, places // 2 + 1)))


@settings(max_examples=80, deadline=None)
@given(bracket_problems())
def test_brackets_are_counted_and_judged_as_by_search(data):
    problem, right = Problem(0, "", data, 0), set()
    for characters in product("()", repeat=len(data.template)):
        text = "".join(characters)
        fits = all(a in ("?", b) for a, b in zip(data.template, text, strict=True))
        peaks = sum(text[i : i + 2] == "()" for i in range(len(text)))
        verdict = STRICT_BRACKETS.verify(problem, text)
        assert verdict.correct == (fits and balanced(text) and peaks == data.peaks)
        assert verdict.canonical == (text if verdict.correct else None)
        reason = "given" if not fits else "balance" if not balanced(text) else "peaks" if peaks != data.peaks else ""
        assert verdict.reason == reason
        if verdict.correct:
            right.add(text)
            assert LENIENT_BRACKETS.verify(problem, f"<think>(</think> {' '.join(text)} ").canonical == text
    assert brackets.ways(data.template, 0, data.peaks, False) == len(right)
    for text in ("", "()" * 20, "(" * (len(data.template) - 1), "[" * len(data.template), " " * len(data.template)):
        assert STRICT_BRACKETS.verify(problem, text).reason == "parse"


@st.composite
def change_problems(draw):
    kinds = tuple(sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=5))))
    coins = draw(st.integers(1, 4))
    return Change(kinds, draw(st.integers(1, kinds[-1] * coins + 2)), coins)


@settings(max_examples=30, deadline=None)
@given(change_problems(), st.randoms(use_true_random=False))
def test_change_is_counted_and_judged_as_by_search(data, random):
    problem, right = Problem(0, "", data, 0), set()
    for count in range(1, data.coins + 2):
        for digits in combinations_with_replacement(range(1, 10), count):
            if sum(digits) != data.amount and random.random() < 0.9:
                continue  # most rows of digits are wrong in the same way
            text = "".join(map(str, random.sample(digits, count)))
            allowed = count <= data.coins and sum(digits) == data.amount and set(digits) <= set(data.kinds)
            verdict = STRICT_CHANGE.verify(problem, text)
            assert verdict.correct == allowed, (text, verdict)
            assert verdict.canonical == ("".join(map(str, digits)) if allowed else None)
            if allowed:
                right.add(digits)
                assert LENIENT_CHANGE.verify(problem, f"\\boxed{{{' + '.join(text)}}}").canonical == verdict.canonical
    assert change.ways(data.kinds, data.amount, data.coins) == len(right)
    for text in ("", "0", "1+1", "-1", "1.5", "\u0663", "a"):
        assert STRICT_CHANGE.verify(problem, text).reason == "parse"
    assert STRICT_CHANGE.verify(problem, "9" * 100_000).reason == "count"


@settings(max_examples=40, deadline=None)
@given(change_problems())
def test_change_is_counted_as_by_its_generating_function(data):
    """The coefficient of x^amount y^n in the product of 1 / (1 - y x^kind), summed over n up to the coins."""
    counts = [[0] * (data.amount + 1) for _ in range(data.coins + 1)]
    counts[0][0] = 1
    for kind in data.kinds:
        for coins in range(1, data.coins + 1):
            for amount in range(kind, data.amount + 1):
                counts[coins][amount] += counts[coins - 1][amount - kind]
    assert change.ways(data.kinds, data.amount, data.coins) == sum(row[data.amount] for row in counts)

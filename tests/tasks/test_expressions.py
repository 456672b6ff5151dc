"""Parser, normal form and enumeration against Python's parser and against every tree there is."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vp2o.tasks.expressions import (
    MAX_DEPTH,
    MAX_DIGITS,
    Rejected,
    normalise,
    parse,
    reword,
    solutions,
    write,
)
from tests.tasks.expression_reference import all_trees, evaluate, text_of

trees = st.recursive(
    st.integers(0, 12), lambda children: st.tuples(st.sampled_from("+-*/"), children, children), max_leaves=7
)


def form_of(text: str) -> Any:
    return normalise(parse(text)[0]).form


@settings(max_examples=200, deadline=None)
@given(trees)
def test_values_and_numbers_agree_with_the_tree(tree: Any) -> None:
    text = text_of(tree)
    parsed, numbers = parse(text)
    assert parsed == tree
    assert numbers == [int(digits) for digits in re.findall(r"[0-9]+", text)]
    try:
        expected = evaluate(tree)
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            normalise(parsed)
    else:
        assert normalise(parsed).value == expected


def test_precedence_and_associativity() -> None:
    assert parse("1-2-3*4/5")[0] == ("-", ("-", 1, 2), ("/", ("*", 3, 4), 5))
    assert parse("((7))")[0] == 7


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *((text, "parse") for text in ["", " ", "1+", "+1", "-1", "--3", "2--1", "1++2", "*", "()", "(1", "1)", "1 2"]),
        *(
            (text, "parse")
            for text in ["1 +2", "1+2\n", "2**3", "7//2", "1_0", "0x1", "1.0", "1e3", "01", "00", "2(3)"]
        ),
        *(
            (text, "parse")
            for text in ["１+2", "²", "٣", "x", "1+2=3", "1,2", "True", "1−2", "6×4", "end", "1if 1else 2"]
        ),
        ("1" * (MAX_DIGITS + 1), "length"),
        ("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1), "length"),
        ("1+" * 64 + "1", "length"),
    ],
)
def test_what_is_no_expression(text: str, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        parse(text)
    assert str(caught.value) == reason


def test_what_is_just_allowed() -> None:
    assert parse("9" * MAX_DIGITS)[1] == [10**MAX_DIGITS - 1]
    assert parse("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH)[0] == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1+2+3", "3+(2+1)"),
        ("2*3*4", "4*(3*2)"),
        ("9-(4-3)", "9+3-4"),
        ("9-(4+3)", "9-4-3"),
        ("8/(4/2)", "8*2/4"),
        ("8/(4*2)", "8/4/2"),
        ("(5-2)*(4-1)", "(2-5)*(1-4)"),
        ("9-(5-2)*3", "9+(2-5)*3"),
        ("(5-2)/(4-1)", "(2-5)/(1-4)"),
        ("9-3/(2-5)", "9+3/(5-2)"),
        ("7+(4-4)*2", "7-2*(4-4)"),
        ("7+4-4", "7-(4-4)"),
    ],
)
def test_same_answers(one: str, other: str) -> None:
    assert form_of(one) == form_of(other)
    assert write(form_of(one)) == write(form_of(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("(1+2)*3", "1*3+2*3"),
        ("4*1", "4/1"),
        ("9-2-3", "9-(2-3)"),
        ("2+2", "2*2"),
        ("8/4/2", "8/(4/2)"),
        ("7+4-4", "7*4/4"),
        ("(5-2)*(4-1)", "(5-2)*(1-4)+0"),
    ],
)
def test_different_answers(one: str, other: str) -> None:
    assert form_of(one) != form_of(other)


def rewrite(tree: Any, rng: random.Random) -> Any:
    """The same answer written differently: each node is turned, regrouped or has a sign moved, by chance."""
    if isinstance(tree, int):
        return tree
    operator, x, y = tree[0], rewrite(tree[1], rng), rewrite(tree[2], rng)
    candidates = [(operator, x, y)]
    if operator in "+*":
        candidates.append((operator, y, x))
        if not isinstance(y, int) and y[0] == operator:
            candidates.append((operator, (operator, x, y[1]), y[2]))
    down = {"-": "+", "/": "*"}.get(operator)
    if down and not isinstance(y, int) and y[0] == operator:  # a-(b-c) = (a+c)-b
        candidates.append((operator, (down, x, y[2]), y[1]))
    if down and not isinstance(x, int) and x[0] == down:  # (a+b)-c = a+(b-c)
        candidates.append((down, x[1], (operator, x[2], y)))
    if operator in "+-" and not isinstance(y, int) and y[0] in "*/" and not isinstance(y[1], int) and y[1][0] == "-":
        inner = (y[0], ("-", y[1][2], y[1][1]), y[2])  # a-(b-c)*d = a+(c-b)*d
        candidates.append(("-" if operator == "+" else "+", x, inner))
    return rng.choice(candidates)


@settings(max_examples=200, deadline=None)
@given(trees, st.integers(0, 2**32))
def test_the_normal_form_survives_rewriting(tree: Any, seed: int) -> None:
    try:
        before = normalise(tree)
        after = normalise(rewrite(tree, random.Random(seed)))
    except ZeroDivisionError:
        return
    assert after == before


@settings(max_examples=200, deadline=None)
@given(trees)
def test_writing_gives_the_form_back(tree: Any) -> None:
    try:
        node = normalise(tree)
    except ZeroDivisionError:
        return
    text = write(node.form)
    back = normalise(parse(text)[0])
    assert back.form == node.form
    assert back.value == abs(node.value)


@pytest.mark.parametrize(("numbers", "count"), [((101, 10007), 6), ((101, 10007, 1000003), 68)])
def test_forms_are_the_inequivalent_expressions(numbers: tuple[int, ...], count: int) -> None:
    """On numbers too odd for coincidences two trees have one form just if they have one value. Counts: OEIS A140606."""
    form_of_value: dict[Any, Any] = {}
    for tree in all_trees(numbers):
        node = normalise(tree)
        assert form_of_value.setdefault(node.value, (node.form, node.sign)) == (node.form, node.sign)
    assert len(form_of_value) == len(set(form_of_value.values())) == count


def test_forms_of_four_numbers() -> None:
    """As above; evaluated modulo nothing, so once is enough: 7,680 trees, 1,170 inequivalent expressions."""
    nodes = [normalise(tree) for tree in all_trees((101, 10007, 1000003, 100000007))]
    pairs = {(node.value, node.form, node.sign) for node in nodes}
    assert len(pairs) == len({node.value for node in nodes}) == len({(node.form, node.sign) for node in nodes}) == 1170


def naive_solutions(numbers: tuple[int, ...], target: int) -> set[str]:
    found = set()
    for tree in all_trees(numbers):
        try:
            if evaluate(tree) == target:
                found.add(write(normalise(tree).form))
        except ZeroDivisionError:
            continue
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=3), st.integers(1, 30))
def test_enumeration_is_exhaustive_for_up_to_three_numbers(numbers: list[int], target: int) -> None:
    found = solutions(tuple(sorted(numbers)), target)
    assert list(found) == sorted(naive_solutions(tuple(numbers), target))


@pytest.mark.parametrize(
    ("numbers", "target"),
    [((2, 4, 6, 8), 24), ((3, 3, 8, 8), 24), ((4, 4, 4, 4), 8), ((1, 5, 5, 5), 24), ((1, 2, 3, 4), 10)],
)
def test_enumeration_is_exhaustive_for_four_numbers(numbers: tuple[int, ...], target: int) -> None:
    found = solutions(numbers, target)
    assert found
    assert list(found) == sorted(naive_solutions(numbers, target))


def test_known_answers() -> None:
    assert solutions((3, 3, 8, 8), 24) == ("8/(3-8/3)",)
    assert solutions((2, 3, 4), 24) == ("4*3*2",)
    assert solutions((1, 1), 30) == ()


def test_parentheses_are_minimal() -> None:
    for text in solutions((2, 4, 6, 8), 24) + solutions((3, 4, 5, 9), 12):
        for start in (i for i, character in enumerate(text) if character == "("):
            depth, end = 1, start
            while depth:
                end += 1
                depth += {"(": 1, ")": -1}.get(text[end], 0)
            assert form_of(text[:start] + text[start + 1 : end] + text[end + 1 :]) != form_of(text)


def test_reword_keeps_the_solution_and_uses_its_freedom():
    for text in ("6*(8-4)", "9-(2+3)", "8/(4/2)", "8/(2*4)", "7+5-3", "2*(3+4)*5", "9-(5-2)"):
        form = normalise(parse(text)[0])
        wordings = {reword(text, random.Random(seed)) for seed in range(40)}
        assert all(normalise(parse(wording)[0]) == form for wording in wordings), wordings
        assert len(wordings) > 1 or not set("+*") & set(text), text
    assert reword("(1+2)+3", random.Random(0)).count("(") == 0

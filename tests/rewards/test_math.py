"""reward=math: what math-verify says of our pairs, and that nothing a model wrote is evaluated."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import pytest
import sympy

from megatron_vp2o.rewards.grade import RowError
from megatron_vp2o.rewards.graders.math import Math, arithmetic
from megatron_vp2o.rewards.graders.text import boxed
from tests.rewards.math_pairs import PAIRS, disagreements

KNOWN = {  # listed in docs/rewards.md
    ("1.5e3", "1500"),
    (r"0.\overline{3}", r"\boxed{\frac{1}{3}}"),
    (r"\emptyset", r"\boxed{\varnothing}"),
    (r"\ln 2", r"\boxed{\log_e 2}"),
    ("12", "twelve"),
}


def test_agreement_on_pairs_of_many_forms() -> None:
    """Never more generous than a careful reader; stricter only where the documentation says so."""
    assert len(PAIRS) >= 200 and len({pair.form for pair in PAIRS}) >= 12
    assert {(pair.answer, pair.response) for pair in disagreements() if pair.right} == KNOWN
    assert [pair for pair in disagreements() if not pair.right] == []
    document = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    for answer, response in KNOWN:
        assert f"`{answer}`" in document and f"`{response}`" in document
    assert f"{len(PAIRS) - len(KNOWN)} of {len(PAIRS)}" in document


def test_fractions_written_at_random() -> None:
    """Against Python's own fractions."""
    math, draw = Math(), random.Random(5)
    for _ in range(150):
        a, b, c, d = (draw.randint(1, 30) for _ in range(4))
        first, second = Fraction(a, b), Fraction(c, d)
        if draw.random() < 0.5:
            factor = draw.randint(1, 9)
            c, d, second = a * factor, b * factor, first
        styles = [rf"\boxed{{\frac{{{c}}}{{{d}}}}}", f"The answer is {c}/{d}.", rf"so $x = {c}/{d}$", f"{c} / {d}"]
        response = draw.choice(styles)
        assert math.grade("", response, {"answer": f"{a}/{b}"}).reward == float(first == second), (a, b, response)


def test_arithmetic_equals_exact_fractions() -> None:
    draw = random.Random(11)

    def write(depth: int) -> str:
        if depth == 0:
            return str(draw.randint(1, 20))
        left, right = write(depth - 1), write(draw.randint(0, depth - 1))
        return (
            f"({left}) {draw.choice('+-*')} ({right})" if draw.random() < 0.8 else f"-({left}) / {draw.randint(1, 9)}"
        )

    for _ in range(60):
        text = write(draw.randint(1, 4))
        with_fractions = eval(__import__("re").sub(r"\d+", r"Fraction(\g<0>)", text), {"Fraction": Fraction})
        assert arithmetic(text).doit() == sympy.Rational(with_fractions.numerator, with_fractions.denominator)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch /tmp/owned')",
        "(1).__class__",
        "print(1)",
        "[1 for _ in range(9)]",
        "lambda: 1",
        "1 if 1 else 2",
        "f'{1}'",
        "x + 1",
        "1 + ",
        "(" * 5000 + "1" + ")" * 5000,
    ],
)
def test_only_arithmetic_is_read(text: str) -> None:
    with pytest.raises(ValueError, match="arithmetic"):
        arithmetic(text)


def test_nothing_is_evaluated(tmp_path: Path) -> None:
    math, mark = Math(), tmp_path / "owned"
    for call in (
        f"__import__('pathlib').Path('{mark}').touch()",
        f"open('{mark}','w')",
        f'exec(\'open("{mark}","w")\')',
    ):
        for response in (
            call,
            rf"\boxed{{{call}}}",
            f"${call}$",
            f"The answer is 1+({call})",
            rf"\boxed{{\text{{{call}}}}}",
        ):
            assert math.grade("", response, {"answer": "5"}).reward == 0.0
    assert not mark.exists()


def test_boxes() -> None:
    assert boxed(r"\boxed{1} then \boxed{ \frac{1}{2} }") == r"\frac{1}{2}"
    assert boxed(r"\boxed{\frac{1}{2}") is None
    assert boxed("no box") is None


def test_an_answer_that_cannot_be_read_is_the_rows_fault() -> None:
    with pytest.raises(RowError, match="nothing that math-verify can read"):
        Math().grade("", "5", {"answer": "?"})
    with pytest.raises(RowError, match="of type list"):
        Math().grade("", "5", {"answer": ["5"]})

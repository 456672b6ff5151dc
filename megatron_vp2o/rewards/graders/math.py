"""Mathematics: is the response's answer equal to the row's, however the two are written? math-verify decides.

math-verify reads LaTeX with a grammar, but plain arithmetic (`1/2+3`) with sympy's `parse_expr`, which evaluates it as
Python. Here a parser takes its place that knows numbers, + - * / and powers, and evaluates nothing.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import math_verify.parser
import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megatron_vp2o.rewards.grade import Grade, RowError, right, wrong
from megatron_vp2o.rewards.graders.base import Grader, answer_text
from megatron_vp2o.rewards.graders.text import boxed, solution

_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\{\s*percent\s*\}|percent)\s*$", re.IGNORECASE)
_QUANTITY = re.compile(r"([-+]?\d[\d.,/]*)\s+[A-Za-z][A-Za-z./^\d ]*")
"""A number and a unit in plain letters, which LaTeX would read as a product of variables."""
_OPERATIONS = {ast.Add: sympy.Add, ast.Mult: sympy.Mul, ast.Pow: sympy.Pow}


class Math(Grader):
    """1 where math-verify says that the answers are equal. `canonical` is the row's answer: there is but one."""

    def __init__(self) -> None:
        math_verify.parser.parse_expr = arithmetic
        math_verify.parser.parse_expr_cached.cache_clear()
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that time limits are the caller's: they are
        _parsed(r"\boxed{\frac{1}{2}}")  # builds the tables of the grammar, once for all workers

    def grade(self, prompt: str, response: str, row: Mapping[str, Any]) -> Grade:
        answer = answer_text(row)
        wanted = reference(answer)
        if not wanted:
            raise RowError(f"its `answer` {answer!r:.80} is nothing that math-verify can read")
        written = solution(response)
        box = boxed(written)
        if box == "".join(answer.split()):  # most right answers; spares parsing them
            return right(answer)
        found = _parsed(written) if box is None or not _PERCENT.search(box) else _values(box)
        if not found:
            return wrong("no answer found")
        if verify(list(wanted), found, timeout_seconds=None, allow_set_relation_comp=True):
            return right(answer)
        return wrong("another value")


@lru_cache(maxsize=256)
def reference(answer: str) -> tuple[Any, ...]:
    """A reference answer as math-verify holds it; empty where it cannot be read. Bare LaTeX, or text with formulas in it."""
    if not any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\[")) and (values := _values(answer)):
        return tuple(values)
    return tuple(_parsed(answer))


def _values(latex: str) -> list[Any]:
    """What a bare formula may mean: where it ends with a percent sign, the number, and a hundredth of it."""
    quantity = _QUANTITY.fullmatch(latex.strip())
    number, percents = _PERCENT.subn("", latex if quantity is None else quantity[1])
    values = [value for value in _parsed(f"${number}$") if not isinstance(value, str)]
    hundredths = [value / 100 for value in values if isinstance(value, sympy.Expr)] if percents else []
    return values + hundredths


def _parsed(text: str) -> list[Any]:
    return parse(text, extraction_config=_EXTRACTION, parsing_timeout=None)


def arithmetic(text: str, evaluate: bool = False) -> sympy.Expr:
    """Numbers with + - * / ** and parentheses as an expression that is not evaluated.

    Raises:
        ValueError: anything else, or nested too deeply.
    """
    try:
        return _expression(ast.parse(text.strip().replace("×", "*").replace("÷", "/"), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"no arithmetic: {text[:40]!r}") from error


def _expression(node: ast.expr) -> sympy.Expr:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return sympy.Rational(str(node.value))  # exact, so that `150/42.` at the end of a sentence is what it says
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _expression(node.operand)
        return value if isinstance(node.op, ast.UAdd) else sympy.Mul(-1, value, evaluate=False)
    if isinstance(node, ast.BinOp):
        left, right_ = _expression(node.left), _expression(node.right)
        if isinstance(node.op, ast.Sub):
            return sympy.Add(left, sympy.Mul(-1, right_, evaluate=False), evaluate=False)
        if isinstance(node.op, ast.Div):
            return sympy.Mul(left, sympy.Pow(right_, -1, evaluate=False), evaluate=False)
        if type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](left, right_, evaluate=False)
    raise ValueError(f"{type(node).__name__} is no arithmetic")

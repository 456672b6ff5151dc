"""Naive twins of the expression machinery: Python's own parser, and enumeration of every tree."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from fractions import Fraction
from itertools import permutations
from typing import Any

OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def evaluate(node: Any) -> Fraction:
    """The value of a tree of ints and (operator, left, right)."""
    if isinstance(node, int):
        return Fraction(node)
    operator, left, right = node
    a, b = evaluate(left), evaluate(right)
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[operator]()


def text_of(node: Any) -> str:
    """A tree in writing, with all its parentheses."""
    return str(node) if isinstance(node, int) else f"({text_of(node[1])}{node[0]}{text_of(node[2])})"


def is_right(text: str, numbers: list[int], target: int) -> bool:
    """Does Python's grammar, less all that the task does not allow, make `text` a right answer?"""
    if not re.fullmatch(r"[0-9+*/()-]{1,128}", text) or re.search(r"(?<![0-9])0[0-9]", text):
        return False
    used: list[int] = []

    def walk(node: ast.AST) -> Fraction:
        match node:
            case ast.Expression(body=body):
                return walk(body)
            case ast.Constant(value=int(value)):
                used.append(value)
                return Fraction(value)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](walk(left), walk(right))
        raise SyntaxError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # 3(4) looks like a call
            value = walk(ast.parse(text, mode="eval"))
    except (SyntaxError, ZeroDivisionError):
        return False
    return sorted(used) == sorted(numbers) and value == target


def all_trees(numbers: tuple[int, ...]) -> Iterator[Any]:
    """Every binary tree over every order of the numbers with every choice of operators."""
    for order in permutations(numbers):
        yield from _trees(order)


def _trees(leaves: tuple[int, ...]) -> Iterator[Any]:
    if len(leaves) == 1:
        yield leaves[0]
    for cut in range(1, len(leaves)):
        for left in _trees(leaves[:cut]):
            for right in _trees(leaves[cut:]):
                yield from ((operator, left, right) for operator in "+-*/")

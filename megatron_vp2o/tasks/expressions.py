"""Arithmetic expressions: a bounded parser, exact values, a normal form, and all right answers by enumeration.

Nothing here executes text.  The grammar has numbers, + - * / and parentheses: no sign before a number, no powers, no
spaces.

The normal form.  Two expressions count as one answer if they differ only by
  - the order and grouping of terms in sums and of factors in products: (a+b)+c, c+(b+a);
  - how subtraction and division are nested: a-(b-c) and a+c-b, a/(b/c) and a*c/b;
  - a sign pulled out of a difference: (a-b)*(c-d) and (b-a)*(d-c), a-(b-c)*d and a+(c-b)*d.
Nothing is computed: a*1 and a/1 are different answers, and so are (a+b)*c and a*c+b*c.

A form is a nested tuple, ordered and hashable, and stands for an expression without its sign:
  ("", n)                          the number n
  ("*", numerators, denominators)  sorted forms, none of which is itself a product or quotient
  ("+", ((form, sign), ...))       sorted; no form is itself a sum.  Of two opposite signings, the larger one
A sign is 1, -1, or 0 for a form that equals its own negative, as b-b does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from random import Random
from typing import Any, NamedTuple

MAX_CHARACTERS = 128
MAX_DIGITS = 9
MAX_DEPTH = 16

Tree = Any  # an int, or (operator, Tree, Tree)
Form = tuple[Any, ...]


class Rejected(Exception):
    """A text that is no expression; the argument is the short reason, "length" or "parse"."""


class Signed(NamedTuple):
    """A normal form with its sign and the value of the whole."""

    form: Form
    sign: int
    value: Fraction


def parse(text: str) -> tuple[Tree, list[int]]:
    """The tree of an expression, and the numbers in it from left to right.

    Raises Rejected: "length" beyond `MAX_CHARACTERS`, `MAX_DIGITS` in a number or `MAX_DEPTH` open parentheses; "parse"
    for whatever else is not in the grammar, numbers with leading zeros included.
    """
    if len(text) > MAX_CHARACTERS:
        raise Rejected("length")
    parser = _Parser(text)
    tree = parser.sum(0)
    if parser.at != len(text):
        raise Rejected("parse")
    return tree, parser.numbers


class _Parser:
    """Recursive descent. The depth of the recursion is bounded by `MAX_DEPTH`, its breadth by `MAX_CHARACTERS`."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.numbers: list[int] = []

    def _next(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def sum(self, depth: int) -> Tree:
        tree = self.product(depth)
        while (operator := self._next()) in ("+", "-"):
            self.at += 1
            tree = (operator, tree, self.product(depth))
        return tree

    def product(self, depth: int) -> Tree:
        tree = self.operand(depth)
        while (operator := self._next()) in ("*", "/"):
            self.at += 1
            tree = (operator, tree, self.operand(depth))
        return tree

    def operand(self, depth: int) -> Tree:
        if self._next() == "(":
            if depth == MAX_DEPTH:
                raise Rejected("length")
            self.at += 1
            tree = self.sum(depth + 1)
            if self._next() != ")":
                raise Rejected("parse")
            self.at += 1
            return tree
        start = self.at
        while self._next() in _DIGITS:
            self.at += 1
        digits = self.text[start : self.at]
        if len(digits) > MAX_DIGITS:
            raise Rejected("length")
        if not digits or (digits[0] == "0" and digits != "0"):
            raise Rejected("parse")
        self.numbers.append(int(digits))
        return self.numbers[-1]


_DIGITS = frozenset("0123456789")


def normalise(tree: Tree) -> Signed:
    """Value and normal form of a parsed expression. Raises ZeroDivisionError."""
    if isinstance(tree, int):
        return _number(tree)
    operator, left, right = tree
    x, y = normalise(left), normalise(right)
    match operator:
        case "+":
            return _add(x, y)
        case "-":
            return _add(x, _negative(y))
        case "*":
            return _multiply(x, y)
        case _:
            return _divide(x, y)


def _number(n: int) -> Signed:
    return Signed(("", n), 1, Fraction(n))


def _negative(x: Signed) -> Signed:
    return Signed(x.form, -x.sign, -x.value)


def _add(x: Signed, y: Signed) -> Signed:
    terms = tuple(sorted(_terms(x) + _terms(y)))
    opposite = tuple(sorted((form, -sign) for form, sign in terms))
    if terms == opposite:
        return Signed(("+", terms), 0, x.value + y.value)
    return Signed(("+", max(terms, opposite)), 1 if terms > opposite else -1, x.value + y.value)


def _terms(x: Signed) -> tuple[tuple[Form, int], ...]:
    if x.form[0] != "+":
        return ((x.form, x.sign),)
    return tuple((form, -sign) for form, sign in x.form[1]) if x.sign < 0 else x.form[1]


def _multiply(x: Signed, y: Signed) -> Signed:
    above, below = _factors(x)
    above_y, below_y = _factors(y)
    return Signed(_product(above + above_y, below + below_y), x.sign * y.sign, x.value * y.value)


def _divide(x: Signed, y: Signed) -> Signed:
    above, below = _factors(x)
    above_y, below_y = _factors(y)
    return Signed(_product(above + below_y, below + above_y), x.sign * y.sign, x.value / y.value)


def _product(above: tuple[Form, ...], below: tuple[Form, ...]) -> Form:
    return ("*", tuple(sorted(above)), tuple(sorted(below)))


def _factors(x: Signed) -> tuple[tuple[Form, ...], tuple[Form, ...]]:
    return (x.form[1], x.form[2]) if x.form[0] == "*" else ((x.form,), ())


class _Text(NamedTuple):
    """A form in writing, signed so that its value is not negative."""

    value: Fraction
    text: str
    sign: int  # of the value of the form itself
    is_sum: bool


def write(form: Form) -> str:
    """The one text that stands for a normal form, with as few parentheses as can be.

    Every part is written so that its value is not negative; of terms and of factors the larger come first.  Such a
    writing exists, because a form with a value above zero has, all the way down, a part above zero to begin with.
    """
    return _write(form).text


def _write(form: Form) -> _Text:
    if form[0] == "":
        return _Text(Fraction(form[1]), str(form[1]), 1, False)
    return _write_sum(form[1]) if form[0] == "+" else _write_product(form[1], form[2])


def _write_sum(signed_forms: tuple[tuple[Form, int], ...]) -> _Text:
    terms = []
    for form, sign in signed_forms:
        term = _write(form)
        terms.append((term, term.sign * (sign or 1)))  # what is its own negative may take the plus
    value = sum((term.value * sign for term, sign in terms), Fraction(0))
    # A zero may take either sign too: the one that has something to begin with.
    flip = -1 if value < 0 or all(sign < 0 for _, sign in terms) else 1
    added = _largest_first(term for term, sign in terms if sign == flip)
    taken = _largest_first(term for term, sign in terms if sign != flip)
    text = "+".join(term.text for term in added) + "".join("-" + term.text for term in taken)
    return _Text(abs(value), text, flip, True)


def _write_product(above: tuple[Form, ...], below: tuple[Form, ...]) -> _Text:
    numerators, denominators = _largest_first(map(_write, above)), _largest_first(map(_write, below))
    value, sign = Fraction(1), 1
    for factor in numerators:
        value, sign = value * factor.value, sign * factor.sign
    for factor in denominators:
        value, sign = value / factor.value, sign * factor.sign
    text = "*".join(map(_bracketed, numerators)) + "".join("/" + _bracketed(factor) for factor in denominators)
    return _Text(value, text, sign, False)


def _largest_first(parts: Iterable[_Text]) -> list[_Text]:
    return sorted(parts, key=lambda part: (-part.value, part.text))


def _bracketed(part: _Text) -> str:
    return f"({part.text})" if part.is_sum else part.text


_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


def reword(text: str, random: Random) -> str:
    """The same solution in other words: operands of each `+` and `*` change places by chance. No needless parentheses."""
    return _reword(parse(text)[0], random)[0]


def _reword(tree: Tree, random: Random) -> tuple[str, int]:
    """Text and precedence of its outermost operator."""
    if isinstance(tree, int):
        return str(tree), 3
    operator, left, right = tree
    if operator in "+*" and random.random() < 0.5:
        left, right = right, left
    level = _PRECEDENCE[operator]
    (first, first_level), (second, second_level) = _reword(left, random), _reword(right, random)
    if first_level < level:
        first = f"({first})"
    # a - (b + c) and a / (b * c) need theirs; a + (b - c) and a * (b / c) are as well written without
    if second_level < level or (second_level == level and operator in "-/"):
        second = f"({second})"
    return first + operator + second, level


@lru_cache(maxsize=8192)
def solutions(numbers: tuple[int, ...], target: int) -> tuple[str, ...]:
    """Texts of all distinct expressions (see the module's top) that use each number once and have the value `target`.

    Args:
        numbers: at least two, positive, sorted.  Repeated numbers cannot be told apart.
        target: positive.  A form of value -target is an answer too: some difference in it can be turned round.

    Sorted.  Exhaustive: about 1,000 expressions of 4 numbers, and 25 times as many for each further one.
    """
    found: set[Form] = set()
    for left, right in _partitions(numbers):
        xs, ys = _unsigned(left), _unsigned(right)
        floats_x, floats_y = [float(x.value) for x in xs], [float(y.value) for y in ys]
        # Most combinations miss the target by far: floats sort those out, much faster than fractions and forms.
        slack = 1e-9 * (target + max(map(abs, floats_x)) + max(map(abs, floats_y)))
        for x, a in zip(xs, floats_x, strict=True):
            for y, b in zip(ys, floats_y, strict=True):
                near = (
                    abs(abs(a + b) - target) <= slack
                    or abs(abs(a - b) - target) <= slack
                    or abs(abs(a * b) - target) <= slack
                    or abs(abs(a) - target * abs(b)) <= target * slack
                    or abs(abs(b) - target * abs(a)) <= target * slack
                )
                if near:
                    found.update(result.form for result in _combinations(x, y) if abs(result.value) == target)
    return tuple(sorted(map(write, found)))


@lru_cache(maxsize=4096)
def _unsigned(numbers: tuple[int, ...]) -> tuple[Signed, ...]:
    """All distinct forms of the numbers, each once: with the opposite sign it makes the same forms of more numbers."""
    if len(numbers) == 1:
        return (_number(numbers[0]),)
    found: dict[Form, Signed] = {}
    for left, right in _partitions(numbers):
        for x in _unsigned(left):
            for y in _unsigned(right):
                for result in _combinations(x, y):
                    found.setdefault(result.form, _negative(result) if result.sign < 0 else result)
    return tuple(found.values())


def _combinations(x: Signed, y: Signed) -> Iterator[Signed]:
    """What one operator makes of the two, but for signs."""
    yield _add(x, y)
    yield _add(x, _negative(y))
    yield _multiply(x, y)
    if y.value:
        yield _divide(x, y)
    if x.value:
        yield _divide(y, x)


def _partitions(numbers: tuple[int, ...]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The ways to part a sorted multiset in two. The first number goes left, so that no way comes mirrored."""
    rest = range(1, len(numbers))
    ways = set()
    for size in range(len(numbers) - 1):
        for chosen in combinations(rest, size):
            left = (numbers[0], *(numbers[i] for i in chosen))
            ways.add((left, tuple(numbers[i] for i in rest if i not in chosen)))
    return ways

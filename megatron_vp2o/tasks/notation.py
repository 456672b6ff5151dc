"""Arithmetic as people and models write it, into the one grammar that `expressions.parse` reads.

Only notation changes: × for *, LaTeX's names of operators and its fractions, white space, a full stop at the end. No number and no
operation is added, taken away or put elsewhere.
"""

from __future__ import annotations

import re

from megatron_vp2o.tasks.expressions import Rejected, parse

MAX_RAW_CHARACTERS = 4096  # of an answer in anybody's notation; what remains has its own, much smaller limit

SIGNS = str.maketrans({"×": "*", "⋅": "*", "·": "*", "∗": "*", "÷": "/", "∕": "/", "−": "-", "–": "-"})
COMMANDS = {"times": "*", "cdot": "*", "ast": "*", "div": "/"}
_COMMAND = re.compile(r"\\(?:(times|cdot|ast|div|left|right)(?![a-zA-Z])|[,;! ])")  # the others leave a gap
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_SPLIT_NUMBER = re.compile(r"[0-9]\s+[0-9]")
_WHITE = re.compile(r"\s+")


def plain(answer: str) -> str:
    """The answer in the parser's own characters.

    Raises:
        Rejected: "length" for too long a text, "parse" for white space inside a number or a fraction whose parts are no
            expressions.
    """
    if len(answer) > MAX_RAW_CHARACTERS:
        raise Rejected("length")
    text = _COMMAND.sub(lambda found: COMMANDS.get(found[1], " "), answer.translate(SIGNS))
    if _SPLIT_NUMBER.search(text):  # two numbers, not one with a gap
        raise Rejected("parse")
    text = _WHITE.sub("", text).removesuffix(".")
    while (found := _FRACTION.search(text)) is not None:
        for part in found.groups():
            parse(part)  # a part must be whole by itself: "1)+(2" would close what it did not open
        text = f"{text[: found.start()]}(({found[1]})/({found[2]})){text[found.end() :]}"
    return text


def claimed(text: str, value: int) -> str:
    """What stands before `=value`, or the text as it is where nothing is claimed.

    Raises:
        Rejected: "value" where the text claims another value, "parse" where more than one or no number is claimed.
    """
    expression, equals, claim = text.partition("=")
    if not equals:
        return text
    if re.fullmatch(r"0|[1-9][0-9]{0,8}", claim) is None:
        raise Rejected("parse")
    if int(claim) != value:
        raise Rejected("value")
    return expression

"""The answer inside a response, as pretrained models write responses.

Searching is linear in the length of the text. Nothing is guessed from prose: an answer is what the model marked as one, or all that
it wrote after its thinking.
"""

from __future__ import annotations

import re

from megatron_vp2o.config.schema import AnswerFormat

THINK, END_OF_THINKING = "<think>", "</think>"
FINAL_CHANNEL = "<|channel|>final<|message|>"  # gpt-oss writes its answer there, and its thinking into other channels
ANSWER, END_OF_ANSWER = "<answer>", "</answer>"
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
MARKS = 8  # marks around one answer that are taken off; more than that are not an answer
DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


class Unfinished(Exception):
    """A response that ends before its answer: in the middle of thinking, or of a mark."""


def extract(response: str, form: AnswerFormat) -> str:
    """The answer of a response: all of it where the format is strict, else what its marks say.

    Looked at in this order: text after the last `</think>` (or in gpt-oss' final channel), the last `<answer>...</answer>`, the
    last `\\boxed{...}`, dollar signs and other delimiters of formulas around the whole, white space around it.

    Raises:
        Unfinished: the model did not come to the end of its thinking, or of its last mark.
    """
    if form is AnswerFormat.strict:
        return response
    text = _after_thinking(response).strip()
    for _ in range(MARKS):
        inner = _unmarked(text).strip()
        if inner == text:
            return text
        text = inner
    return text


def _after_thinking(response: str) -> str:
    for end in (END_OF_THINKING, FINAL_CHANNEL):
        _, found, after = response.rpartition(end)
        if found:
            return after
    if THINK in response or "<|channel|>" in response:
        raise Unfinished
    return response


def _unmarked(text: str) -> str:
    """The text with its outermost mark taken off, or as it is."""
    start = text.rfind(ANSWER)
    if start >= 0:
        end = text.find(END_OF_ANSWER, start)
        if end < 0:
            raise Unfinished
        return text[start + len(ANSWER) : end]
    boxes = list(BOXED.finditer(text))
    if boxes:
        return _to_closing_brace(text, _outermost(text, boxes))
    for opening, closing in DELIMITERS:
        if len(text) >= len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            return text[len(opening) : -len(closing)]
    return text


def _outermost(text: str, boxes: list[re.Match[str]]) -> int:
    """Where the content of the last box begins that is not inside another one."""
    depth, after, start = 0, 0, boxes[0].end()
    for box in boxes:
        depth = max(0, depth + text.count("{", after, box.start()) - text.count("}", after, box.start()))
        if depth == 0:
            start = box.end()
        depth, after = depth + 1, box.end()
    return start


def _to_closing_brace(text: str, start: int) -> str:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    raise Unfinished

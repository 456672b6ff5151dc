"""Rewards that read the text: exact, regex, format, length, choice, instructions."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vp2o.config.reward import (
    ChoiceConfig,
    ExactConfig,
    FormatConfig,
    InstructionsConfig,
    InstructionScore,
    LengthConfig,
    RegexConfig,
)
from megatron_vp2o.errors import RewardError
from megatron_vp2o.rewards.grade import RowError
from megatron_vp2o.rewards.graders.choice import Choice, chosen_letter
from megatron_vp2o.rewards.graders.instructions import Instructions
from megatron_vp2o.rewards.graders.text import Exact, Format, Length, Regex


def test_exact() -> None:
    exact = Exact(ExactConfig())
    assert exact.grade("", "<think>no</think>\n two  words\n", {"answer": "two words"}).reward == 1.0
    assert exact.grade("", "Two words", {"answer": "two words"}).reward == 0.0
    assert Exact(ExactConfig(ignore_case=True)).grade("", "Two words", {"answer": "two words"}).canonical == "two words"
    assert exact.grade("", "b", {"answer": ["a", "b"]}).reward == 1.0
    assert exact.grade("", "7", {"answer": 7}).reward == 1.0
    with pytest.raises(RowError, match="no `answer`, but the columns question"):
        exact.grade("", "x", {"question": "?"})


def test_regex() -> None:
    regex = Regex(RegexConfig())
    assert regex.grade("", "first #### 3, then\n#### 42\n", {"answer": "42"}).reward == 1.0
    assert regex.grade("", "#### 42", {"answer": "6 * 7 = 42\n#### 42"}).reward == 1.0  # GSM8K's own answers
    assert regex.grade("", "#### 42.5", {"answer": 42}).reason == "another answer"
    assert regex.grade("", "42", {"answer": "42"}).reason == "no match"
    assert Regex(RegexConfig(r"\d+")).grade("", "7 or 42", {"answer": "42"}).reward == 1.0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think>a\nb</think>\nc", 1.0),
        ("a</think>c", 1.0),  # templates that open the thinking themselves
        ("<think>a</think>", 0.0),
        ("<think>a</think>b</think>c", 0.0),
        ("<think>a<think>b</think>c", 0.0),
        ("answer", 0.0),
        ("", 0.0),
    ],
)
def test_format(response: str, reward: float) -> None:
    assert Format(FormatConfig()).grade("", response, {}).reward == reward


def test_length() -> None:
    length = Length(LengthConfig(full_words=2, zero_words=6))
    values = [length.grade("", "word " * n, {}).reward for n in range(9)]
    assert values == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0]


STYLES = {
    "Answer: {}": True,
    "ANSWER: {}": True,
    "answer : {}.": True,
    "Answer: ({})": True,
    "Answer: **{}**": True,
    "**Answer: {}**": True,
    "**Answer:** {}": True,
    "**Answer**: {}": True,
    "Answer: ${}$": True,
    "Answer: $\\text{{{}}}$": True,
    "Answer: \\boxed{{{}}}": True,
    "\\boxed{{{}}}": True,
    "$\\boxed{{\\text{{{}}}}}$": True,
    "The answer is {}.": True,
    "The answer is ({}).": True,
    "the answer is: {}": True,
    "The correct answer is {}": True,
    "The correct answer is **{}**.": True,
    "Therefore, the answer is ({}) because it is larger.": True,
    "The answer is option {}": True,
    "The final answer is $\\boxed{{{}}}$. I hope it is correct.": True,
    "The correct choice is {}": True,
    "The correct option is ({}).": True,
    "Answer: {}) the third law": True,
    "Answer: {}. The third law": True,
    "Answer：{}": True,
    "I first thought the answer is B. But no. The answer is {}.": True,
    "Answer: B\nWait, that is wrong.\nAnswer: {}": True,
    "A is wrong, B is wrong, so {}": True,
    "It must be ({})": True,
    "({}) is right": True,
    "{}": True,
    "{}.": True,
    "**{}**": True,
    "So we choose {}": True,
    "A. no\nB. no\nAnswer:\n{}": True,
    "The answer is\n\n({})": True,
    "I would pick {} here": True,
    "There is a choice, but I cannot decide.": False,
    "A long text without any": False,
    "Answer: none of these": False,
    "": False,
}


@pytest.mark.parametrize("letter", ["C", "D"])
def test_styles_of_answers(letter: str) -> None:
    wrong = {
        style: found
        for style, decided in STYLES.items()
        if (found := chosen_letter(style.format(letter), "ABCDEFGHIJ")) != (letter if decided else None)
    }
    assert wrong == {}


def test_choice() -> None:
    choice = Choice(ChoiceConfig(letters="ABCD"))
    for known in ("B", "b", "(B)", " B. ", 1):
        assert choice.grade("", "Answer: B", {"answer": known}).reward == 1.0
        assert choice.grade("", "Answer: C", {"answer": known}).reason == "another choice"
    row = {"choices": ["red", "blue"], "answer": "blue"}
    assert choice.grade("", "<think>Answer: A</think>The answer is (B)", row).canonical == "B"
    assert choice.grade("", "The answer is (C)", row).reason == "no choice"  # there are two
    assert Choice(ChoiceConfig(last_letter=False)).grade("", "So B", row).reason == "no choice"
    for answer in ("E", 4, "green", True, None):
        with pytest.raises(RowError, match="`answer`"):
            choice.grade("", "Answer: B", {"answer": answer})


def instructions(**settings: object) -> Instructions:
    try:
        return Instructions(InstructionsConfig(**settings))  # type: ignore[arg-type]
    except RewardError as error:
        pytest.skip(str(error))


ROW: dict[str, Any] = {
    "prompt": "Write two words.",
    "instruction_id_list": ["keywords:existence", "punctuation:no_comma"],
    "kwargs": [{"keywords": ["moon"], "relation": None}, {}],
}


def test_instructions() -> None:
    strict = instructions()
    assert strict.grade("", "the moon", ROW).reward == 1.0
    assert strict.grade("", "moon, and sun", ROW).reason == "not followed: punctuation:no_comma"
    assert instructions(score=InstructionScore.share).grade("", "moon, and sun", ROW).reward == 0.5
    loose = instructions(loose=True)
    assert strict.grade("", "Sure, here it is:\nthe moon", ROW).reward == 0.0
    assert loose.grade("", "Sure, here it is:\nthe moon", ROW).reward == 1.0


@pytest.mark.parametrize("response", ["", "  \n", "<think>the moon"])
def test_an_empty_answer_follows_no_instruction(response: str) -> None:
    only = ROW | {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    assert instructions().grade("", response, only).reward == 0.0
    assert instructions().followed("", response, ["punctuation:no_comma"] * 3, [{}] * 3) == [False] * 3


def test_rows_without_usable_instructions_are_errors() -> None:
    reward = instructions()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "x"}, "no `instruction_id_list`"),
        (ROW | {"kwargs": [{}]}, "2 instructions"),
        (ROW | {"instruction_id_list": ["keywords:existence", "no:such"]}, "'no:such' is unknown"),
    ]
    for row, message in cases:
        with pytest.raises(RowError, match=message):
            reward.grade("", "text", row)

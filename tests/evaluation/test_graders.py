"""What counts as a right answer: styles of answers, forms of integers, instructions nobody can check, programs that misbehave."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.errors import RewardError
from megatron_vp2o.evaluation import graders
from megatron_vp2o.evaluation.benchmarks import BENCHMARKS
from megatron_vp2o.evaluation.data import load
from megatron_vp2o.evaluation.grading import Grading
from megatron_vp2o.evaluation.tokens import split, tokens_before
from megatron_vp2o.rewards.graders import instructions

AIME = [
    (r"So we get \boxed{73}.", True),
    (r"\boxed{073}", True),
    (r"$\boxed{\text{073}}$", True),
    (r"\boxed{ 73 }", True),
    (r"\boxed{\mathbf{73}}", True),
    (r"\[\boxed{73.}\]", True),
    (r"\boxed{\frac{146}{2}}", True),
    (r"\boxed{73.0}", True),
    (r"First \boxed{5}, but in the end \boxed{73}", True),
    ("The answer is 73.", True),
    ("The final answer is: **073**", True),
    ("Answer: 73", True),
    ("the answer is $73$", True),
    (r"ANSWER: \(73\)", True),
    ("The answer is 5. No: the answer is 73", True),
    ("$73$", True),
    (r"\boxed{74}", False),
    (r"\boxed{730}", False),
    (r"\boxed{-73}", False),
    (r"\boxed{\frac{73}{2}}", False),
    ("The answer is 73.5", False),
    ("The answer is 73/2", False),
    ("The answer is 73^2", False),
    ("I do not know.", False),
    ("", False),
    (r"\boxed{}", False),
    (r"\boxed{73", False),  # cut off
    (r"\boxed{73} or \boxed{74}", False),
]


@pytest.mark.parametrize(("text", "right"), AIME)
def test_integers(text: str, right: bool) -> None:
    (grade,) = graders.integer([""], [text], [{"answer": "73"}])
    assert grade.correct is right and grade.parts == {"correct": float(right)}, (text, grade)


# 60 ways to put (or not to put) that C is chosen.
CHOICES = [
    *((text, "C") for text in (
        "Answer: C", "answer: C", "ANSWER: C", "**Answer: C**", "**Answer:** C", "Answer: (C)", "Answer: [C]", "Answer: $C$",
        "Answer: C.", "Answer: C)", "Answer: Option C", "Answer: choice C", "Answer:C", "Answer： C", r"Answer: \boxed{C}",
        r"Answer: \text{C}", "The answer is C.", "The answer is (C).", "the answer is: C", "The answer is **C**",
        "The correct answer is C", "The right choice is C", "The correct option is (C)", "So the answer is option C.",
        "The answer is \n(C)", r"\boxed{C}", r"$\boxed{C}$", r"\boxed{\text{C}}", r"\boxed{\textbf{C}}", r"\boxed{(C)}",
        r"The answer is $\boxed{C}$.", r"\boxed{\mathrm{C}}", "Answer: A? No.\nAnswer: C",
        "The answer is A. Wait, the answer is C.",
        "Let me think.\n\nIt follows that\n\nAnswer: C\n", "Answer: C) 2f", "Answer: C, because of symmetry.", "Answer: c",
        "The answer is (c)", "Final answer: C", "*Answer*: C", "__Answer: C__", "Answer: (C) It stays the same.",
        "A is wrong, B is wrong.\nAnswer: C", "I choose.\nThe answer is (C)\nHope this helps!",
    )),
    *((text, None) for text in (
        "", "I cannot tell.", "Answer:", "Answer: none of these", "Answer: Cannot be known", "The answer is Carbon",
        "A, B and C are possible", "It stays the same.", "C", "(C)", r"\boxed{}", "Answer: E",
    )),
    ("Answer: D", "D"), ("The answer is (A) and not C", "A"), (r"\boxed{B}", "B"),
]  # fmt: skip


def test_styles_of_chosen_letters() -> None:
    assert len(CHOICES) == 60
    row = {"answer": "C", "letters": "ABCD", "last_letter": False}
    grades = graders.choice([""] * 60, [text for text, _ in CHOICES], [row] * 60)
    wrong = [text for (text, said), grade in zip(CHOICES, grades, strict=True) if grade.correct != (said == "C")]
    assert wrong == []
    unsaid = [
        text for (text, said), g in zip(CHOICES, grades, strict=True) if (g.reason == "no choice") != (said is None)
    ]
    assert unsaid == []


def test_mmlu_pro_takes_the_last_letter_alone_and_gpqa_does_not() -> None:
    row = {"answer": "H", "letters": "ABCDEFGHIJ"}
    for last_letter in (True, False):
        (grade,) = graders.choice([""], ["It can only be H"], [{**row, "last_letter": last_letter}])
        assert grade.correct is last_letter


def test_instructions_that_nobody_can_check_and_empty_answers_are_not_followed() -> None:
    row: dict[str, Any] = {
        "prompt": "No commas.",
        "instruction_id_list": ["punctuation:no_comma", "made:up", "punctuation:no_comma"],
        "kwargs": [{}, {}, {}],
    }
    good, empty, half = graders.instructions([""] * 3, ["No comma here", "", "One, comma\nand none"], [row] * 3)
    assert good.parts["strict_followed"] == 2 and good.parts["instructions"] == 3
    assert good.parts["strict_prompt"] == good.parts["loose_prompt"] == 0 and good.reason.startswith("not checked")
    assert empty.parts["strict_followed"] == empty.parts["loose_followed"] == 0 and empty.parts["instructions"] == 3
    assert half.parts["strict_followed"] == 0 and half.parts["loose_followed"] == 2  # without its first line


def test_right_answers_to_our_own_instructions_pass() -> None:
    """Each shipped prompt can be answered, and the checkers' arguments are spelt as the checkers want them."""
    answers = {
        "ifeval": [
            "A beam turns over black water and is gone.",
            "the delta of a river is its last gift.",
            '"I sleep until noon"',
            "* water\n* bread\n* a map",
            f"{'A needle that is free to turn follows the field of the Earth. ' * 5}That is all.",
            "Paris is the capital of France.",
        ],
        "ifbench": [
            "pollen hive hive flower flower flower wing wing wing wing wing queen queen queen queen queen queen queen",
            f"Blue light is scattered more than red, {'and more ' * 10} so it comes from all sides of the sky.",
            "Trains are fast; yes: (very) fast! Are they? \"Yes\", 'sure'... On rails - of course‽ [end].",
            "apple",
            "It is -5 degrees at 7 in the 31 days of January.",
            "We watch grey waves; they bring shells.",
        ],
    }
    for name, texts in answers.items():
        rows = [question.row for question in load(BENCHMARKS[name], "own", 0).questions]
        grades = graders.instructions([""] * 6, texts, rows)
        assert not [g.reason for g in grades if "in the checker" in g.reason or g.reason.startswith("not checked")]
        assert sum(g.parts["loose_followed"] for g in grades) >= 5, [g.reason for g in grades]


PROGRAMS = {
    "even": "```python\nn = int(input())\nprint(2, n - 2)\n```",
    "even_cpp": "```cpp\n#include <iostream>\nint main() { long n; std::cin >> n; std::cout << 2 << ' ' << n - 2; }\n```",
}
MALICE = {
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 80), 2)\nprint(2, 2)",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "reads the tests": "print(open('/etc/passwd').read(), open('expected.txt').read())",
    "memory": "x = [bytes(10**8) for _ in range(1000)]\nprint(2, 2)",
    "endless output": "while True:\n    print('2 2' * 10000)",
    "kills its parents": "import os, signal\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)\nprint(2, 2)",
    "writes outside": "open('/usr/bin/vp2o_was_here', 'w').write('x')\nprint(2, 2)",
    "never ends": "while True:\n    pass",
    "says that it passed": "print(1)\nraise SystemExit(0)",
}


def test_programs_in_both_languages_pass_and_malicious_ones_are_wrong() -> None:
    row = dict(load(BENCHMARKS["codeforces"], "own", 0).questions[0].row) | {"time_limit": 1.0}
    good = graders.code([""] * 2, list(PROGRAMS.values()), [row] * 2)
    assert [grade.correct for grade in good] == [True, True]
    texts = [f"```python\n{source}\n```" for source in MALICE.values()]
    bad = graders.code([""] * len(texts), texts, [row] * len(texts))
    assert [name for name, grade in zip(MALICE, bad, strict=True) if grade.correct or grade.parts["correct"]] == []
    assert all(grade.reason for grade in bad)


SOLUTIONS = {
    "own-2": "n, *x = map(int, open(0).read().split())\nx.sort()\nprint(max(b - a for a, b in zip(x, x[1:])))",
    "own-3": "s = input()\nlast, start, best = {}, 0, 0\nfor i, c in enumerate(s):\n    start = max(start, last.get(c, -1) + 1)\n"
    "    last[c] = i\n    best = max(best, i - start + 1)\nprint(best)",
    "own-4": "n, m, *b = map(int, open(0).read().split())\nb = set(b)\nx, y = 0, 1\nfor i in range(1, n + 1):\n"
    "    x, y = y, 0 if i in b else (x + y) % (10**9 + 7)\nprint(y)",
    "own-5": "n, *w = map(int, open(0).read().split())\nbits = 1\nfor x in w:\n    bits |= bits << x\ns = sum(w)\n"
    "print(min(abs(s - 2 * i) for i in range(s + 1) if bits >> i & 1))",
}


def test_our_own_problems_have_right_tests() -> None:
    questions = {q.id: q for q in load(BENCHMARKS["codeforces"], "own", 0).questions}
    assert set(SOLUTIONS) | {"own-1"} == set(questions)
    texts = [f"```python\n{source}\n```" for source in SOLUTIONS.values()]
    grades = graders.code([""] * 4, texts, [questions[name].row for name in SOLUTIONS])
    assert [(n, g.reason) for n, g in zip(SOLUTIONS, grades, strict=True) if not g.correct] == []


@pytest.mark.parametrize(
    ("text", "opened", "thinking", "solution"),
    [
        ("<think>a b</think>c", False, "a b", "c"),
        ("a b</think>c", True, "a b", "c"),
        ("<think>a b", False, "a b", ""),
        ("a b", True, "a b", ""),
        ("a b", False, "", "a b"),
        ("<think>x</think>y</think>z", False, "x</think>y", "z"),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes<|return|>",
            False,
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant",
            "yes",
        ),
        ("<|channel|>analysis<|message|>hm", False, "<|channel|>analysis<|message|>hm", ""),
    ],
)
def test_thinking_and_solution_apart(text: str, opened: bool, thinking: str, solution: str) -> None:
    parts = split(text, opened=opened)
    assert (parts.thinking, parts.solution) == (thinking, solution)
    words = text.replace(" ", " \0").replace(">", ">\0").split("\0")  # pieces of several characters as tokens
    tokens = list(range(len(words)))
    count = tokens_before(tokens, parts.start, lambda ids: "".join(words[i] for i in ids))
    assert len("".join(words[:count])) >= parts.start > len("".join(words[: max(0, count - 1)])) - (count == 0)


def test_own_rows_are_json_and_plain_ascii() -> None:
    for benchmark in BENCHMARKS.values():
        for question in load(benchmark, "own", 3).questions:
            assert question.prompt.isascii() and json.loads(json.dumps(question.row)) == question.row


@pytest.fixture
def without_sentences(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NLTK's data are missing."""
    graders._instructions.cache_clear()
    graders._grader.cache_clear()
    monkeypatch.setattr(instructions, "NEEDED", {"tokenizers/none_such": "sentences"})
    yield
    graders._instructions.cache_clear()
    graders._grader.cache_clear()


def test_what_a_grader_lacks_is_no_wrong_answer(without_sentences: None) -> None:
    """A library without its data ends the evaluation; before, every answer counted as wrong."""
    questions = load(BENCHMARKS["ifeval"], "own", 0).questions
    with pytest.raises(RewardError, match="none_such"):
        graders.instructions.prepare()
    with pytest.raises(RewardError, match="none_such"):
        graders.instructions([questions[0].prompt], ["An answer."], [questions[0].row])


def test_a_worker_that_lacks_something_ends_the_evaluation(
    without_sentences: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import nltk.data\n\ndef find(*_, **__):\n    raise LookupError\n\nnltk.data.find = find\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    questions = load(BENCHMARKS["ifeval"], "own", 0).questions
    with Grading(1) as grading, pytest.raises(RewardError, match="punkt_tab"):
        grading.grade(BENCHMARKS["ifeval"], questions[:1], ["An answer."])


def test_every_grader_says_what_it_needs() -> None:
    for name in graders.BATCH:
        function = getattr(graders, name)
        assert isinstance(function, graders.Prepared) and function.graders

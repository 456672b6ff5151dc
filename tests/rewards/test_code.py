"""reward=code: the verdicts of a judge, on programs that are right, wrong, slow, broken or dishonest."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from megatron_vp2o.config.reward import Checker, CodeConfig
from megatron_vp2o.rewards.grade import Grade, RowError
from megatron_vp2o.rewards.graders.code import Code, code_block, read_tests
from megatron_vp2o.rewards.sandbox.judge import Case, same_lines, same_numbers, same_tokens
from megatron_vp2o.rewards.sandbox.programs import prepare
from megatron_vp2o.rewards.sandbox.protocol import Limits
from tests.rewards.sandboxes import sandbox_or_skip

SUM_PY = "a, b = map(int, input().split())\nprint(a + b)"
SUM_CPP = "#include <iostream>\nint main() { long long a, b; std::cin >> a >> b; std::cout << a + b << '\\n'; }"
SUMS = [{"input": f"{a} {b}\n", "output": f"{a + b}\n"} for a, b in [(1, 2), (-5, 5), (10**9, 10**9)]]


def answer(source: str, language: str = "python") -> str:
    return f"<think>\n```python\nprint('not this')\n```\n</think>\nHere it is:\n\n```{language}\n{source}\n```\nThat is all."


def grade(response: str, row: dict[str, Any], **settings: Any) -> Grade:
    sandbox_or_skip()
    return Code(CodeConfig(**{"time_s": 1.0, **settings})).grade("", response, row)


@pytest.mark.smoke
def test_right_programs_of_both_languages_pass() -> None:
    for source, language in ((SUM_PY, "python"), (SUM_CPP, "cpp"), (SUM_CPP, "C++")):
        result = grade(answer(source, language), {"tests": SUMS})
        assert (result.reward, result.correct, result.reason) == (1.0, True, "")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("a, b = map(int, input().split())\nprint(a - b)", "wrong answer"),
        ("print(undefined)", "runtime error"),
        ("while True: pass", "time limit"),
        ("import time\ntime.sleep(100)", "time limit"),
        ("while True: print('x' * 10**6)", "output limit"),
        ("x = []\nwhile True: x.append('x' * 10**6)", "runtime error"),
        ("import os\nos._exit(0)", "wrong answer"),
    ],
)
def test_the_reason_is_the_first_failure(source: str, reason: str) -> None:
    result = grade(answer(source), {"tests": SUMS})
    assert (result.reward, result.correct, result.reason) == (0.0, False, reason)


def test_a_program_that_does_not_compile() -> None:
    assert grade(answer("int main() { return x; }", "cpp"), {"tests": SUMS}).reason == "compile error"
    assert grade(answer("#include </etc/passwd>\nint main() {}", "cpp"), {"tests": SUMS}).reason == "compile error"


def test_a_share_of_the_tests() -> None:
    half = "a, b = map(int, input().split())\nprint(a + b if a < 10 else 0)"
    assert grade(answer(half), {"tests": SUMS}, partial=True).reward == pytest.approx(2 / 3)
    assert grade(answer(half), {"tests": SUMS}).reward == 0.0


def test_no_program() -> None:
    assert grade("I cannot.", {"tests": SUMS}).reason == "no code block"
    assert grade(answer("fn main() {}", "rust"), {"tests": SUMS}).reason == "no code block"
    assert grade(answer(SUM_PY), {"tests": SUMS, "language": "cpp"}).reason == "no code block"


def test_assertions() -> None:
    row = {"assertions": ["assert double(2) == 4", "assert double('a') == 'aa'"]}
    for source, reason in [
        ("def double(x): return 2 * x", ""),
        ("def double(x): return 3 * x", "wrong answer"),
        ("def twice(x): return 2 * x", "runtime error"),
        ("import os\nos._exit(0)", "runtime error"),
        ("import sys\ndef double(x): sys.exit(0)", "runtime error"),
        ("print('x' * 32)\ndef double(x): return 2 * x", ""),  # what it prints is nobody's verdict
    ]:
        assert grade(answer(source), row).reason == reason, source


CHECKER = """
import sys
numbers = list(map(int, open(sys.argv[3]).read().split()))
target = int(open(sys.argv[1]).read())
print(int(len(numbers) == 2 and sum(numbers) == target))
"""


def test_a_checker_program_takes_any_right_answer() -> None:
    row = {"tests": [{"input": "10\n", "output": "5 5\n"}, {"input": "-3", "output": "-3 0"}], "checker": CHECKER}
    assert grade(answer("n = int(input())\nprint(n + 7, -7)"), row).reward == 1.0
    assert grade(answer("n = int(input())\nprint(n, 7)"), row).reason == "wrong answer"
    with pytest.raises(RowError, match="checker printed"):
        grade(answer("print(1)"), row | {"checker": "print('fine')"})


def test_what_a_program_can_see() -> None:
    """Its own text and its input: not what it should write, nor the checker."""
    look = "import os\nprint(os.listdir('/box'), os.listdir('/tmp'), open('/proc/self/cmdline').read().count(chr(0)))"
    done = prepare(sandbox_or_skip(), "python", look).run(b"1", Limits())
    assert done.stdout.decode() == "['solution.py'] [] 4\n"


def test_shapes_of_tests() -> None:
    cases = [Case("1 2\n", "3\n"), Case("a\nb", "c")]
    lists = {"inputs": ["1 2\n", ["a", "b"]], "outputs": ["3\n", "c"]}
    dicts = [{"input": "1 2\n", "output": "3\n"}, {"input": ["a", "b"], "output": "c"}]
    for shape in (lists, dicts, json.dumps(lists), json.dumps(dicts)):
        assert read_tests({"tests": shape}) == cases
    for wrong in ("{", {"inputs": ["1"], "outputs": []}, ["1"], [{"input": "1"}]):
        with pytest.raises(RowError, match="tests"):
            read_tests({"tests": wrong})
    with pytest.raises(RowError, match="neither"):
        grade(answer(SUM_PY), {"answer": 3})


def test_comparing_output() -> None:
    assert same_tokens(Case("", "1 2\n3"), "1  2 3\n") and not same_tokens(Case("", "12"), "1 2")
    assert same_lines(Case("", "1 2\n3\n"), "1 2 \n3") and not same_lines(Case("", "1 2\n3"), "1 2 3")
    draw = random.Random(3)
    for _ in range(200):
        value = draw.uniform(-1e6, 1e6)
        near, far = value + 1e-7 * max(1, abs(value)), value + 1e-4 * max(1, abs(value))
        assert same_numbers(Case("", f"YES {value}"), f"YES\n{near}")
        assert not same_numbers(Case("", f"YES {value}"), f"YES {far}")
    assert not same_numbers(Case("", "1"), "nan") and not same_numbers(Case("", "1"), "inf")


def test_the_configured_checker_is_used() -> None:
    row = {"tests": [{"input": "", "output": "0.333333333"}]}
    assert grade(answer("print(1 / 3)"), row).reward == 0.0
    assert grade(answer("print(1 / 3)"), row, checker=Checker.numbers).reward == 1.0


def test_code_blocks() -> None:
    text = "```\nplain\n```\n```text\nno\n```\n  ```py\n  x\n  ```\n"
    assert code_block(text, None) == ("python", "  x\n")
    assert code_block("```\nplain\n```", None) == ("python", "plain\n")
    assert code_block("```\nplain\n```", "cpp") == ("cpp", "plain\n")
    assert code_block("```python\nunclosed", None) is None

"""Judging a program: tests of input and expected output, or assertions; the verdict names the first failure.

Expected outputs never enter the sandbox together with the program that is judged.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vp2o.rewards.sandbox.programs import Program
from megatron_vp2o.rewards.sandbox.protocol import Finished, Limits, Sandbox

PASSED, WRONG, TIME, OUTPUT, CRASHED = "", "wrong answer", "time limit", "output limit", "runtime error"
WAITING_FACTOR = 5.0
"""Seconds on the clock for each second of the processor time limit: machines are shared, and some programs wait."""


@dataclass(frozen=True)
class Case:
    """One test: what the program reads, and what a right one writes (one of many, where there is a checker)."""

    input: str
    output: str


@dataclass(frozen=True)
class Judgement:
    """How a program did."""

    passed: int
    total: int
    reason: str  # of the first failure; "" where all passed

    @property
    def accepted(self) -> bool:
        return self.total > 0 and self.passed == self.total


Compare = Callable[[Case, str], bool]


def same_tokens(test: Case, written: str) -> bool:
    """Equal up to white space, as most judges compare."""
    return test.output.split() == written.split()


def same_lines(test: Case, written: str) -> bool:
    """Equal line by line, up to white space at the ends of lines and empty lines at the end."""
    return _lines(test.output) == _lines(written)


def same_numbers(test: Case, written: str, tolerance: float = 1e-6) -> bool:
    """Tokens equal, or numbers within a relative or absolute tolerance."""
    expected, found = test.output.split(), written.split()
    return len(expected) == len(found) and all(
        a == b or _close(a, b, tolerance) for a, b in zip(expected, found, strict=True)
    )


CHECKERS: dict[str, Compare] = {"tokens": same_tokens, "lines": same_lines, "numbers": same_numbers}


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _close(expected: str, found: str, tolerance: float) -> bool:
    try:
        a, b = float(expected), float(found)
    except ValueError:
        return False
    return math.isfinite(b) and abs(a - b) <= tolerance * max(1.0, abs(a))


class CheckerProgram:
    """A problem's own checker, a program: called with files of input, expected and written output, it prints 1 or 0."""

    def __init__(self, program: Program, limits: Limits) -> None:
        self._program, self._limits = program, limits

    def __call__(self, test: Case, written: str) -> bool:
        """Raises CheckerError where it does not print a number: then it is the checker that is broken."""
        names = ("input.txt", "expected.txt", "written.txt")
        contents = (test.input.encode(), test.output.encode(), written.encode())
        done = self._program.run(b"", self._limits, arguments=names, files=dict(zip(names, contents, strict=True)))
        said = done.stdout.decode(errors="replace").split()
        try:
            return done.status == 0 and float(said[-1]) > 0
        except (IndexError, ValueError):
            message = done.stderr.decode(errors="replace").strip()[-300:]
            raise CheckerError(f"the row's checker printed {' '.join(said)[:60]!r}, not a number: {message}") from None


class CheckerError(Exception):
    """A problem's checker that does not do what a checker does."""


def run_limits(time_s: float, memory_mib: int) -> Limits:
    """Limits of one test of a program."""
    return Limits(wall_s=WAITING_FACTOR * time_s + 5.0, cpu_s=time_s + 0.5, memory_mib=memory_mib)


def judge_tests(
    program: Program,
    tests: Sequence[Case],
    compare: Compare,
    *,
    time_s: float,
    memory_mib: int,
    all_tests: bool = False,
    end: float = math.inf,
) -> Judgement:
    """Run a program on tests.

    Args:
        time_s: seconds of processor time for each test.
        all_tests: go on after a failure, so that `passed` counts all tests.
        end: of time.monotonic(): tests that would begin later count as failed by the time limit.
    """
    passed, reason = 0, ""
    for test in tests:
        if time.monotonic() > end:
            return Judgement(passed, len(tests), reason or TIME)
        done = program.run(test.input.encode(), run_limits(time_s, memory_mib))
        failure = _failure(done, time_s)
        if not failure and not compare(test, done.stdout.decode(errors="replace")):
            failure = WRONG
        passed += not failure
        reason = reason or failure
        if failure and not all_tests:
            break
    return Judgement(passed, len(tests), reason)


def _failure(done: Finished, time_s: float) -> str:
    if done.flooded:
        return OUTPUT
    if done.timed_out or done.cpu_s > time_s:
        return TIME
    return CRASHED if done.status else ""


_ASSERTIONS = """\
import sys
word = sys.stdin.readline().strip()
tests = sys.stdin.read()
sys.stdin.close()
names = {"__name__": "solution"}
with open("solution.txt", encoding="utf-8") as file:
    source = file.read()
output, sys.stdout = sys.stdout, sys.stderr
try:
    exec(compile(source, "solution", "exec"), names)
    exec(compile(tests, "tests", "exec"), names)
except AssertionError:
    output.write("failed")
    output.flush()
    raise
output.write(word)
"""


def judge_assertions(sandbox: Sandbox, source: str, assertions: str, *, time_s: float, memory_mib: int) -> Judgement:
    """Run Python assertions after a solution, in one process of the sandbox.

    A word that only this call knows says that the last assertion was reached, so a solution that ends the process early
    does not pass. A solution that searches the interpreter for that word could; prefer tests of input and output.
    """
    word = secrets.token_hex(16)
    program = Program(
        sandbox,
        (sandbox.program("python3"), "-I", "-S", "assertions.py"),
        {"assertions.py": _ASSERTIONS.encode(), "solution.txt": source.encode("utf-8", errors="replace")},
    )
    done = program.run(f"{word}\n{assertions}".encode(), run_limits(time_s, memory_mib))
    failure = _failure(done, time_s)
    if done.stdout == b"failed":
        failure = WRONG
    elif not failure and done.stdout != word.encode():
        failure = CRASHED
    return Judgement(int(not failure), 1, failure)

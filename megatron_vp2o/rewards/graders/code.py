"""Programs: the last block of code of a response, judged in the sandbox by the row's tests or assertions.

A row has `tests`, in one of three shapes, or `assertions` (Python):

- a list of {"input": text, "output": text};
- {"inputs": [...], "outputs": [...]} (APPS, TACO and others);
- either as a JSON text, as parquet files often have it.

It may have `language`, `time_limit` (seconds), `memory_limit` (MB), and `checker` for problems with many right answers: a
Python program that is called with the names of three files (input, expected, written output) and prints 1 or 0.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from typing import Any

from megatron_vp2o.config.reward import CodeConfig
from megatron_vp2o.rewards.grade import Grade, RowError, right, wrong
from megatron_vp2o.rewards.graders.base import Grader
from megatron_vp2o.rewards.graders.text import solution
from megatron_vp2o.rewards.sandbox import open_sandbox
from megatron_vp2o.rewards.sandbox.judge import (
    CHECKERS,
    Case,
    CheckerError,
    CheckerProgram,
    Compare,
    Judgement,
    judge_assertions,
    judge_tests,
    run_limits,
)
from megatron_vp2o.rewards.sandbox.programs import LANGUAGES, PYTHON, CompileError, prepare
from megatron_vp2o.rewards.sandbox.protocol import SandboxUnavailable

_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


class Code(Grader):
    """1 where all tests pass; with `code.partial` the share of tests that do."""

    def __init__(self, config: CodeConfig) -> None:
        self._config = config
        self._sandbox = open_sandbox(config.sandbox)

    def grade(self, prompt: str, response: str, row: Mapping[str, Any]) -> Grade:
        tests, assertions = read_tests(row), row.get("assertions")
        if not tests and not assertions:
            raise RowError(f"it has neither `tests` nor `assertions`, but the columns {', '.join(map(str, row))}")
        language = self._language(row)
        found = code_block(solution(response), language)
        if found is None:
            return wrong("no code block")
        try:
            judgement = self._judge(*found, tests, assertions, row)
        except CompileError:
            return wrong("compile error")
        except CheckerError as error:
            raise RowError(str(error)) from error
        if judgement.accepted:
            return right(None)
        share = judgement.passed / judgement.total if self._config.partial else 0.0
        return Grade(share, judgement.reason, None, False)

    def _judge(
        self, language: str, source: str, tests: list[Case], assertions: Any, row: Mapping[str, Any]
    ) -> Judgement:
        time_s = float(row.get("time_limit") or self._config.time_s)
        memory_mib = int(row.get("memory_limit") or self._config.memory_mib)
        if not tests:
            text = assertions if isinstance(assertions, str) else "\n".join(map(str, assertions))
            return judge_assertions(self._sandbox, source, text, time_s=time_s, memory_mib=memory_mib)
        end = time.monotonic() + self._config.total_s
        compare = self._compare(row)
        try:
            program = prepare(self._sandbox, language, source)
        except SandboxUnavailable as error:
            raise RowError(str(error)) from error
        return judge_tests(
            program, tests, compare, all_tests=self._config.partial, end=end, time_s=time_s, memory_mib=memory_mib
        )

    def _language(self, row: Mapping[str, Any]) -> str | None:
        named = row.get("language")
        if named is None:
            return None
        if str(named).lower() not in LANGUAGES:
            raise RowError(f"its `language` is {named!r}; python and cpp can be run")
        return LANGUAGES[str(named).lower()]

    def _compare(self, row: Mapping[str, Any]) -> Compare:
        checker = row.get("checker")
        if checker is None:
            return CHECKERS[self._config.checker.name]
        program = prepare(self._sandbox, PYTHON, str(checker))
        return CheckerProgram(program, run_limits(self._config.checker_time_s, self._config.memory_mib))


def code_block(text: str, language: str | None) -> tuple[str, str] | None:
    """(language, source) of the last fenced block that is in `language`, or in one that can be run where that is None."""
    for name, source in reversed(_BLOCK.findall(text)):
        written = LANGUAGES.get(name.lower()) if name else (language or PYTHON)
        if written is not None and language in (None, written):
            return written, source
    return None


def read_tests(row: Mapping[str, Any]) -> list[Case]:
    """The tests of a row, whatever shape they have.

    Raises:
        RowError: they have none that is known.
    """
    tests = row.get("tests")
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise RowError(f"its `tests` are no JSON: {error}") from error
    if not tests:
        return []
    if isinstance(tests, Mapping):
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        if not isinstance(inputs, list | tuple) or not isinstance(outputs, list | tuple) or len(inputs) != len(outputs):
            raise RowError("its `tests` need `inputs` and `outputs`, lists of the same length")
        return [Case(_text(a), _text(b)) for a, b in zip(inputs, outputs, strict=True)]
    if all(isinstance(test, Mapping) and {"input", "output"} <= test.keys() for test in tests):
        return [Case(_text(test["input"]), _text(test["output"])) for test in tests]
    raise RowError('its `tests` are neither a list of {"input", "output"} nor {"inputs": [...], "outputs": [...]}')


def _text(value: Any) -> str:
    """Text as it is; lists are lines, which some files have them as."""
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

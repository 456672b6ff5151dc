"""Codeforces: problems with ratings; programs in Python or C++ run in the sandbox against tests, or under a checker.

The paper names neither its problems nor how it computes a rating. Here the rating is the maximum of the likelihood of
what was solved (`evaluation.rating`), and, where standings are cached, that of a simulated contest.
"""

from __future__ import annotations

from typing import Any

from megatron_vp2o.evaluation.benchmark import (
    PASS_AT,
    RATING,
    Benchmark,
    Metric,
    Question,
    Remote,
    Row,
    column,
    identity,
)
from megatron_vp2o.rewards.grade import RowError
from megatron_vp2o.rewards.graders.code import read_tests

PROMPT = """You are given a problem of a programming contest. Write a program that reads standard input and writes standard \
output, in Python 3 or C++20, within {time} s and {memory} MB for each test. Put the whole program into one block of code that \
names its language (```python or ```cpp).

# {title}

{statement}
{sections}"""


def ask(row: Row, number: int, seed: int) -> Question:
    """Columns: `title`, `description`, `input_format`, `output_format`, `examples`, `note`, `rating`, `contest_id`, `index`,
    `time_limit` (s), `memory_limit` (MB), `tests` or `official_tests`, `checker` or `generated_checker`."""
    tests = row.get("tests") or row.get("official_tests")
    if not read_tests({"tests": tests}):
        raise RowError("it has no tests (`tests` or `official_tests`): take it out")
    rating = row.get("rating")
    if isinstance(rating, bool) or not isinstance(rating, int | float) or not 0 < rating < 5000:
        raise RowError(f"its rating is {rating!r:.20}, not a number between 0 and 5000: take it out")
    time_limit, memory_limit = float(row.get("time_limit") or 2.0), int(row.get("memory_limit") or 256)
    named = {"Input": row.get("input_format"), "Output": row.get("output_format"), "Note": row.get("note")}
    sections = [f"\n## {name}\n\n{text}" for name, text in named.items() if text]
    sections += [_example(example) for example in row.get("examples") or ()]
    prompt = PROMPT.format(
        time=f"{time_limit:g}",
        memory=memory_limit,
        title=row.get("title") or identity(row, number, "id"),
        statement=column(row, "description", "statement"),
        sections="\n".join(sections),
    )
    graded = {
        "tests": tests,
        "time_limit": time_limit,
        "memory_limit": memory_limit,
        "rating": float(rating),
        "contest": str(row.get("contest_id") or ""),
        "index": str(row.get("index") or ""),
    }
    if checker := row.get("checker") or row.get("generated_checker"):
        graded["checker"] = checker
    return Question(identity(row, number, "id"), prompt, graded)


def _example(example: Any) -> str:
    return f"\n## Example\n\nInput:\n```\n{example['input']}\n```\nOutput:\n```\n{example['output']}\n```"


CODEFORCES = Benchmark(
    "codeforces",
    "Codeforces",
    "Code",
    "code",
    ask,
    (
        Metric("rating", "rating", RATING, table=True, percent=False),
        Metric("pass@1", "pass@1", table=True),
        *(Metric(f"pass@{k}", f"pass@{k}", PASS_AT, k=k) for k in (2, 4, 8)),
    ),
    licence="CC-BY-4.0 (the collection)",
    remote=Remote(hub="open-r1/codeforces", config="verifiable", split="test"),
    token_row="Codeforces",
    samples=4,
    notes="which problems the paper used, and which definition of a rating, is not said there",
)

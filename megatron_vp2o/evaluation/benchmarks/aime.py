"""AIME: fifteen problems a paper, two papers a year; every answer is an integer from 0 to 999.

The prompt asks for the answer in a box, as most published evaluations do. The integer in the last box, or after
"the answer is", is compared first; math-verify decides about everything else.
"""

from __future__ import annotations

from megatron_vp2o.evaluation.benchmark import PASS_AT, Benchmark, Metric, Question, Remote, Row, column, identity
from megatron_vp2o.rewards.grade import RowError

PROMPT = """{problem}

Solve the problem step by step. The answer is an integer from 0 to 999. Write it in \\boxed{{}} at the end."""


def ask(row: Row, number: int, seed: int) -> Question:
    """Columns: `problem`, `answer`, and `id` where there is one (also capitalised, as some copies have them)."""
    answer = str(column(row, "answer", "Answer")).strip()
    if not answer.isdigit() or not 0 <= int(answer) <= 999:
        raise RowError(f"its answer is {answer!r:.40}, not an integer from 0 to 999")
    problem = str(column(row, "problem", "Problem", "question"))
    name = identity(row, number, "id", "ID")
    return Question(name, PROMPT.format(problem=problem), {"answer": str(int(answer))})


_METRICS = (
    Metric("accuracy", "avg@n", table=True),
    *(Metric(f"pass@{k}", f"pass@{k}", PASS_AT, k=k) for k in (2, 4, 8, 16, 32, 64)),
)
AIME_2024 = Benchmark(
    "aime24",
    "AIME 2024",
    "Math",
    "integer",
    ask,
    _METRICS,
    licence="problems: (c) Mathematical Association of America; see the card of the copy",
    remote=Remote(hub="Maxwell-Jia/AIME_2024", split="train", revision="8d88b2876a82a080e2f172cc9b25d0d9d2cb4792"),
    samples=16,
)
AIME_2025 = Benchmark(
    "aime25",
    "AIME 2025",
    "Math",
    "integer",
    ask,
    _METRICS,
    licence="problems: (c) Mathematical Association of America; see the card of the copy",
    remote=Remote(hub="math-ai/aime25", split="test", revision="563bb8404243c5f09de6ec262f2db674fe5bce9b"),
    samples=16,
    token_row="AIME 2025",
)

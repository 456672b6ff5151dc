"""Minimal thinking: easy questions, asked with a request for little effort; the metric is how long the solution is.

The paper's Table 2 has "Min. Thinking L1" and "L2" and says nothing more of them, and no public benchmark has that name.
These questions and both requests are ours.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_vp2o.evaluation.benchmark import Benchmark, Metric, Question, Row, column, identity

EFFORT = {
    1: "Think only briefly, then answer in a few short sentences. Write the final answer in \\boxed{}.",
    2: "Do not think it over: answer at once, as shortly as you can. Write the final answer in \\boxed{}.",
}


def _asking(level: int) -> Callable[[Row, int, int], Question]:
    def ask(row: Row, number: int, seed: int) -> Question:
        """Columns: `prompt`, `answer` (a number or a formula), `id`."""
        prompt = f"{column(row, 'prompt')}\n\n{EFFORT[level]}"
        return Question(identity(row, number, "id"), prompt, {"answer": str(column(row, "answer"))})

    return ask


def _level(level: int) -> Benchmark:
    return Benchmark(
        f"min_thinking_{level}",
        f"Min. Thinking L{level}",
        "Efficiency",
        "mathematics",
        _asking(level),
        (Metric("accuracy", "accuracy"),),
        licence="Apache-2.0",
        remote=None,
        samples=4,
        token_row=f"Min. Thinking L{level}",
        notes="questions and requests are ours; the paper does not describe its own",
        own="min_thinking",
    )


LEVEL_1, LEVEL_2 = _level(1), _level(2)

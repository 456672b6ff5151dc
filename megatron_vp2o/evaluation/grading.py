"""Grading in worker processes: one pool for each kind of grader, started when it is first needed."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vp2o.config.reward import RewardConfig
from megatron_vp2o.evaluation.benchmark import Benchmark, Question
from megatron_vp2o.evaluation.graders import BATCH, LIMIT_S
from megatron_vp2o.rewards.grade import Grade
from megatron_vp2o.rewards.pool import Item, WorkerPool

_OWN = "own"  # how the pool names a reward that is a function


class Grading:
    """Use it as a context: the worker processes end with it."""

    def __init__(self, workers: int | None = None) -> None:
        """`workers` processes for each kind of grader; None: this node's cores, at most 8."""
        self._workers = workers
        self._pools: dict[str, WorkerPool] = {}

    def __enter__(self) -> Grading:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def open(self, grader: str) -> WorkerPool:
        """The pool of that grader; raises RewardError where something that it needs is missing here."""
        if grader not in self._pools:
            config = RewardConfig(
                path=f"megatron_vp2o.evaluation.graders:{grader}",
                workers=self._workers,
                batch_size=BATCH[grader],
                timeout_s=LIMIT_S[grader],
                memory_mib=None if grader == "code" else 2048,
            )
            self._pools[grader] = WorkerPool(config, {_OWN: LIMIT_S[grader]}, {_OWN: BATCH[grader]})
        return self._pools[grader]

    def grade(self, benchmark: Benchmark, questions: Sequence[Question], solutions: Sequence[str]) -> list[Grade]:
        """One grade for each solution, in order.

        Raises:
            RewardError: something that the grader needs is missing, or a row cannot be graded; says which.
        """
        pool = self.open(benchmark.grader)
        grades: dict[int, Grade] = {}
        items = [
            Item(n, _OWN, question.prompt, solution, {**question.row, "__source__": f"{benchmark.name} {question.id}"})
            for n, (question, solution) in enumerate(zip(questions, solutions, strict=True))
        ]
        grades = dict(pool.grade(items))
        return [_with_values(grades[n]) for n in range(len(items))]


def _with_values(grade: Grade) -> Grade:
    """A grade that the pool itself gave (time, memory, crash) has no values: the answer is wrong."""
    return grade if grade.parts else Grade(0.0, grade.reason, None, False, {"correct": 0.0})

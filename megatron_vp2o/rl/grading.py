"""From generated token ids to verdicts."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

from megatron_vp2o.parallel.groups import Groups, on_replica, speaks_for_replica
from megatron_vp2o.rl.interfaces import HandsOver, RolloutEngine, Task, Tokenizer
from megatron_vp2o.rl.types import Problem, Rollouts, Verdict

NOT_TEXT = "\N{REPLACEMENT CHARACTER}"


def response_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """A response as the verifier sees it: without its end-of-sequence, and with padding that the model chose itself as a
    character that no answer has (decoding would drop it, and a broken answer could pass for a right one)."""
    if ids and ids[-1] in tokenizer.eos_ids:
        ids = ids[:-1]
    special = {tokenizer.pad_id, *tokenizer.eos_ids}
    return NOT_TEXT if special.intersection(ids) else tokenizer.decode(ids)


class Grading:
    """Verdicts on the responses to some problems, `group_size` to each.

    Where the task grades elsewhere and the engine hands responses over, they are graded while later ones are generated:

        with Grading(task, problems, group_size, groups) as grading:
            with grading.beside(engine):
                rollouts = engine.generate(...)
            verdicts = grading.verdicts(rollouts)

    The verdicts are the same either way: a response's does not depend on what it is graded together with.
    """

    def __init__(self, task: Task, problems: Sequence[Problem], group_size: int, groups: Groups) -> None:
        self.task, self.problems, self.group_size, self.groups = task, problems, group_size, groups
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grading")  # begins with the first response
        self._waiting: deque[tuple[int, list[int]]] = deque()
        self._jobs: list[Future[None]] = []
        self._found: dict[int, Verdict] = {}  # by row

    def __enter__(self) -> Grading:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def beside(self, engine: RolloutEngine) -> AbstractContextManager[None]:
        """Inside, what the engine generates is graded as it comes; does nothing where that is of no use."""
        if self.task.grades_elsewhere and isinstance(engine, HandsOver) and speaks_for_replica(self.groups):
            return engine.handing_over(self._take)
        return nullcontext()

    def verdicts(self, rollouts: Rollouts) -> list[list[Verdict]]:
        """One verdict for each of a problem's responses, problem by problem.

        Collective over the tensor- and pipeline-parallel ranks, of which one grades: a reward with a time limit could say
        different things to two of them.
        """

        def all_of_them() -> list[Verdict]:
            for job in self._jobs:
                job.result()
            rows = [row for row in range(len(self.problems) * self.group_size) if row not in self._found]
            self._grade(rows, [rollouts.response(row) for row in rows])
            return [self._found[row] for row in range(len(self.problems) * self.group_size)]

        found = on_replica(all_of_them, self.groups)
        return [found[p * self.group_size : (p + 1) * self.group_size] for p in range(len(self.problems))]

    def _take(self, rows: Sequence[int], responses: Sequence[list[int]]) -> None:
        self._waiting.extend(zip(rows, responses, strict=True))
        self._jobs.append(self._thread.submit(self._grade_waiting))

    def _grade_waiting(self) -> None:
        """All that has come since the last time, together."""
        came = [self._waiting.popleft() for _ in range(len(self._waiting))]
        self._grade([row for row, _ in came], [ids for _, ids in came])

    def _grade(self, rows: Sequence[int], responses: Sequence[list[int]]) -> None:
        if rows:
            texts = [response_text(self.task.tokenizer, ids) for ids in responses]
            asked = [self.problems[row // self.group_size] for row in rows]
            self._found.update(zip(rows, self.task.verify_all(asked, texts), strict=True))

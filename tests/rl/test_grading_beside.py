"""Grading of responses while later ones are generated: at once, the same verdicts, and errors of the reward reach the step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vp2o.errors import RewardError
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl.grading import Grading
from megatron_vp2o.rl.interfaces import HandOver
from megatron_vp2o.rl.types import Problem, Rollouts, Verdict
from megatron_vp2o.tasks.tokenizer import CharTokenizer


@pytest.fixture
def groups() -> Iterator[Groups]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    names = [field.name for field in fields(Groups) if field.name not in ("device", "timeout")]
    values: dict[str, Any] = dict.fromkeys(names, dist.group.WORLD)
    yield Groups(**values, device=torch.device("cpu"), timeout=None)
    dist.destroy_process_group()


class Graded:
    """A task that remembers who asked it, and what."""

    tokenizer = CharTokenizer()

    def __init__(self, grades_elsewhere: bool, fails_at: str = "none") -> None:
        self.grades_elsewhere, self.fails_at = grades_elsewhere, fails_at
        self.asked: list[tuple[str, bool]] = []  # response, and whether the main thread asked
        self.seen = threading.Event()

    def verify_all(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        main = threading.current_thread() is threading.main_thread()
        self.asked += [(response, main) for response in responses]
        if self.fails_at in responses:
            raise RewardError(f"the row of {self.fails_at}")
        self.seen.set()
        return [Verdict(False, None, f"{p.uid}: {r}") for p, r in zip(problems, responses, strict=True)]


class Engine:
    """Hands responses over in an order that is drawn, some at a time, and then waits until one is graded."""

    def __init__(self, responses: list[str], draw: Random, wait: Callable[[], object]) -> None:
        self.responses, self.draw, self.wait = responses, draw, wait
        self.take: HandOver | None = None
        self.handed = False

    @contextmanager
    def handing_over(self, take: HandOver) -> Iterator[None]:
        self.take = take
        yield
        self.take = None

    def generate(self) -> Rollouts:
        encode = CharTokenizer().encode
        rows = list(range(len(self.responses)))
        self.draw.shuffle(rows)
        while rows and self.take is not None:
            some = [rows.pop() for _ in range(min(len(rows), self.draw.randint(1, 5)))]
            self.take(some, [encode(self.responses[row]) for row in some])
            self.handed = True
            if self.draw.random() < 0.5:
                self.wait()
        tokens = [encode(f"?{response}") for response in self.responses]
        width = max(map(len, tokens))
        tokens_NS = torch.tensor([ids + [0] * (width - len(ids)) for ids in tokens])
        total_N = torch.tensor([len(ids) for ids in tokens])
        zeros_NS = torch.zeros(tokens_NS.shape)
        return Rollouts(tokens_NS, torch.ones_like(total_N), total_N, zeros_NS, zeros_NS, total_N > 0, 0)


def problems(count: int) -> list[Problem]:
    return [Problem(uid, f"{uid}?", None, None) for uid in range(count)]


@pytest.mark.parametrize("seed", range(6))
def test_verdicts_are_those_of_grading_afterwards(seed: int, groups: Groups) -> None:
    draw = Random(seed)
    count, size = draw.randint(1, 7), draw.randint(1, 6)
    responses = [str(draw.randrange(10**6)) for _ in range(count * size)]
    found = []
    for elsewhere in (True, False):
        task: Any = Graded(elsewhere)
        engine: Any = Engine(responses, draw, partial(task.seen.wait, 30))
        with Grading(task, problems(count), size, groups) as grading:
            with grading.beside(engine):
                rollouts = engine.generate()
            found.append([[verdict.reason for verdict in group] for group in grading.verdicts(rollouts)])
        assert engine.handed == elsewhere
        assert sorted(response for response, _ in task.asked) == sorted(responses)
        assert all(main != elsewhere for _, main in task.asked)
    expected = [[f"{p}: {responses[p * size + g]}" for g in range(size)] for p in range(count)]
    assert found == [expected, expected]


def test_a_response_is_graded_before_the_others_are_there(groups: Groups) -> None:
    """The engine does not go on until the first responses have been graded: afterwards would be never."""
    task: Any = Graded(True)
    engine: Any = Engine([str(n) for n in range(40)], Random(3), lambda: waited.append(task.seen.wait(30)))
    waited: list[bool] = []
    with Grading(task, problems(10), 4, groups) as grading, grading.beside(engine):
        engine.generate()
    assert waited and all(waited)


def test_an_error_of_the_reward_reaches_the_step(groups: Groups) -> None:
    task: Any = Graded(True, fails_at="7")
    engine: Any = Engine([str(n) for n in range(12)], Random(1), lambda: None)
    with Grading(task, problems(3), 4, groups) as grading:
        with grading.beside(engine):
            rollouts = engine.generate()
        with pytest.raises(RewardError, match="the row of 7"):
            grading.verdicts(rollouts)

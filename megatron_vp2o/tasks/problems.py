"""What all tasks share: distinct problems drawn from a generator, in splits that cannot overlap.

A problem's split follows from a hash of its canonical text alone.  It does not depend on seeds, sizes or generator
settings, so a model warmed up under one configuration has not seen the held-out problems of another.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from megatron_vp2o.config.schema import TaskConfig
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.interfaces import Tokenizer
from megatron_vp2o.rl.types import Problem, Split, Verdict
from megatron_vp2o.tasks.tokenizer import CharTokenizer, load_tokenizer

logger = logging.getLogger(__name__)

TEST_SHARE, VALIDATION_SHARE = 0.15, 0.10  # of all problems; the rest is for training
PATIENCE = 5000  # draws in a row that bring nothing wanted, after which a generator counts as exhausted


@dataclass(frozen=True, slots=True)
class Draw:
    """One problem from a generator."""

    key: str  # canonical text: equal for problems that are the same up to presentation
    prompt: str
    data: Any


def split_of(key: str) -> Split:
    """The split of the problem with this canonical text, the same on every machine and for ever."""
    position = _hash(key) / 2**64
    if position < TEST_SHARE:
        return Split.test
    return Split.validation if position < TEST_SHARE + VALIDATION_SHARE else Split.train


def stream_seed(name: str, seed: int) -> int:
    """A generator's seed. reasoning-gym seeds item i with seed + i: neighbouring seeds would give the same items."""
    return _hash(f"{name} {seed}") >> 16


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def collect(draws: Iterable[Draw | None], config: TaskConfig, *, progress: bool) -> dict[Split, tuple[Draw, ...]]:
    """Draw until every split has as many distinct problems as wanted, or nothing wanted has come for `PATIENCE` draws.

    Of what was drawn each split keeps a part chosen by hash.  Keeping the first ones instead would make validation and
    test easier than training: the problems that a generator makes first are those it makes often, with more answers.

    Args:
        draws: an endless stream; None where the generator gave nothing that can be used.
        progress: show a bar if this takes longer than a second.

    Raises:
        ConfigError: no training problem, or too few for validation or test.
    """
    wanted = {
        Split.train: config.train_size,
        Split.validation: config.validation_size,
        Split.test: config.test_size,
    }
    seen: dict[Split, dict[str, Draw]] = {split: {} for split in Split}
    missing, idle, drawn = sum(wanted.values()), 0, 0
    with tqdm(total=missing, desc=f"{config.name} problems", delay=1.0, disable=not progress, leave=False) as bar:
        for draw in draws:
            if not missing or idle == PATIENCE:
                break
            drawn, idle = drawn + 1, idle + 1
            if draw is None:
                continue
            problems = seen[split := split_of(draw.key)]
            if draw.key not in problems:
                problems[draw.key] = draw
                if len(problems) <= wanted[split]:
                    missing, idle = missing - 1, 0
                    bar.update()
    if not seen[Split.train]:
        raise ConfigError(f"task.name={config.name} gave no problem in {drawn} draws: widen the task's ranges")
    for split in (Split.validation, Split.test):
        if len(seen[split]) < wanted[split]:
            raise ConfigError(
                f"task.{split.name}_size={wanted[split]}, but with these settings {config.name} has only "
                f"{len(seen[split])} distinct {split.name} problems: choose at most {len(seen[split])}, or widen the "
                "task's ranges"
            )
    if len(seen[Split.train]) < wanted[Split.train]:
        logger.warning(
            "%s has %d distinct training problems with these settings, fewer than task.train_size=%d: all are used",
            config.name,
            len(seen[Split.train]),
            wanted[Split.train],
        )
    return {
        split: tuple(
            sorted(problems.values(), key=lambda draw: (_hash(f"{config.seed} {draw.key}"), draw.key))[: wanted[split]]
        )
        for split, problems in seen.items()
    }


class PooledTask(ABC):
    """A task whose problems are collected when it is made. A subclass says what a right answer is."""

    name: str
    tokenizer: Tokenizer
    max_prompt_tokens: int
    grades_elsewhere = False

    def __init__(self, name: str, pool: dict[Split, tuple[Draw, ...]], tokenizer: str | None = None) -> None:
        self.name = name
        self.tokenizer = CharTokenizer() if tokenizer is None else load_tokenizer(tokenizer)
        self.max_prompt_tokens = max(
            len(self.tokenizer.encode(draw.prompt)) for draws in pool.values() for draw in draws
        )
        self._pool = pool
        self._problems: dict[tuple[Split, int], Problem] = {}

    def size(self, split: Split) -> int:
        """Problems in a split."""
        return len(self._pool[split])

    def problem(self, split: Split, index: int, variant: int = 0) -> Problem:
        """Problem `index` of a split; its right answers are counted when it is first asked for. Raises IndexError.

        Variants are the same problem, differently put where the task can do that (training shows another each epoch).
        """
        if not 0 <= index < self.size(split):
            raise IndexError(f"{self.name} has {self.size(split)} {split.name} problems, no number {index}")
        if (split, index) not in self._problems:
            draw = self._pool[split][index]
            self._problems[split, index] = Problem(index, draw.prompt, draw.data, self._count(draw.data))
        problem = self._problems[split, index]
        return replace(problem, prompt=self._put(problem, variant)) if variant else problem

    def _put(self, problem: Problem, variant: int) -> str:
        """The prompt of a variant."""
        return problem.prompt

    def verify_all(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        """One verdict for each response, one after the other."""
        return [self.verify(problem, response) for problem, response in zip(problems, responses, strict=True)]

    @abstractmethod
    def verify(self, problem: Problem, response: str) -> Verdict:
        """Is `response` (without end-of-sequence) right? Takes any text, in bounded time, and never executes it."""

    @abstractmethod
    def demonstration(self, problem: Problem, seed: int) -> str:
        """One right answer, drawn by `seed`, each distinct one as likely as the next."""

    @abstractmethod
    def _count(self, data: Any) -> int:
        """Distinct right answers."""

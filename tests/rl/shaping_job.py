"""A run of the command line on a task that a random model often solves, so that shaped rewards have something to act on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_vp2o.config.compose import compose
from megatron_vp2o.rl.types import Problem, Verdict
from megatron_vp2o.session import train as train_run
from megatron_vp2o.tasks import TASKS
from megatron_vp2o.tasks.countdown import CountdownTask


class EvenTask(CountdownTask):
    """A response is right if its first character has an even number; it counts by that number modulo 8, in four classes."""

    def verify_all(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        return [
            Verdict(True, ord(text[0]) % 8, "") if text and ord(text[0]) % 2 == 0 else Verdict(False, None, "odd")
            for text in responses
        ]

    def _count(self, data: Any) -> int:
        return 4


def train(recipe: str, overrides: list[str]) -> int:
    """Run a recipe to its end with the task's verifier replaced; returns the exit status."""
    TASKS["countdown"] = EvenTask
    return train_run(compose(recipe, overrides))

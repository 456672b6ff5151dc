"""A run of the command line on a task that a random model often solves, so that shaped rewards have something to act on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.schema import GRPOConfig, ParallelConfig, PolicyLoss
from megatron_vp2o.megatron.platform import world
from megatron_vp2o.rl.selection import select_tokens
from megatron_vp2o.rl.types import Problem, TrainBatch, Verdict
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


def select(objective: str, seed: int) -> list[list[int]]:
    """The tokens of a random batch that an objective treats apart, as (row, position) of all ranks' rows; ranks hold different
    numbers of rows, the last one perhaps none."""
    groups = world.start(ParallelConfig(), 0)
    generator = torch.Generator().manual_seed(seed)
    tokens_NS = torch.zeros(24, 9, dtype=torch.int64)
    mask_NS = torch.rand(24, 9, generator=generator) < 0.7
    behaviour_NS = -2 * torch.rand(24, 9, generator=generator)
    advantages_N = 3 * torch.randn(24, generator=generator)
    cuts = [0, *([13, 24] if groups.dp_size == 2 else [24])]
    row_N = torch.arange(cuts[groups.dp_rank], cuts[groups.dp_rank + 1])
    part = TrainBatch(
        tokens_NS[row_N],
        torch.full((len(row_N),), 9),
        mask_NS[row_N],
        behaviour_logprobs_NS=behaviour_NS[row_N],
        advantages_N=advantages_N[row_N],
        row_N=row_N,
    )
    settings = GRPOConfig(objective=PolicyLoss[objective], covariance_fraction=0.1, covariance_low=0.2)
    selected_NS = select_tokens(part, settings, groups, seed=seed)
    world.stop()
    assert selected_NS is not None
    return [[int(row_N[n]), s] for n, s in selected_NS.nonzero().tolist()]

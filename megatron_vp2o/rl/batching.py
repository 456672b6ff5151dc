"""Which prompts a step sees, and how its rollouts become optimizer steps.

Everything is a function of the seed and of the position, the number of prompts drawn before: there is no hidden iterator
state, so a run goes on where it stood, also with another number of prompts a step.

Shape legend: N sequences of this data-parallel rank, S padded sequence length, P prompts, G group size.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_vp2o.data.shuffle import Order, shuffled
from megatron_vp2o.rl.interfaces import Task
from megatron_vp2o.rl.types import Problem, Rollouts, Split, TrainBatch


class PromptSchedule:
    """Training problems in shuffled epochs; a step takes the next `per_step` ones, dealt in contiguous parts to ranks."""

    def __init__(self, task: Task, *, per_step: int, seed: int, dp_rank: int, dp_size: int) -> None:
        self.task, self.per_step, self.seed = task, per_step, seed
        self.local = per_step // dp_size
        self.first = dp_rank * self.local
        self._epoch = -1
        self._order: Order = shuffled(1, (0,))

    def __call__(self, position: int) -> tuple[list[Problem], list[int]]:
        """This rank's problems of the step before which `position` prompts were drawn, and each one's own position."""
        positions = [position + self.first + i for i in range(self.local)]
        return [self._at(position) for position in positions], positions

    def _at(self, position: int) -> Problem:
        size = self.task.size(Split.train)
        epoch, offset = divmod(position, size)
        if epoch != self._epoch:
            self._order, self._epoch = shuffled(size, (self.seed, epoch)), epoch
        return self.task.problem(Split.train, int(self._order[offset]), variant=epoch)


def policy_batch(
    rollouts: Rollouts, advantages_N: torch.Tensor, keep_N: torch.Tensor, temperature: float
) -> TrainBatch:
    """The rollouts that carry a gradient, as one batch with what the objective needs.

    Behaviour log-probabilities are those without the nucleus, which is what the learner computes too: docs/method.md.
    """
    mask_NS = rollouts.response_mask_NS()[keep_N]
    return TrainBatch(
        tokens_NS=rollouts.tokens_NS[keep_N],
        length_N=rollouts.total_len_N[keep_N],
        loss_mask_NS=mask_NS,
        temperature=temperature,
        behaviour_logprobs_NS=rollouts.model_logprobs_NS[keep_N],
        advantages_N=advantages_N[keep_N],
        gate_row_N=None if rollouts.gates is None else rollouts.gates.row_N[keep_N],
        routes_NSLK=None if rollouts.routes_NSLK is None else rollouts.routes_NSLK[keep_N],
    )


def split(batch: TrainBatch, parts: int, *, seed: tuple[int, ...], rows: int) -> list[TrainBatch]:
    """Deal a batch's rows to `parts` minibatches, the same ones whatever rank holds a row (some may be empty on a rank).

    Args:
        batch: with the global row numbers `row_N`.
        rows: how many rows there are on all ranks.
    """
    if parts == 1:
        return [batch]
    assert batch.row_N is not None
    # Each row's place in a shuffled order, which is cut into equal parts.
    place = np.random.default_rng(seed).permutation(rows)
    part_N = torch.from_numpy(place * parts // rows)[batch.row_N]
    return [batch.rows((part_N == part).nonzero().squeeze(1)) for part in range(parts)]

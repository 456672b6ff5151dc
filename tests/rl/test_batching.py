"""Which prompts a step sees does not depend on ranks, step sizes or what was asked before; rows keep what belongs to them."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vp2o.rl.batching import PromptSchedule, policy_batch, split
from megatron_vp2o.rl.types import Split
from tests.rl.fakes import FakeTask, rollouts_of


def schedule(size: int, per_step: int, *, seed: int = 0, rank: int = 0, ranks: int = 1) -> PromptSchedule:
    task: Any = FakeTask({Split.train: size})
    return PromptSchedule(task, per_step=per_step, seed=seed, dp_rank=rank, dp_size=ranks)


def drawn(size: int, count: int, seed: int) -> list[tuple[int, int]]:
    """(index, variant) of the first `count` prompts, drawn one at a time."""
    one = schedule(size, 1, seed=seed)
    return [one(position)[0][0].data[1:] for position in range(count)]


@pytest.mark.parametrize("seed", range(6))
def test_each_epoch_has_every_problem_once_in_an_order_of_its_own(seed: int) -> None:
    random = Random(seed)
    size = random.randrange(8, 60)
    sequence = drawn(size, 3 * size, seed)
    epochs = [sequence[e * size : (e + 1) * size] for e in range(3)]
    for e, epoch in enumerate(epochs):
        assert sorted(epoch) == [(index, e) for index in range(size)]
    orders = [[index for index, _ in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] != list(range(size))
    assert [index for index, _ in drawn(size, size, seed + 100)] != orders[0]


@pytest.mark.parametrize("seed", range(6))
def test_ranks_deal_a_step_in_contiguous_parts(seed: int) -> None:
    random = Random(seed)
    ranks, size = random.choice([2, 3, 4]), random.randrange(1, 30)
    per_step = ranks * random.randrange(1, 6)
    position = random.randrange(5 * size)
    sequence = drawn(size, position + per_step, seed)[position:]
    parts = [schedule(size, per_step, seed=seed, rank=rank, ranks=ranks)(position) for rank in range(ranks)]
    assert [problem.data[1:] for problems, _ in parts for problem in problems] == sequence
    assert [uid for _, uids in parts for uid in uids] == list(range(position, position + per_step))
    assert {len(problems) for problems, _ in parts} == {per_step // ranks}


@pytest.mark.parametrize("seed", range(6))
def test_other_step_sizes_and_jumps_see_the_same_sequence(seed: int) -> None:
    random = Random(seed)
    size = random.randrange(1, 30)
    sequence = drawn(size, 4 * size + 40, seed)
    position, steps = 0, []
    while position < 4 * size:
        steps.append((position, random.randrange(1, 12)))
        position += steps[-1][1]
    one_after_the_other = [x for start, n in steps for x in schedule(size, n, seed=seed)(start)[0]]
    assert [problem.data[1:] for problem in one_after_the_other] == sequence[:position]
    kept = schedule(size, 5, seed=seed)
    for start in random.sample(range(4 * size), min(8, 4 * size)):  # back and forth between epochs
        assert [problem.data[1:] for problem in kept(start)[0]] == sequence[start : start + 5]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gates", [False, True])
def test_a_policy_batch_has_the_kept_rows_and_what_belongs_to_them(seed: int, gates: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rollouts = rollouts_of(generator, 12, gates=gates)
    keep_N = torch.rand(12, generator=generator) < 0.6
    advantages_N = torch.arange(12.0)
    batch = policy_batch(rollouts, advantages_N, keep_N, temperature=0.7)
    kept = [n for n in range(12) if keep_N[n]]
    assert 0 < len(kept) < 12 and batch.temperature == 0.7 and batch.advantages_N is not None
    assert batch.advantages_N.tolist() == kept
    assert (batch.gate_row_N is not None) == gates
    for row, n in enumerate(kept):
        prompt, total = int(rollouts.prompt_len_N[n]), int(rollouts.total_len_N[n])
        assert batch.tokens_NS[row, :total].tolist() == [3 + n] * total and batch.length_N[row] == total
        assert batch.loss_mask_NS[row].nonzero().squeeze(1).tolist() == list(range(prompt, total))
        # without the nucleus: what the learner computes too
        assert batch.behaviour_logprobs_NS is not None
        assert torch.equal(batch.behaviour_logprobs_NS[row], rollouts.model_logprobs_NS[n])
        if gates:
            assert rollouts.gates is not None and batch.gate_row_N is not None
            assert batch.gate_row_N[row] == rollouts.gates.row_N[n]


def batch_of(rows: list[int]) -> Any:
    rollouts = rollouts_of(torch.Generator().manual_seed(0), 64)
    keep_N = torch.zeros(64, dtype=torch.bool)
    keep_N[rows] = True
    batch = policy_batch(rollouts, torch.arange(64.0), keep_N, 1.0)
    batch.row_N = torch.tensor(rows, dtype=torch.int64)
    return batch


@pytest.mark.parametrize("seed", range(6))
def test_minibatches_are_the_same_whatever_rank_holds_a_row(seed: int) -> None:
    random = Random(seed)
    parts = random.randrange(2, 6)
    present = sorted(random.sample(range(64), random.randrange(20, 64)))  # some groups were left out
    whole = split(batch_of(present), parts, seed=(seed, 3, 0), rows=64)
    assert sorted(row for part in whole for row in rows_of(part)) == present
    for cut in (random.randrange(64), 64):  # rows below it are on one rank, the others on another, which may have none
        halves = [[n for n in present if n < cut], [n for n in present if n >= cut]]
        ranks = [split(batch_of(rows), parts, seed=(seed, 3, 0), rows=64) for rows in halves]
        for part in range(parts):
            assert sorted(n for rank in ranks for n in rows_of(rank[part])) == sorted(rows_of(whole[part]))
    full = split(batch_of(list(range(64))), parts, seed=(seed, 3, 0), rows=64)
    sizes = [len(part.length_N) for part in full]
    assert max(sizes) - min(sizes) <= 1
    others = split(batch_of(present), parts, seed=(seed, 3, 1), rows=64)
    assert [sorted(rows_of(part)) for part in others] != [sorted(rows_of(part)) for part in whole]


def rows_of(batch: Any) -> list[int]:
    """Row numbers; all that belongs to a row must have come along."""
    rows = batch.row_N.tolist()
    assert batch.advantages_N.tolist() == rows and (batch.tokens_NS[:, 0] - 3).tolist() == rows
    assert len(batch.length_N) == len(batch.loss_mask_NS) == len(batch.behaviour_logprobs_NS) == len(rows)
    return rows


def test_one_minibatch_is_the_batch_itself() -> None:
    batch: Any = SimpleNamespace()
    assert split(batch, 1, seed=(0,), rows=5) == [batch]

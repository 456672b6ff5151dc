"""Contexts of the trust region: the positions that response tokens were predicted from, and the routers' inputs there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron.stein_job import VOCAB, small_config, world

from megatron_vp2o.megatron.control.contexts import ContextSampler  # isort: skip  (after the CPU is enabled)
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # isort: skip
from megatron_vp2o.megatron.model.moe_layer import moe_layers  # isort: skip
from megatron_vp2o.megatron.model.packed import PackedRows, pack_rows  # isort: skip
from megatron_vp2o.megatron.model.token_share import TokenShare  # isort: skip
from megatron_vp2o.rl.objectives import next_token  # isort: skip
from megatron_vp2o.rl.types import TrainBatch  # isort: skip

WIDTH = 12


def batch_of(seed: int, rows: int, *, logged: bool = True) -> tuple[TrainBatch, list[tuple[int, int]]]:
    """Prompts and responses of drawn lengths, and (prompt, response) tokens of each; logged sequences are numbered backwards."""
    random = Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shapes = []
    for _ in range(rows):
        prompt = random.randrange(1, 6)
        shapes.append((prompt, random.randrange(1, WIDTH - prompt + 1)))
    prompt_N, response_N = (torch.tensor(part) for part in zip(*shapes, strict=True))
    length_N, position_S = prompt_N + response_N, torch.arange(WIDTH)
    mask_NS = (position_S >= prompt_N[:, None]) & (position_S < length_N[:, None])
    tokens_NS = torch.randint(2, VOCAB, (rows, WIDTH), generator=generator)
    gate_row_N = torch.arange(rows).flip(0) + 100 if logged else None
    return TrainBatch(tokens_NS, length_N, mask_NS, gate_row_N=gate_row_N), shapes


class Layer(SimpleNamespace):
    """Notes what it is told."""

    context_index: Tensor | None = None
    dropped = 0

    def drop_contexts(self) -> None:
        self.dropped += 1


def sampler(layers: list[Any], per_rank: int, stride: int = 1, group: Any = None) -> ContextSampler:
    made = ContextSampler(layers, per_rank, TokenShare(sequence=group))
    made.stride = stride
    return made


def keys_of(made: ContextSampler) -> list[tuple[int, int]]:
    keys = made.keys()
    assert keys is not None
    return [(int(row), int(before)) for row, before in keys]


@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("seed", range(6))
def test_without_a_bound_every_logged_context_is_one_once(seed: int, stride: int) -> None:
    batch, shapes = batch_of(seed, 7)
    layers = [Layer(), Layer()]
    made = sampler(layers, 10**6, stride)
    made.begin_step(1)
    made.before_forward(batch)
    every = {(106 - n, before) for n, (_, response) in enumerate(shapes) for before in range(0, response, stride)}
    keys = keys_of(made)
    assert len(keys) == len(every) and set(keys) == every
    for layer in layers:
        assert layer.context_index is not None
        # positions are numbered as hidden states [S, N] lie, and are those before the token that is predicted
        places = [divmod(int(i), 7) for i in layer.context_index]
        assert places == [(shapes[106 - row][0] - 1 + before, 106 - row) for row, before in keys]


@pytest.mark.parametrize("seed", range(12))
def test_a_bound_holds_over_all_micro_batches_and_keeps_some_of_each(seed: int) -> None:
    random = Random(seed)
    parts = [batch_of(100 * seed + i, random.randrange(1, 9))[0] for i in range(random.randrange(1, 5))]
    per_rank, stride = random.randrange(1, 60), random.choice([1, 3])
    layer, unbounded = Layer(), sampler([Layer()], 10**6, stride)
    made = sampler([layer], per_rank, stride)
    for step in range(2):  # a new step forgets the one before
        made.begin_step(len(parts))
        unbounded.begin_step(len(parts))
        assert layer.dropped == step + 1 and made.keys() is None
        kept = []
        for part in parts:
            made.before_forward(part)
            unbounded.before_forward(part)
            assert layer.context_index is not None and len(layer.context_index) > 0
            kept.append(layer.context_index)
        keys = keys_of(made)
        assert len(keys) == sum(map(len, kept)) <= max(per_rank, len(parts))
        assert set(keys) <= set(keys_of(unbounded))
        for part, index in zip(parts, kept, strict=True):  # evenly spread: equal distances among the contexts
            alone = Layer()
            free = sampler([alone], 10**6, stride)
            free.begin_step(1)
            free.before_forward(part)
            assert alone.context_index is not None
            places = [alone.context_index.tolist().index(i) for i in index.tolist()]
            assert len({b - a for a, b in pairwise(places)}) <= 1 and places[0] == 0


@pytest.mark.parametrize(("seed", "ranks"), [(0, 1), (1, 1), (2, 2), (3, 3), (4, 5)])
def test_packed_rows_have_the_same_contexts(seed: int, ranks: int) -> None:
    batch, _ = batch_of(seed, 7)
    alone = sampler([Layer()], 10**6, stride := 1 + seed % 2)
    alone.begin_step(1)
    alone.before_forward(batch)
    packed = pack_rows(batch.length_N.tolist(), WIDTH, ranks, torch.device("cpu"))
    keys, tokens = [], []
    for rank in range(ranks):
        layer, group = Layer(), SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        made = sampler([layer], 10**6, stride, group)
        made.begin_step(1)
        made.before_forward(batch, packed)
        keys += keys_of(made)
        assert layer.context_index is not None
        tokens += packed.pack(batch.tokens_NS).chunk(ranks)[rank][layer.context_index].tolist()
    assert sorted(keys) == sorted(keys_of(alone)) and keys
    first_N = batch.loss_mask_NS.int().argmax(1)
    places = [(106 - row, int(first_N[106 - row]) - 1 + before) for row, before in keys]
    assert tokens == [int(batch.tokens_NS[n, s]) for n, s in places]  # the token that the prediction was made from


def test_sequences_that_nobody_logged_are_unknown() -> None:
    batch, shapes = batch_of(0, 4, logged=False)
    made = sampler([Layer()], 10**6)
    made.begin_step(1)
    made.before_forward(batch)
    assert {row for row, _ in keys_of(made)} == {-1} and len(keys_of(made)) == sum(r for _, r in shapes)


def test_a_micro_batch_of_padding_has_none() -> None:
    batch, _ = batch_of(0, 3)
    batch.loss_mask_NS = torch.zeros_like(batch.loss_mask_NS)
    layer = Layer()
    made = sampler([layer], 8)
    made.begin_step(1)
    made.before_forward(batch)
    assert keys_of(made) == [] and layer.context_index is not None and len(layer.context_index) == 0


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_that_share_sequences_keep_their_own_positions(ranks: int) -> None:
    batch, _ = batch_of(ranks, 5)
    whole = Layer()
    alone = sampler([whole], 10**6)
    alone.begin_step(1)
    alone.before_forward(batch)
    keys, places = [], []
    for rank in range(ranks):
        layer = Layer()
        group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        made = sampler([layer], 10**6, group=group)
        made.begin_step(1)
        made.before_forward(batch)
        keys += keys_of(made)
        assert layer.context_index is not None
        places += [int(i) + rank * (WIDTH // ranks) * 5 for i in layer.context_index]
    assert keys == keys_of(alone) and whole.context_index is not None and places == whole.context_index.tolist()


@pytest.fixture(scope="module")
def policy() -> Iterator[MegatronPolicy]:
    torch.set_num_threads(1)
    config = small_config()
    groups = world.start(config.parallel, config.seed)
    yield MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=9)
    world.stop()


@pytest.mark.parametrize("per_rank", [7, 10**6])
def test_layers_keep_their_routers_inputs_at_the_contexts(policy: MegatronPolicy, per_rank: int) -> None:
    """In a real forward and backward pass of several micro-batches; what is kept is compared with what went in."""
    layers = moe_layers(policy.ddp)
    parts: list[TrainBatch] = []
    inputs: dict[int, list[Tensor]] = {i: [] for i in range(len(layers))}

    class Watching(ContextSampler):
        def before_forward(self, part: TrainBatch, packed: PackedRows | None = None) -> None:
            parts.append(part)
            super().before_forward(part, packed)

    made = Watching(layers, per_rank, TokenShare())
    hooks = [
        layer.router.register_forward_pre_hook(lambda _, given, i=i: inputs[i].append(given[0].detach().clone()))
        for i, layer in enumerate(layers)
    ]
    policy.watcher = made
    try:
        batch, shapes = batch_of(1, 9)
        policy.forward_backward(batch, next_token, micro_batch_size=4)
    finally:
        policy.watcher = None
        for hook in hooks:
            hook.remove()
    keys = keys_of(made)
    assert len(parts) == 3 and len(layers) == 2
    assert 3 <= len(keys) <= per_rank if per_rank == 7 else len(keys) == sum(r for _, r in shapes)
    for i, layer in enumerate(layers):
        kept = layer.contexts()
        assert len(kept) == len(keys)
        for (row, before), kept_D in zip(keys, kept, strict=True):
            n = 108 - row  # of the whole batch
            (b,) = [b for b, part in enumerate(parts) if part.gate_row_N is not None and row in part.gate_row_N]
            gate_row_N = parts[b].gate_row_N
            assert gate_row_N is not None
            column = gate_row_N.tolist().index(row)
            assert torch.equal(kept_D, inputs[i][b][shapes[n][0] - 1 + before, column])
    made.drop()
    assert all(len(layer.contexts()) == 0 for layer in layers)

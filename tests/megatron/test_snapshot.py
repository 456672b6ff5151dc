"""A snapshot of a real learner: back to the bit, half-way back, and nothing of it moves with the learner."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.megatron.stein_job import ROWS, VOCAB, global_batch, small_config, world

from megatron_vp2o.config.schema import Precision  # isort: skip  (after the CPU is enabled)
from megatron_vp2o.megatron.control import snapshot as snapshot_module  # isort: skip
from megatron_vp2o.megatron.control.snapshot import Snapshot, _copies  # isort: skip
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # isort: skip
from megatron_vp2o.parallel.groups import Groups  # isort: skip
from megatron_vp2o.rl.objectives import next_token  # isort: skip

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": Precision.bf16},
    "distributed optimizer": {"distributed": True},
    "bf16, distributed optimizer": {"precision": Precision.bf16, "distributed": True},
}


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    torch.set_num_threads(1)
    config = small_config()
    yield world.start(config.parallel, config.seed)
    world.stop()


class Learner:
    def __init__(self, groups: Groups, kind: str) -> None:
        settings = dict(KINDS[kind])
        distributed = bool(settings.pop("distributed", False))
        config = small_config(model={**settings, "hidden_size": 16, "num_layers": 1}, distributed_optimizer=distributed)
        torch.manual_seed(0)
        self.policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=9)
        self.losses: list[float] = []

    def steps(self, *batches: int) -> None:
        for batch in batches:
            metrics = self.policy.forward_backward(global_batch(batch, range(ROWS)), next_token, micro_batch_size=16)
            stats = self.policy.optimizer_step(1)
            assert not stats.skipped
            self.losses.append(metrics["loss"])

    def weights(self) -> list[torch.Tensor]:
        self.policy.gather_parameters()
        return [parameter.detach().clone() for parameter in self.policy.model.parameters()]

    def owned(self) -> list[torch.Tensor]:
        """Parameters that the optimizers step: float32, or the shard of them."""
        return [p.detach().clone() for inner in self._inner() for group in inner.param_groups for p in group["params"]]

    def moments(self) -> dict[int, dict[str, torch.Tensor]]:
        return {
            i: {key: value.clone() for key, value in inner.state[p].items() if isinstance(value, torch.Tensor)}
            for inner in self._inner()
            for i, p in enumerate(p for group in inner.param_groups for p in group["params"])
            if p in inner.state
        }

    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.policy.optimizer.param_groups] + [self.policy.scheduler.num_steps]

    def _inner(self) -> list[torch.optim.Optimizer]:
        return [optimizer.optimizer for optimizer in self.policy.optimizers()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def all_numbers(tensors: list[torch.Tensor], kind: str) -> torch.Tensor:
    """The numbers of tensors in whatever order, in the precision of the model."""
    numbers = torch.cat([tensor.flatten().float() for tensor in tensors])
    return (numbers.bfloat16() if "bf16" in kind else numbers).sort().values


def moved(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_learner_goes_on_as_if_nothing_had_been(groups: Groups, kind: str, on_host: bool) -> None:
    random = Random(f"{kind} {on_host}")
    before, away = random.randrange(3), random.randrange(1, 4)  # none before: the optimizer has no moments yet
    learner, plain = Learner(groups, kind), Learner(groups, kind)
    assert equal(learner.weights(), plain.weights())
    for made in (learner, plain):
        made.steps(*range(before))
    weights, owned, moments, rates = learner.weights(), learner.owned(), learner.moments(), learner.rates()
    snapshot = Snapshot(learner.policy, on_host=on_host)
    for _ in range(2):  # a snapshot may be used more than once
        learner.steps(*range(20, 20 + away))
        assert moved(weights, learner.weights()) and moved(owned, learner.owned()) and learner.rates() != rates
        snapshot.restore()
        assert equal(weights, learner.weights()) and equal(owned, learner.owned()) and learner.rates() == rates
        now = learner.moments()
        assert now.keys() == moments.keys() and all(
            equal(list(now[i].values()), list(moments[i].values())) for i in now
        )
    del learner.losses[before:]
    for made in (learner, plain):
        made.steps(30, 31)
    assert learner.losses == plain.losses and equal(learner.weights(), plain.weights())


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_halving_goes_half_of_the_way_back(groups: Groups, kind: str, on_host: bool) -> None:
    learner = Learner(groups, kind)
    learner.steps(0)
    before, weights = learner.owned(), learner.weights()
    snapshot = Snapshot(learner.policy, on_host=on_host)
    learner.steps(1)
    after, moments, rates = learner.owned(), learner.moments(), learner.rates()
    assert moved(before, after)
    for halvings in (1, 2, 3):
        snapshot.halve()
        share = 0.5**halvings
        for start, end, now in zip(before, after, learner.owned(), strict=True):
            wanted = start.double() + share * (end.double() - start.double())
            torch.testing.assert_close(now.double(), wanted, rtol=0, atol=2e-7 * float(end.abs().max()) + 1e-12)
        model, masters = all_numbers(learner.weights(), kind), all_numbers(learner.owned(), kind)
        assert torch.equal(model, masters), "what the model computes with follows"
        assert moved(weights, learner.weights())
    kept = learner.moments()
    assert all(equal(list(kept[i].values()), list(moments[i].values())) for i in moments) and learner.rates() == rates
    snapshot.restore()
    assert equal(before, learner.owned()) and equal(weights, learner.weights())


def test_a_snapshot_on_the_host_is_there(groups: Groups) -> None:
    """And shares no memory with what it is of."""
    learner = Learner(groups, "fp32")
    learner.steps(0)
    for on_host in (False, True):
        kept = Snapshot(learner.policy, on_host=on_host)._kept
        assert kept and all(old.state for old in kept)
        for old in kept:
            assert old.value.device.type == "cpu" and old.value.data_ptr() != old.parameter.data_ptr()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_copies_of_any_tensors_are_equal_and_by_themselves(data: st.DataObject) -> None:
    kinds = st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64]), st.lists(st.integers(0, 5), max_size=3)
    )
    drawn = data.draw(st.lists(kinds, max_size=12))
    tensors = [torch.randn(*shape).to(dtype) if shape else torch.tensor(1.5).to(dtype) for dtype, shape in drawn]
    room = data.draw(st.sampled_from([1, 64, 2**20]))
    with mock.patch.object(snapshot_module, "ROOM_BYTES", room):
        copies = _copies(tensors, data.draw(st.booleans()))
    expected = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    assert len(copies) == len(tensors)
    for copy, there in zip(copies, expected, strict=True):
        assert copy.dtype == there.dtype and torch.equal(copy, there)
        copy.fill_(7)  # and no two share an element
    assert all((copy == 7).all() for copy in copies) and not any(tensor.any() for tensor in tensors)

"""What Stein transform and trust region carry from step to step goes through a checkpoint, for any combination of switches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_vp2o.config.schema import ControlMode, SteinConfig, TrustRegionConfig
from megatron_vp2o.core.calibration import MIN_PAIRS
from megatron_vp2o.core.deferred import known
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl.drift import SampledDrift
from megatron_vp2o.rl.objectives import next_token
from tests.megatron.control_job import (
    ExpertPrototypes,
    MegatronEngine,
    MegatronPolicy,
    SteinTransform,
    TrustRegion,
    world,
)
from tests.megatron.stein_job import ROWS, VOCAB, global_batch, small_config

from megatron_vp2o.megatron.checkpoint.checkpointer import MegatronCheckpointer  # isort: skip  (after the CPU is enabled)

ACCEPT, REJECT = 1.9, 1e-9


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    torch.set_num_threads(1)
    config = small_config()
    yield world.start(config.parallel, config.seed)
    world.stop()


class Learner:
    """A policy with what the switches ask for."""

    def __init__(self, groups: Groups, folder: Path, *, observe: bool, bounded: bool, interval: int) -> None:
        config = small_config()
        stein: SteinConfig = replace(config.algorithm.stein, prototype_interval=interval)
        self.policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=20)
        self.engine = MegatronEngine(config, self.policy, eos_ids=(1,), pad_id=0)
        self.engine.refresh(0)
        self.prototypes = ExpertPrototypes(self.policy.ddp, stein, groups)
        self.transform = SteinTransform(self.prototypes, optimizer=self.policy.optimizer) if observe else None
        others = [] if self.transform is None else [self.transform]
        settings = TrustRegionConfig(mode=ControlMode.enforce, contexts_per_rank=64)
        self.region = TrustRegion(self.policy, self.prototypes, settings, *others) if bounded else None
        self.saver = MegatronCheckpointer(
            folder,
            self.policy,
            self.engine,
            keep=9,
            tokenizer_save=None,
            prototypes=self.prototypes,
            stein=self.transform,
            region=self.region,
        )

    def step(self, batch: int, delta: float) -> dict[str, float]:
        rows = global_batch(batch, range(ROWS))
        rows.row_N, rows.behaviour_logprobs_NS = torch.arange(ROWS), -3 * torch.ones(rows.tokens_NS.shape)
        if self.region is not None:
            self.region.settings = replace(self.region.settings, delta=delta)
            self.region.begin(rows)
        metrics = self.policy.forward_backward(rows, next_token, micro_batch_size=3)
        if self.transform is not None:
            metrics |= self.transform.apply()
        stats = self.policy.optimizer_step(1) if self.region is None else self.region.step(known(metrics))
        return metrics | stats.metrics

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {name: p.detach().clone() for name, p in self.policy.model.named_parameters()}
        found["current"] = self.prototypes.current
        if self.prototypes.state is not None:
            found |= vars(self.prototypes.state)
        if self.transform is not None:
            found |= {"steps": self.transform.steps, "coactivation": self.transform.coactivation_LEE}
        if self.region is not None:
            found |= {f"anchor {name}": tensor for name, tensor in (self.region._anchor or {}).items()}
            found |= self.region.counters()
        return found


def different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) else bool(x == y)

    return sorted(a.keys() ^ b.keys()) + [key for key in a.keys() & b.keys() if not same(a[key], b[key])]


@pytest.mark.parametrize(
    ("observe", "bounded", "interval"), [(True, True, 1), (True, True, 3), (True, False, 1), (False, True, 1)]
)
def test_transform_and_region_go_on(
    groups: Groups, tmp_path: Path, observe: bool, bounded: bool, interval: int
) -> None:
    """At every point: before the first step, after accepted and rejected ones, between updates of the prototypes."""

    def learner() -> Learner:
        return Learner(groups, tmp_path / "checkpoints", observe=observe, bounded=bounded, interval=interval)

    first = learner()
    if first.region is not None:
        first.region.set_anchor()
    start = first.state()
    deltas = [ACCEPT, REJECT, ACCEPT, ACCEPT]
    saved, states, metrics = [], [], []
    for batch, delta in enumerate(deltas):
        saved.append(first.saver.save(batch, {"actor_age": 1, "actor_version": 0}))
        metrics.append(first.step(batch, delta))
        states.append(first.state())
    assert len(different(start, states[-1])) > 5
    if bounded:
        assert first.region is not None and first.region.steps_rejected == 1
    for batch, path in enumerate(saved):
        resumed = learner()
        resumed.saver.load(path)
        for later in range(batch, min(batch + 2, len(deltas))):
            assert resumed.step(later, deltas[later]) == metrics[later], (batch, later)
            assert different(resumed.state(), states[later]) == [], (batch, later)


def test_prototypes_may_be_wanted_by_less_or_more_than_the_checkpoint_has(groups: Groups, tmp_path: Path) -> None:
    """The transform, or the region, is switched on or off between stop and start."""
    for name, observe, bounded in (("field", True, False), ("region", False, True), ("both", True, True)):
        source = Learner(groups, tmp_path / name, observe=observe, bounded=bounded, interval=1)
        if source.region is not None:
            source.region.set_anchor()
        source.step(0, ACCEPT)
        path = source.saver.save(1, {"actor_age": 1, "actor_version": 0})
        for other_observe, other_bounded in ((True, False), (False, True), (True, True)):
            other = Learner(groups, tmp_path / "other", observe=other_observe, bounded=other_bounded, interval=1)
            other.saver.load(path)
            assert torch.equal(other.prototypes.values_LED, source.prototypes.values_LED)
            if other.transform is not None:
                assert (other.transform.coactivation_LEE is None) == (not observe)
            if other.region is not None:
                # Without an anchor the loop has to refresh the actors first.
                assert other.engine.version == (0 if bounded else -1)
                other.region.set_anchor()
            moved = other.step(1, ACCEPT)
            assert all(value == value for value in moved.values())


def test_what_was_learnt_of_delta_goes_on(groups: Groups, tmp_path: Path) -> None:
    """With delta_nats the bound is that of the pairs seen so far, and the same after a stop and a start."""

    def learner() -> Learner:
        one = Learner(groups, tmp_path / "checkpoints", observe=True, bounded=True, interval=1)
        assert one.region is not None
        one.region.drift = SampledDrift(one.policy, groups, share=0.5, micro_batch_size=4)
        one.region.settings = replace(one.region.settings, delta_nats=0.05)
        return one

    first = learner()
    assert first.region is not None
    first.region.set_anchor()
    metrics = []
    for batch in range(8):
        if batch == MIN_PAIRS + 2:
            path = first.saver.save(batch, {"actor_age": 1, "actor_version": 0})
        metrics.append(first.step(batch, ACCEPT))
    deltas = [one["trust_region/delta"] for one in metrics]
    assert deltas[:MIN_PAIRS] == [ACCEPT] * MIN_PAIRS and len(set(deltas[MIN_PAIRS:])) == 8 - MIN_PAIRS
    # the pairs of all steps, by numpy
    pairs = [(one["trust_region/proposed"], one["trust_region/policy_drift_proposed"]) for one in metrics]
    distance, drift = np.array(pairs[:-1]).T
    weight = 0.9 ** np.arange(len(distance))[::-1]
    assert deltas[-1] == pytest.approx(0.05 * (weight * distance**2).sum() / (weight * distance * drift).sum())
    resumed = learner()
    resumed.saver.load(path)
    for batch in range(MIN_PAIRS + 2, 8):
        assert resumed.step(batch, ACCEPT) == metrics[batch]
    assert different(resumed.state(), first.state()) == []

"""Next-token training with a stand-in for the policy: one optimizer step a step, on the stream's next batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch

from megatron_vp2o.config.schema import SupervisedConfig, TrainConfig
from megatron_vp2o.core.deferred import Deferred, known
from megatron_vp2o.data.documents import TaskDemonstrations
from megatron_vp2o.data.packing import PackedBatches
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl.loop import Stopwatch
from megatron_vp2o.rl.supervised import SupervisedTrainer, validation_loss
from megatron_vp2o.rl.types import Split
from tests.rl.fakes import FakeCheckpointer, FakePolicy, FakeSink, FakeTask, groups_of

BATCH = 4


@pytest.fixture
def groups() -> Iterator[Groups]:
    with groups_of() as made:
        yield made


def stream(rows: int = BATCH, pack: bool = True) -> PackedBatches:
    task: Any = FakeTask({Split.train: 30})
    documents = TaskDemonstrations(task, Split.train, seed=0)
    return PackedBatches(documents, sequence_length=16, rows=rows, pack=pack, seed=3, pad_id=0)


class Made:
    def __init__(self, groups: Groups, *, skips: set[int] | None = None, batches: PackedBatches | None = None) -> None:
        self.log: list[str] = []
        self.policy = FakePolicy(self.log, skips=skips or set(), reports={"moe/router_entropy": 1.5, "other": 3.0})
        self.batches = batches or stream()
        self.trainer = SupervisedTrainer(
            TrainConfig(algorithm=SupervisedConfig(global_batch_size=BATCH, micro_batch_size=2)),
            groups,
            FakeSink(),
            FakeCheckpointer(),
            policy=self.policy,
            batches=self.batches,
            held_out=lambda final: {"eval/loss": 1.0 + final},
            transform=self.transform,
        )

    def transform(self) -> Deferred[dict[str, float]]:
        self.log.append("transform")
        return known({"stein/self_weight": 0.5})

    def steps(self, count: int) -> list[dict[str, float]]:
        metrics = []
        for _ in range(count):
            metrics.append(self.trainer.step(self.trainer.progress.step, Stopwatch()))
            self.trainer.progress.step += 1
        return metrics


def test_a_step_is_one_update_on_the_next_batch(groups: Groups) -> None:
    made, twin = Made(groups), stream()
    found = made.steps(3)
    assert made.log == ["accumulate_gradients", "transform", "gradient_norm"] * 3
    tokens = 0
    for metrics, batch in zip(found, made.policy.batches, strict=True):
        expected = next(twin)
        assert torch.equal(batch.tokens_NS, expected.tokens_NS)
        tokens += int(expected.loss_mask_NS.sum())
        assert metrics["supervised/loss"] == 0.0  # the fake says probability 1
        assert metrics["moe/router_entropy"] == 1.5 and metrics["stein/self_weight"] == 0.5 and "other" not in metrics
        assert metrics["optimizer/lr"] == 0.5 and metrics["optimizer/grad_norm"] == 2.0
        assert metrics["time/tokens_per_s"] > 0
    assert [metrics["optimizer/steps"] for metrics in found] == [1, 2, 3]
    progress = made.trainer.progress
    assert (progress.tokens, progress.samples, progress.optimizer_steps) == (tokens, 3 * BATCH, 3) and tokens > 3
    assert made.trainer.evaluate(True) == {"eval/loss": 2.0} and made.trainer.evaluate(False) == {"eval/loss": 1.0}


def test_a_skipped_step_is_counted_and_its_state_restored(groups: Groups) -> None:
    made = Made(groups, skips={1})
    found = made.steps(3)
    assert [metrics["optimizer/skipped"] for metrics in found] == [0, 1, 1]
    assert [metrics["optimizer/steps"] for metrics in found] == [1, 1, 2]
    assert made.policy.buffer == made.policy.weights == 2 and made.log.count("restore_state") == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_resumed_run_sees_the_batches_that_would_have_come(groups: Groups, seed: int) -> None:
    before, after = Random(seed).randrange(1, 12), 4
    whole, first, second = Made(groups), Made(groups), Made(groups)
    whole.steps(before + after)
    first.steps(before)
    second.trainer.restore(copy.deepcopy(vars(first.trainer.progress)))
    second.steps(after)
    for ours, theirs in zip(second.policy.batches, whole.policy.batches[before:], strict=True):
        assert torch.equal(ours.tokens_NS, theirs.tokens_NS) and torch.equal(ours.loss_mask_NS, theirs.loss_mask_NS)
    assert vars(second.trainer.progress) == vars(whole.trainer.progress)


@pytest.mark.parametrize("pack", [False, True])
def test_the_validation_loss_is_the_mean_of_the_first_batchs_tokens(groups: Groups, pack: bool) -> None:
    policy: Any = FakePolicy([])  # log-probability of token t: -t / 8
    batches = stream(rows=6, pack=pack)
    first = next(batches)
    costs = [float(token) / 8 for token in first.tokens_NS[first.loss_mask_NS]]
    next(batches)
    for _ in range(2):  # the same documents every time
        assert validation_loss(policy, batches, 2, groups) == pytest.approx(sum(costs) / len(costs), rel=1e-6)

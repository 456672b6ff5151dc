"""Steps that are skipped leave no trace; the budget is what its definition says of the log-ratios that passes saw."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch

from megatron_vp2o.config.schema import BudgetConfig
from megatron_vp2o.core.budget import Budget
from megatron_vp2o.core.choices import RatioLength
from megatron_vp2o.core.deferred import known
from megatron_vp2o.rl.control import BudgetMeter, PlainSteps
from megatron_vp2o.rl.types import TrainBatch
from tests.rl.fakes import FakePolicy, groups_of, rollouts_of


class Counter:
    """Something whose state a step changes."""

    def __init__(self) -> None:
        self.state = 0

    def save_state(self) -> int:
        return self.state

    def restore_state(self, saved: int) -> None:
        self.state = saved


@pytest.mark.parametrize("seed", range(8))
def test_a_skipped_step_leaves_no_trace(seed: int) -> None:
    random = Random(seed)
    skips = {n for n in range(12) if random.random() < 0.5}
    policy, others = FakePolicy([], skips=skips), [Counter() for _ in range(random.randrange(3))]
    steps: Any = PlainSteps(policy, *others)  # type: ignore[arg-type]
    taken = 0
    for n in range(12):
        steps.begin(None)
        policy.buffer += 10  # a forward pass
        for other in others:
            other.state += 1
        stats = steps.step(known({"tokens": 5.0}))
        taken += n not in skips
        assert stats.skipped == (n in skips) and stats.tokens == 5
        assert policy.buffer == 10 * taken and policy.weights == taken
        assert all(other.state == taken for other in others)


def metered(settings: BudgetConfig, batches: list[tuple[torch.Tensor, TrainBatch]]) -> tuple[Budget, Budget]:
    """The budget after these forward passes, and what a second reading says."""
    with groups_of() as groups:
        meter = BudgetMeter(settings, groups)
        passed = (torch.tensor(3.0), {"loss": torch.tensor(4.0)})
        calls = []

        def objective(logprobs_NS: torch.Tensor, entropy_NS: torch.Tensor, batch: TrainBatch) -> Any:
            calls.append((logprobs_NS, entropy_NS, batch))
            return passed

        watched = meter.watch(objective)
        for logprobs_NS, batch in batches:
            entropy_NS = torch.rand(logprobs_NS.shape)
            assert watched(logprobs_NS, entropy_NS, batch) is passed
            assert calls[-1] == (logprobs_NS, entropy_NS, batch)
        return meter.spent().read(), meter.spent().read()


@pytest.mark.parametrize("ratio_length", RatioLength)
@pytest.mark.parametrize("seed", range(4))
def test_the_budget_is_that_of_its_definition(ratio_length: RatioLength, seed: int) -> None:
    random = Random(seed)
    generator = torch.Generator().manual_seed(seed)
    temper = random.choice([0.25, 1.0, 2.0])
    rollouts = rollouts_of(generator, 10)
    mask_NS = rollouts.response_mask_NS()
    mask_NS[random.randrange(10)] = False  # a row without a token that counts is no sequence
    logprobs_NS = rollouts.model_logprobs_NS + torch.randn(mask_NS.shape, generator=generator) * 0.3
    batch = TrainBatch(
        rollouts.tokens_NS, rollouts.total_len_N, mask_NS, behaviour_logprobs_NS=rollouts.model_logprobs_NS
    )
    ratios = []
    for n in range(10):
        tokens = [s for s in range(mask_NS.shape[1]) if mask_NS[n, s]]
        if tokens:
            summed = sum(float(logprobs_NS[n, s]) - float(rollouts.model_logprobs_NS[n, s]) for s in tokens)
            ratios.append(summed / len(tokens) if ratio_length is RatioLength.mean else summed)
    weights = [math.exp(temper * ratio) for ratio in ratios]
    settings = BudgetConfig(temper=temper, ratio_length=ratio_length)
    cut = random.randrange(1, 9)
    first, second = torch.arange(cut), torch.arange(cut, 10)
    in_parts = [(logprobs_NS[rows], batch.rows(rows)) for rows in (first, second)]
    for passes in ([(logprobs_NS, batch)], in_parts):
        found, again = metered(settings, passes)
        assert found.sequences == len(ratios) == 9
        assert found.drift == pytest.approx(sum(map(abs, ratios)) / 9, rel=1e-6)
        assert found.ess == pytest.approx(sum(weights) ** 2 / (9 * sum(w * w for w in weights)), rel=1e-6)
        assert 0 < found.ess < 1 and found.drift > 0
        assert again == Budget(0.0, 1.0, 0), "reading begins anew"


def test_a_meter_holds_no_graph() -> None:
    rollouts = rollouts_of(torch.Generator().manual_seed(0), 2)
    batch = TrainBatch(
        rollouts.tokens_NS,
        rollouts.total_len_N,
        rollouts.response_mask_NS(),
        behaviour_logprobs_NS=rollouts.model_logprobs_NS,
    )
    logprobs_NS = rollouts.model_logprobs_NS.clone().requires_grad_()
    with groups_of() as groups:
        meter = BudgetMeter(BudgetConfig(), groups)
        loss, _ = meter.watch(lambda logprobs_NS, *_: (logprobs_NS.sum(), {}))(logprobs_NS, logprobs_NS, batch)
        assert loss.requires_grad
        assert not any(part.requires_grad for seen in meter._seen for part in seen)
        assert meter.spent().read() == Budget(0.0, 1.0, 2)

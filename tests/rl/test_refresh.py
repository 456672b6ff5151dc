"""When actors are refreshed: what counts, what wins, and that a resumed run decides as the one before would have."""

from __future__ import annotations

import json
import math
from random import Random

import pytest

from megatron_vp2o.core.budget import Budget, RefreshReason
from megatron_vp2o.rl.interfaces import RefreshPolicy
from megatron_vp2o.rl.refresh import EveryBatches, WhenSpent

FRESH = Budget(0.0, 1.0, 8)


@pytest.mark.parametrize("interval", [1, 2, 7])
def test_every_batches_counts_the_age(interval: int) -> None:
    policy = EveryBatches(interval)
    policy.observe(Budget(1e9, 1e-9, 8), rejected=False)  # a budget decides nothing here
    assert [policy.reason(age) for age in range(interval)] == [None] * interval
    assert {policy.reason(age) for age in range(interval, 3 * interval)} == {RefreshReason.interval}


def test_a_rejection_counts_until_the_next_batch_had_none() -> None:
    for policy in (EveryBatches(5), WhenSpent(0.1, 0.9, 5)):
        policy.observe(FRESH, rejected=True)
        assert [policy.reason(age) for age in (0, 1, 9)] == [RefreshReason.rejected] * 3
        policy.observe(FRESH, rejected=False)
        assert policy.reason(1) is None and policy.reason(9) is not None


@pytest.mark.parametrize(
    ("budget", "age", "expected"),
    [
        (None, 1, None),
        (FRESH, 1, None),
        (Budget(0.1, 0.9, 8), 3, None),  # at its bounds is within them
        (Budget(0.11, 0.5, 8), 4, RefreshReason.drift),  # before ESS, before age
        (Budget(0.0, 0.89, 8), 4, RefreshReason.ess),
        (FRESH, 4, RefreshReason.max_age),
        (None, 4, RefreshReason.max_age),
        (Budget(math.nan, 1.0, 8), 1, RefreshReason.drift),
        (Budget(0.0, math.nan, 8), 1, RefreshReason.ess),
    ],
)
def test_when_spent_takes_the_most_pressing_reason(
    budget: Budget | None, age: int, expected: RefreshReason | None
) -> None:
    policy = WhenSpent(max_drift=0.1, min_ess=0.9, max_age=4)
    policy.observe(budget, rejected=False)
    assert policy.reason(age) is expected
    ageless = WhenSpent(max_drift=0.1, min_ess=0.9, max_age=None)
    ageless.observe(budget, rejected=False)
    assert ageless.reason(10**6) is (None if expected is RefreshReason.max_age else expected)


def test_before_the_first_batch_nothing_is_spent() -> None:
    assert WhenSpent(0.1, 0.9, 4).reason(0) is None and EveryBatches(4).reason(0) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_resumed_run_decides_the_same(seed: int) -> None:
    random = Random(seed)

    def limits() -> list[RefreshPolicy]:
        return [EveryBatches(3), WhenSpent(0.1, 0.9, 3)]

    for policy, resumed in zip(limits(), limits(), strict=True):
        for _ in range(random.randrange(3)):
            drift, ess = random.choice([0.0, 0.2, math.inf, math.nan]), random.choice([1.0, 0.5, math.nan])
            policy.observe(random.choice([None, Budget(drift, ess, 5)]), random.random() < 0.3)
        resumed.load_state_dict(json.loads(json.dumps(policy.state_dict())))  # plain values
        assert [resumed.reason(age) for age in range(6)] == [policy.reason(age) for age in range(6)]


def test_state_of_the_other_kind_can_be_taken_over() -> None:
    """A run may be resumed with the budget enforced that it was not before, and the other way round."""
    before, after = EveryBatches(3), WhenSpent(0.1, 0.9, None)
    before.observe(None, rejected=True)
    after.load_state_dict(before.state_dict())
    assert after.reason(0) is RefreshReason.rejected
    after.observe(Budget(5.0, 1.0, 8), rejected=False)
    before.load_state_dict(after.state_dict())
    assert before.reason(0) is None

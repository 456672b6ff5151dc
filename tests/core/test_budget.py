"""Drift and effective sample size against plain formulas, over parts, and at the extremes.

Shape legend: N sequences, S positions.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vp2o.core.budget import (
    BUDGET_SUMS,
    Budget,
    RefreshReason,
    budget,
    budget_sums,
    combine,
    refresh_reasons,
    sequence_log_ratios,
)

RATIOS = st.lists(st.floats(-20, 20), min_size=1, max_size=12)


def looped(ratios: list[float], temper: float) -> Budget:
    tempered = [math.exp(temper * value) for value in ratios]
    ess = sum(tempered) ** 2 / (len(ratios) * sum(value**2 for value in tempered))
    return Budget(sum(map(abs, ratios)) / len(ratios), ess, len(ratios))


@given(RATIOS, st.sampled_from([0.0, 0.1, 0.5, 1.0]))
@settings(deadline=None)
def test_budget_is_that_of_the_formulas(ratios: list[float], temper: float) -> None:
    got = budget(budget_sums(torch.tensor(ratios, dtype=torch.float64), temper=temper))
    assert got == pytest.approx(looped(ratios, temper), rel=1e-10)
    assert 0 < got.ess <= 1


@given(RATIOS, st.data())
@settings(deadline=None)
def test_parts_combine_to_the_whole(ratios: list[float], data: st.DataObject) -> None:
    """Whatever the dealing; empty parts and sequences that do not count change nothing."""
    values_N = torch.tensor(ratios, dtype=torch.float64)
    owners_N = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(ratios), max_size=len(ratios))))
    separate = [budget_sums(values_N[owners_N == rank], temper=0.5) for rank in range(4)]
    padded = [
        budget_sums(torch.where(owners_N == rank, values_N, torch.nan), temper=0.5, valid_N=owners_N == rank)
        for rank in range(4)
    ]
    whole = budget(budget_sums(values_N, temper=0.5))
    for parts in (separate, padded):
        stacked = torch.stack(parts)
        assert stacked.shape == (4, BUDGET_SUMS)
        assert budget(combine(stacked)) == pytest.approx(whole, rel=1e-10)
        nested = torch.stack([combine(stacked[:3]), combine(stacked[3:])])
        assert budget(combine(nested)) == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize("value", [0.0, 0.3, -7.0, 1e4, -1e4])
@pytest.mark.parametrize("N", [1, 2, 100])
def test_equal_ratios_have_full_sample_size(value: float, N: int) -> None:
    got = budget(budget_sums(torch.full((N,), value), temper=1.0))
    assert got.drift == pytest.approx(abs(value)) and got.ess == pytest.approx(1, abs=1e-10) and got.ess <= 1


@pytest.mark.parametrize("value", [1e2, 1e4])
@pytest.mark.parametrize("N", [1, 2, 100])
def test_one_dominant_ratio_leaves_one_sample(value: float, N: int) -> None:
    for log_ratios_N in (torch.zeros(N), torch.full((N,), -value)):
        log_ratios_N[0] = value
        assert budget(budget_sums(log_ratios_N, temper=1.0)).ess == pytest.approx(1 / N, rel=1e-10)


def test_extremes_of_both_signs_stay_finite() -> None:
    got = budget(budget_sums(torch.tensor([1e4, -1e4, 0.0, 1e4]), temper=1.0))
    assert got == pytest.approx(Budget(7.5e3, 0.5, 4))


def test_no_sequence() -> None:
    empty = budget_sums(torch.zeros(0), temper=1.0)
    assert budget(empty) == budget(combine(torch.stack([empty, empty]))) == Budget(0.0, 1.0, 0)
    assert not empty.isnan().any()
    with pytest.raises(ValueError, match=r"temper=-1.0: choose 0 or more"):
        budget_sums(torch.zeros(2), temper=-1.0)


@pytest.mark.parametrize("normalise", [True, False])
def test_sequence_log_ratios_are_those_of_a_loop(normalise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs_NS, behaviour_NS = (-torch.rand(6, 9, generator=generator) for _ in range(2))
    mask_NS = torch.rand(6, 9, generator=generator) < 0.5
    mask_NS[2] = False
    expected = []
    for n in range(6):
        terms = [(logprobs_NS[n, s] - behaviour_NS[n, s]).item() for s in range(9) if mask_NS[n, s]]
        expected.append(sum(terms) / (len(terms) or 1) if normalise else sum(terms))
    logprobs_NS[~mask_NS], behaviour_NS[~mask_NS] = torch.nan, -torch.inf
    got_N, valid_N = sequence_log_ratios(
        logprobs_NS.requires_grad_(), behaviour_NS, mask_NS, normalise_by_length=normalise
    )
    assert got_N.tolist() == pytest.approx(expected, rel=1e-6) and not got_N.requires_grad
    assert valid_N.tolist() == mask_NS.any(1).tolist() and not valid_N[2]


def reasons(
    spent: Budget | None, *, age: int | None = 1, max_age: int | None = 8, rejected: bool = False
) -> tuple[RefreshReason, ...]:
    return refresh_reasons(spent, max_drift=0.1, min_ess=0.5, age=age, max_age=max_age, rejected=rejected)


def test_refresh_reasons() -> None:
    fine = Budget(0.1, 0.5, 4)  # on the bounds is within them
    assert reasons(fine) == reasons(None) == ()
    assert reasons(fine, age=None) == reasons(None, age=None) == (RefreshReason.start,)
    assert reasons(fine._replace(drift=0.11)) == (RefreshReason.drift,)
    assert reasons(fine._replace(ess=0.49)) == (RefreshReason.ess,)
    assert reasons(fine, age=7) == () and reasons(fine, age=8) == (RefreshReason.max_age,)
    assert reasons(fine, age=10**6, max_age=None) == ()
    assert reasons(None, rejected=True) == (RefreshReason.rejected,)
    everything = reasons(Budget(9.0, 0.01, 4), age=9, rejected=True)
    # in order of urgency
    assert everything == (RefreshReason.rejected, RefreshReason.drift, RefreshReason.ess, RefreshReason.max_age)


def test_what_is_no_number_is_not_within_the_budget() -> None:
    broken = budget(budget_sums(torch.tensor([0.0, math.nan]), temper=1.0))
    assert reasons(broken) == (RefreshReason.drift, RefreshReason.ess)
    infinite = budget(budget_sums(torch.tensor([0.0, math.inf]), temper=1.0))
    assert RefreshReason.drift in reasons(infinite) and RefreshReason.ess in reasons(infinite)

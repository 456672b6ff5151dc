"""Drift and tempered effective sample size."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vp2o.core.budget import Budget, RefreshReason, combine, partial_sums, sequence_log_ratios
from megatron_vp2o.core.choices import RatioLength


def budget(values: list[float], temper: float = 1.0, parts: int = 1) -> Budget:
    rows = torch.tensor(values, dtype=torch.float64)
    return combine(
        torch.stack([partial_sums(part, torch.ones(len(part)).bool(), temper) for part in rows.tensor_split(parts)])
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.floats(0.1, 2.0), st.integers(1, 4))
def test_naive_formulas_on_any_number_of_ranks(values: list[float], temper: float, ranks: int) -> None:
    found = budget(values, temper, ranks)
    ratios = [math.exp(temper * value) for value in values]
    assert found.drift == pytest.approx(sum(map(abs, values)) / len(values))
    assert found.ess == pytest.approx(sum(ratios) ** 2 / (len(values) * sum(r * r for r in ratios)))


def test_bounds() -> None:
    assert budget([0.7] * 9).ess == pytest.approx(1.0)
    assert budget([100.0, *[0.0] * 9]).ess == pytest.approx(0.1)
    assert budget([1e4, *[-1e4] * 9]).ess == pytest.approx(0.1)
    assert budget([-1e4] * 3).ess == pytest.approx(1.0) and budget([1e4, -1e4]).drift == 1e4
    assert budget([]) == Budget(0.0, 1.0)


def test_sequence_log_ratios() -> None:
    logprobs = torch.tensor([[0.0, -1.0, -2.0, 9e9], [5.0, 5.0, 5.0, 5.0]])
    behaviour = torch.tensor([[7.0, -1.5, -2.25, float("nan")], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[False, True, True, False], [False] * 4])
    mean, present = sequence_log_ratios(logprobs, behaviour, mask, RatioLength.mean)
    total, _ = sequence_log_ratios(logprobs, behaviour, mask, RatioLength.sum)
    assert mean.tolist() == [0.375, 0.0] and total.tolist() == [0.75, 0.0] and present.tolist() == [True, False]


def test_reasons() -> None:
    limits = {"max_drift": 0.1, "min_ess": 0.5}
    assert Budget(0.1, 0.5).reason(**limits) is None
    assert Budget(0.2, 0.1).reason(**limits) is RefreshReason.drift
    assert Budget(0.0, 0.4).reason(**limits) is RefreshReason.ess
    assert Budget(math.nan, 1.0).reason(**limits) is RefreshReason.drift

"""Truncated and masked importance sampling against formulas by hand, the histogram against exact quantiles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vp2o.core.choices import MismatchCorrection, MismatchLevel
from megatron_vp2o.core.mismatch import LITERATURE, mismatch, mismatch_sums, mismatch_weights
from megatron_vp2o.core.objective import GRPOObjective, PolicyInputs, VP2OObjective

LEVELS = list(MismatchLevel)


def by_hand(
    log_ratios: list[list[float]], correction: MismatchCorrection, level: MismatchLevel, low: float, high: float
):
    """One response after another, one token after another."""
    weights = []
    for row in log_ratios:
        of_row = math.exp(sum(row) / (len(row) if level is MismatchLevel.geometric else 1)) if row else 1.0
        ratios = [math.exp(d) for d in row] if level is MismatchLevel.token else [of_row] * len(row)
        if correction is MismatchCorrection.tis:
            weights.append([min(r, high) for r in ratios])
        elif correction is MismatchCorrection.mis:
            weights.append([0.0 if r > high else r for r in ratios])
        elif correction is MismatchCorrection.icepop:
            weights.append([r if low <= r <= high else 0.0 for r in ratios])
        else:
            weights.append([1.0] * len(row))
    return weights


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("correction", list(MismatchCorrection))
@pytest.mark.parametrize("seed", range(3))
def test_weights_by_hand(correction: MismatchCorrection, level: MismatchLevel, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in rng.integers(0, 9, 60)]
    rows = [[float(d) for d in rng.normal(0, 1.5, n)] for n in lengths]
    low, high = LITERATURE.get(correction, (0.0, 1.0))
    if seed:
        low, high = low * float(rng.uniform(0.5, 1)), high * float(rng.uniform(0.6, 2))
    first = 3  # of the response; prompt and padding hold rubbish
    log_ratio_NS = torch.full((60, first + 10), float("nan"))
    mask_NS = torch.zeros(log_ratio_NS.shape, dtype=torch.bool)
    for n, row in enumerate(rows):
        log_ratio_NS[n, first : first + len(row)] = torch.tensor(row)
        mask_NS[n, first : first + len(row)] = True
    found = mismatch_weights(log_ratio_NS, mask_NS, correction=correction, level=level, low=low, high=high)
    expected = by_hand(rows, correction, level, low, high)
    for n, row in enumerate(expected):
        assert found.weight_NS[n, first : first + len(row)].tolist() == pytest.approx(row, rel=1e-5)
    assert bool((found.weight_NS[~mask_NS] == 0).all()) and not bool(found.cut_NS[~mask_NS].any())
    ratios = by_hand(rows, MismatchCorrection.tis, level, 0.0, math.inf)
    if correction is not MismatchCorrection.none:
        cut = sum(r > high or r < low for row in ratios for r in row)
        assert int(found.cut_NS.sum()) == cut > 0, "the draw reaches the bounds"


def test_the_literatures_bounds() -> None:
    """TIS and MIS: C = 2; IcePop: alpha = 0.5, beta = 5."""
    ratio = torch.tensor([[0.3, 0.49, 0.51, 1.0, 1.9, 2.1, 4.9, 5.1, 1e9]])
    mask = torch.ones_like(ratio, dtype=torch.bool)
    expected = {
        MismatchCorrection.tis: [0.3, 0.49, 0.51, 1.0, 1.9, 2, 2, 2, 2],
        MismatchCorrection.mis: [0.3, 0.49, 0.51, 1.0, 1.9, 0, 0, 0, 0],
        MismatchCorrection.icepop: [0, 0, 0.51, 1.0, 1.9, 2.1, 4.9, 0, 0],
    }
    for correction, weights in expected.items():
        low, high = LITERATURE[correction]
        found = mismatch_weights(
            ratio.log(), mask, correction=correction, level=MismatchLevel.token, low=low, high=high
        )
        assert found.weight_NS[0].tolist() == pytest.approx(weights, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_statistics_against_exact_ones(seed: int) -> None:
    """Over two parts, as over two ranks; quantiles within the bins' width."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, 5000) * 10.0 ** rng.uniform(-6, 0, 5000)
    rows = torch.tensor(values, dtype=torch.float64).view(50, 100)
    mask_NS = torch.tensor(rng.uniform(size=(50, 100)) < 0.7)
    found = mismatch(mismatch_sums(rows[:20], mask_NS[:20]) + mismatch_sums(rows[20:], mask_NS[20:]))
    assert found is not None
    kept = rows[mask_NS].numpy()
    assert found.tokens == len(kept)
    assert found.mean == pytest.approx(np.abs(kept).mean())
    assert found.kl == pytest.approx((np.exp(kept) - 1 - kept).mean(), rel=1e-6)
    for quantile, share in ((found.p99, 0.99), (found.p999, 0.999)):
        exact = np.quantile(np.abs(kept), share, method="inverted_cdf")
        assert exact <= quantile <= 1.06 * exact


def test_no_token_and_no_number() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert mismatch(mismatch_sums(torch.ones(2, 3), nothing)) is None
    equal = mismatch(mismatch_sums(torch.zeros(2, 3), ~nothing))
    assert equal is not None and (equal.mean, equal.kl, equal.p999) == (0.0, 0.0, 0.0)
    bad = mismatch(mismatch_sums(torch.tensor([[0.0, float("nan")]]), torch.ones(1, 2, dtype=torch.bool)))
    assert bad is not None and math.isnan(bad.kl)


@pytest.mark.parametrize("objective", ["grpo", "vp2o"])
def test_a_weight_multiplies_a_tokens_gradient_and_nothing_else(objective: str) -> None:
    generator = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"kl_coef": 0.1, "entropy_coef": 0.0}
    loss = (
        GRPOObjective(clip_epsilon_low=0.2, clip_epsilon_high=0.2, **settings)
        if objective == "grpo"
        else VP2OObjective(**settings)
    )
    logprobs_NS = torch.randn(3, 4, generator=generator).requires_grad_()
    weight_NS = torch.rand(3, 4, generator=generator)
    shared = {
        "behaviour_logprobs_NS": logprobs_NS.detach() + 0.05 * torch.randn(3, 4, generator=generator),
        "advantages_N": torch.tensor([1.0, -1.0, 0.5]),
        "mask_NS": torch.ones(3, 4, dtype=torch.bool),
    }

    def gradient(weights: torch.Tensor | None, reference: torch.Tensor) -> torch.Tensor:
        total, _ = loss(
            PolicyInputs(logprobs_NS=logprobs_NS, weight_NS=weights, reference_logprobs_NS=reference, **shared)
        )
        return torch.autograd.grad(total, logprobs_NS)[0]

    at_reference = logprobs_NS.detach().clone()  # the KL has no gradient there
    expected = weight_NS * gradient(None, at_reference)
    torch.testing.assert_close(gradient(weight_NS, at_reference), expected)
    elsewhere = at_reference + 0.3
    of_the_kl = gradient(None, elsewhere) - gradient(None, at_reference)
    torch.testing.assert_close(gradient(weight_NS, elsewhere) - expected, of_the_kl)
    assert of_the_kl.abs().max() > 0.01

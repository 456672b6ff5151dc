"""Objectives against per-token Python arithmetic, and their safety at extreme values.

Shape legend: N sequences, S positions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_vp2o.core.objective import (
    MAX_LOG_RATIO,
    GRPOObjective,
    PolicyInputs,
    VP2OObjective,
    supervised_objective,
)

OBJECTIVE = GRPOObjective(clip_epsilon_low=0.2, clip_epsilon_high=0.3, kl_coef=0.05, entropy_coef=0.01)
UNCLIPPED = VP2OObjective(kl_coef=0.05, entropy_coef=0.01)
BOTH = pytest.mark.parametrize("objective", [OBJECTIVE, UNCLIPPED])


def make_inputs(N: int = 4, S: int = 6, seed: int = 0) -> Any:
    """PolicyInputs with every optional field filled in."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    behaviour_NS = -normal(N, S).abs() - 0.1
    return PolicyInputs(
        logprobs_NS=(behaviour_NS + 0.4 * normal(N, S)).requires_grad_(),
        behaviour_logprobs_NS=behaviour_NS,
        advantages_N=normal(N),
        mask_NS=torch.rand(N, S, generator=generator) < 0.6,
        reference_logprobs_NS=behaviour_NS + 0.2 * normal(N, S),
        entropy_NS=normal(N, S).abs().requires_grad_(),
    )


def reference(objective: GRPOObjective, inputs: Any) -> dict[str, float]:
    """The equations token by token, in Python floats."""
    sums = dict.fromkeys(("loss", "ratio", "clip_fraction", "approx_kl", "kl_reference", "entropy"), 0.0)
    sums["ratio_max"] = 0.0
    for n, s in inputs.mask_NS.nonzero().tolist():
        advantage = inputs.advantages_N[n].item()
        logprob = inputs.logprobs_NS[n, s].item()
        ratio = math.exp(logprob - inputs.behaviour_logprobs_NS[n, s].item())
        clipped = min(max(ratio, 1 - objective.clip_epsilon_low), 1 + objective.clip_epsilon_high)
        to_reference = inputs.reference_logprobs_NS[n, s].item() - logprob
        kl = math.exp(to_reference) - 1 - to_reference
        entropy = inputs.entropy_NS[n, s].item()
        sums["loss"] += -min(ratio * advantage, clipped * advantage)
        sums["loss"] += objective.kl_coef * kl - objective.entropy_coef * entropy
        sums["ratio"] += ratio
        sums["ratio_max"] = max(sums["ratio_max"], ratio)
        too_high = advantage > 0 and ratio > 1 + objective.clip_epsilon_high
        too_low = advantage < 0 and ratio < 1 - objective.clip_epsilon_low
        sums["clip_fraction"] += too_high or too_low
        sums["approx_kl"] += ratio - 1 - math.log(ratio)
        sums["kl_reference"] += kl
        sums["entropy"] += entropy
    return sums


@pytest.mark.parametrize("seed", range(4))
def test_loss_and_metrics_equal_the_equations(seed):
    inputs = make_inputs(N=8, S=16, seed=seed)
    loss, metrics = OBJECTIVE(inputs)
    want = reference(OBJECTIVE, inputs)
    assert 0 < want["clip_fraction"] < inputs.mask_NS.sum()
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(want, rel=2e-4, abs=2e-5)
    assert loss.item() == pytest.approx(want["loss"], rel=1e-5)
    assert all(value.dtype is torch.float32 and not value.requires_grad for value in metrics.values())


def test_gradient_is_the_policy_gradient_on_policy_and_zero_where_clipped():
    inputs = make_inputs()
    inputs = replace(inputs, logprobs_NS=inputs.behaviour_logprobs_NS.clone().requires_grad_())
    plain = replace(OBJECTIVE, kl_coef=0.0, entropy_coef=0.0)
    (grad_NS,) = torch.autograd.grad(plain(inputs)[0], inputs.logprobs_NS)
    torch.testing.assert_close(grad_NS, -inputs.advantages_N[:, None] * inputs.mask_NS)

    far_NS = (inputs.behaviour_logprobs_NS + 0.5 * inputs.advantages_N.sign()[:, None]).requires_grad_()
    loss, metrics = plain(replace(inputs, logprobs_NS=far_NS))
    (grad_NS,) = torch.autograd.grad(loss, far_NS)
    assert grad_NS.abs().max() == 0
    assert metrics["clip_fraction"] == inputs.mask_NS.sum()


def test_gradients_in_float64_arithmetic():
    inputs = make_inputs(N=3, S=5)
    loss, _ = OBJECTIVE(inputs)
    grad_NS, grad_entropy_NS = torch.autograd.grad(loss, (inputs.logprobs_NS, inputs.entropy_NS))
    torch.testing.assert_close(grad_entropy_NS, -OBJECTIVE.entropy_coef * inputs.mask_NS)
    step = 1e-4
    for n, s in inputs.mask_NS.nonzero().tolist():
        values = []
        for sign in (1, -1):
            moved_NS = inputs.logprobs_NS.detach().double().clone()
            moved_NS[n, s] += sign * step
            values.append(reference(OBJECTIVE, replace(inputs, logprobs_NS=moved_NS))["loss"])
        assert grad_NS[n, s].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3, abs=1e-4)


@BOTH
@pytest.mark.parametrize("extreme", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_extreme_log_ratios_stay_finite(objective, extreme, advantage):
    inputs = make_inputs()
    inputs = replace(
        inputs,
        logprobs_NS=(inputs.behaviour_logprobs_NS + extreme).requires_grad_(),
        advantages_N=torch.full_like(inputs.advantages_N, advantage),
    )
    loss, metrics = objective(inputs)
    grads = torch.autograd.grad(loss, (inputs.logprobs_NS, inputs.entropy_NS))
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    assert all(value.isfinite() for value in metrics.values()), metrics
    assert metrics["ratio_max"] <= math.exp(MAX_LOG_RATIO) * 1.001


@BOTH
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf"), 1e4, -1e4])
def test_tokens_that_do_not_count_change_nothing(objective, garbage):
    inputs = make_inputs()
    clean = objective(inputs)
    dirty_inputs = replace(
        inputs,
        **{
            name: torch.where(inputs.mask_NS, getattr(inputs, name).detach(), garbage)
            for name in ("logprobs_NS", "behaviour_logprobs_NS", "reference_logprobs_NS", "entropy_NS")
        },
    )
    dirty_inputs.logprobs_NS.requires_grad_()
    dirty_inputs.entropy_NS.requires_grad_()
    dirty = objective(dirty_inputs)
    assert dirty[1] == clean[1]
    want = torch.autograd.grad(clean[0], (inputs.logprobs_NS, inputs.entropy_NS))
    got = torch.autograd.grad(dirty[0], (dirty_inputs.logprobs_NS, dirty_inputs.entropy_NS))
    for want_NS, got_NS in zip(want, got, strict=True):
        assert torch.equal(got_NS, want_NS)


@BOTH
def test_sums_over_micro_batches_add_up(objective):
    inputs = make_inputs(N=6)
    whole, whole_metrics = objective(inputs)

    def part(rows: slice) -> PolicyInputs:
        return PolicyInputs(**{name: value[rows] for name, value in vars(inputs).items() if value is not None})

    parts = [objective(part(rows)) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-5)
    for key, value in whole_metrics.items():
        values = [metrics[key].item() for _, metrics in parts]
        assert (max(values) if key.endswith("_max") else sum(values)) == pytest.approx(value.item(), rel=1e-5), key


@BOTH
@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (3, 6)])
def test_nothing_to_count_gives_zero(objective, shape):
    values = torch.randn(shape)
    inputs = PolicyInputs(values, values, torch.ones(shape[0]), torch.zeros(shape, dtype=torch.bool))
    loss, metrics = replace(objective, kl_coef=0.0, entropy_coef=0.0)(inputs)
    assert loss == 0
    assert all(value == 0 for value in metrics.values())
    assert set(metrics) == {"loss", "ratio", "ratio_max", "clip_fraction", "approx_kl"}


def test_small_divergences_are_resolved():
    """The naive exp(x) - 1 - x in float32 is noise for |x| = 1e-4; the truth is x^2 / 2."""
    inputs = make_inputs()
    _, metrics = OBJECTIVE(replace(inputs, logprobs_NS=inputs.behaviour_logprobs_NS * (1 + 1e-4)))
    shift_NS = (inputs.behaviour_logprobs_NS * (1 + 1e-4)) - inputs.behaviour_logprobs_NS
    assert metrics["approx_kl"].item() == pytest.approx(
        (shift_NS[inputs.mask_NS].double() ** 2 / 2).sum().item(), rel=2e-2
    )


@BOTH
def test_a_weight_without_its_input_is_refused(objective):
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"kl_coef is 0.05"):
        objective(replace(inputs, reference_logprobs_NS=None))
    with pytest.raises(ValueError, match=r"entropy_coef is 0.01 but there is no entropy"):
        objective(replace(inputs, entropy_NS=None))
    with pytest.raises(ValueError, match=r"no gradient"):
        objective(replace(inputs, entropy_NS=inputs.entropy_NS.detach()))
    with torch.no_grad():
        objective(replace(inputs, entropy_NS=inputs.entropy_NS.detach()))


# --- without a clip ---------------------------------------------------------------------------------------------------


def unclipped_reference(inputs: Any) -> dict[str, float]:
    """The same equations with a clip that nothing reaches."""
    return reference(replace(OBJECTIVE, clip_epsilon_low=math.inf, clip_epsilon_high=math.inf), inputs)


@pytest.mark.parametrize("seed", range(4))
def test_unclipped_loss_and_metrics_equal_the_equations(seed):
    inputs = make_inputs(N=8, S=16, seed=seed)
    loss, metrics = UNCLIPPED(inputs)
    want = unclipped_reference(inputs)
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(want, rel=2e-4, abs=2e-5)
    assert loss.item() == pytest.approx(want["loss"], rel=1e-5)
    assert metrics["clip_fraction"] == 0


def test_unclipped_gradient_goes_on_where_the_clip_stops():
    inputs = make_inputs()
    plain = replace(UNCLIPPED, kl_coef=0.0, entropy_coef=0.0)
    far_NS = (inputs.behaviour_logprobs_NS + 0.5 * inputs.advantages_N.sign()[:, None]).requires_grad_()
    inputs = replace(inputs, logprobs_NS=far_NS)
    (grad_NS,) = torch.autograd.grad(plain(inputs)[0], far_NS)
    ratio_NS = (far_NS.detach() - inputs.behaviour_logprobs_NS).exp()
    torch.testing.assert_close(grad_NS, -ratio_NS * inputs.advantages_N[:, None] * inputs.mask_NS)


def test_unclipped_equals_clipped_inside_the_clip():
    """On-policy above all: then both are the policy gradient, bit for bit."""
    inputs = make_inputs()
    near_NS = (inputs.behaviour_logprobs_NS + 0.15 * torch.rand(4, 6)).requires_grad_()
    for logprobs_NS in (near_NS, inputs.behaviour_logprobs_NS.clone().requires_grad_()):
        parts = []
        for objective in (OBJECTIVE, UNCLIPPED):
            loss, metrics = objective(replace(inputs, logprobs_NS=logprobs_NS))
            parts.append((loss, *torch.autograd.grad(loss, (logprobs_NS, inputs.entropy_NS)), *metrics.values()))
        assert all(torch.equal(one, other) for one, other in zip(*parts, strict=True))


def test_prior_alone_pulls_towards_the_reference():
    """Without advantage, descending the loss makes log pi the prior's; there the pull is zero."""
    inputs = make_inputs()
    inputs = replace(inputs, advantages_N=torch.zeros(4))
    (grad_NS,) = torch.autograd.grad(replace(UNCLIPPED, entropy_coef=0.0)(inputs)[0], inputs.logprobs_NS)
    above_NS = inputs.logprobs_NS > inputs.reference_logprobs_NS
    assert (grad_NS.sign() == torch.where(above_NS, 1, -1) * inputs.mask_NS).all()
    there_NS = inputs.reference_logprobs_NS.clone().requires_grad_()
    loss, _ = replace(UNCLIPPED, entropy_coef=0.0)(replace(inputs, logprobs_NS=there_NS))
    assert loss == 0 and not torch.autograd.grad(loss, there_NS)[0].any()


def test_supervised_objective_sums_the_negative_log_likelihood():
    logprobs_NS = torch.tensor([[-1.0, -2.0], [float("nan"), -4.0]], requires_grad=True)
    mask_NS = torch.tensor([[True, True], [False, True]])
    loss, metrics = supervised_objective(logprobs_NS, mask_NS)
    assert loss.item() == metrics["loss"].item() == 7.0
    (grad_NS,) = torch.autograd.grad(loss, logprobs_NS)
    assert torch.equal(grad_NS, -mask_NS.float())

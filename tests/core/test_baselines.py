"""Baselines against their papers' formulas, in Python numbers, and their gradients against differentiation by hand.

Shape legend: N sequences, S positions, G rollouts of a group.
"""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import pytest
import torch

from megatron_vp2o.core.advantages import maxrl_advantages, pass_at_k_advantages, w_reinforce_advantages
from megatron_vp2o.core.answers import equality_kernel, quality_diversity, unlikeliness
from megatron_vp2o.core.baseline_objectives import (
    CISPOObjective,
    ClipCovObjective,
    GSPOObjective,
    KLCovObjective,
    covariance,
)
from megatron_vp2o.core.objective import GRPOObjective, PolicyInputs, RatioObjective, VP2OObjective

FREE: dict[str, Any] = {"kl_coef": 0.0, "entropy_coef": 0.0}


def make_inputs(seed: int, N: int = 5, S: int = 7) -> PolicyInputs:
    generator = torch.Generator().manual_seed(seed)
    behaviour_NS = -torch.rand(N, S, generator=generator) - 0.1
    mask_NS = torch.rand(N, S, generator=generator) < 0.7
    return PolicyInputs(
        logprobs_NS=(behaviour_NS + 0.5 * torch.randn(N, S, generator=generator)).requires_grad_(),
        behaviour_logprobs_NS=behaviour_NS,
        advantages_N=torch.randn(N, generator=generator),
        mask_NS=mask_NS,
        selected_NS=mask_NS & (torch.rand(N, S, generator=generator) < 0.4),
    )


def gradient(objective: RatioObjective, inputs: PolicyInputs) -> list[list[float]]:
    loss, _ = objective(inputs)
    (gradient_NS,) = torch.autograd.grad(loss, inputs.logprobs_NS)
    rows: list[list[float]] = gradient_NS.tolist()
    return rows


def numbers(inputs: PolicyInputs):
    """(n, s, log-ratio, ratio, advantage) of every token that counts."""
    for n, s in inputs.mask_NS.nonzero().tolist():
        log_ratio = (inputs.logprobs_NS[n, s] - inputs.behaviour_logprobs_NS[n, s]).item()
        yield n, s, log_ratio, math.exp(log_ratio), inputs.advantages_N[n].item()


@pytest.mark.parametrize("seed", range(3))
def test_gspo(seed):
    inputs = make_inputs(seed)
    objective = GSPOObjective(clip_epsilon_low=0.1, clip_epsilon_high=0.15, **FREE)
    loss, metrics = objective(inputs)
    got = gradient(objective, inputs)
    ratios = {
        n: math.exp(statistics.fmean(log for m, _, log, _, _ in numbers(inputs) if m == n))
        for n in {n for n, *_ in numbers(inputs)}
    }
    want, stopped = 0.0, 0
    for n, s, _, _, advantage in numbers(inputs):
        free, cut = ratios[n] * advantage, min(max(ratios[n], 0.9), 1.15) * advantage
        want -= min(free, cut)
        stopped += cut < free
        assert got[n][s] == pytest.approx(-free if free <= cut else 0.0, abs=1e-5)
    assert loss.item() == pytest.approx(want, abs=1e-4)
    assert metrics["clip_fraction"].item() == stopped


@pytest.mark.parametrize("seed", range(3))
def test_cispo(seed):
    inputs = make_inputs(seed)
    objective = CISPOObjective(clip_epsilon_low=0.5, clip_epsilon_high=0.2, **FREE)
    loss, _ = objective(inputs)
    got, want, cut = gradient(objective, inputs), 0.0, 0
    for n, s, _, ratio, advantage in numbers(inputs):
        weight = min(max(ratio, 0.5), 1.2)
        cut += weight != ratio
        want -= weight * advantage * inputs.logprobs_NS[n, s].item()
        assert got[n][s] == pytest.approx(-weight * advantage, abs=1e-5)
    assert loss.item() == pytest.approx(want, abs=1e-4)
    assert cut > 2, "some weights must have been clipped"


@pytest.mark.parametrize("seed", range(3))
def test_clip_cov_and_kl_cov(seed):
    inputs = make_inputs(seed)
    assert inputs.selected_NS is not None
    plain = GRPOObjective(clip_epsilon_low=0.2, clip_epsilon_high=0.2, **FREE)
    clip_cov = ClipCovObjective(clip_epsilon_low=0.2, clip_epsilon_high=0.2, **FREE)
    kl_cov = KLCovObjective(penalty=0.3, **FREE)
    clip_gradient, grpo_gradient, kl_gradient = (gradient(o, inputs) for o in (clip_cov, plain, kl_cov))
    assert clip_cov(inputs)[0].item() == pytest.approx(plain(inputs)[0].item(), abs=1e-5)
    for n, s, log_ratio, ratio, advantage in numbers(inputs):
        selected = bool(inputs.selected_NS[n, s])
        assert clip_gradient[n][s] == (0.0 if selected else grpo_gradient[n][s])
        want = -ratio * advantage + (0.3 * math.copysign(1, log_ratio) if selected else 0.0)
        assert kl_gradient[n][s] == pytest.approx(want, abs=1e-5)
    unclipped, _ = VP2OObjective(**FREE)(inputs)
    penalty = sum(0.3 * abs(log) for n, s, log, _, _ in numbers(inputs) if inputs.selected_NS[n, s])
    assert kl_cov(inputs)[0].item() == pytest.approx(unclipped.item() + penalty, abs=1e-4)
    with pytest.raises(ValueError, match="need the tokens"):
        clip_cov(PolicyInputs(inputs.logprobs_NS, inputs.behaviour_logprobs_NS, inputs.advantages_N, inputs.mask_NS))


def test_covariance_is_each_tokens_part():
    inputs = make_inputs(0)
    mask_NS, logprobs_NS = inputs.mask_NS, inputs.logprobs_NS.detach()
    advantages_NS = inputs.advantages_N[:, None].expand_as(mask_NS)
    got_NS = covariance(
        logprobs_NS,
        inputs.advantages_N,
        mask_NS,
        logprobs_NS[mask_NS].double().mean().item(),
        advantages_NS[mask_NS].double().mean().item(),
    )
    pairs = torch.stack([logprobs_NS[mask_NS], advantages_NS[mask_NS]]).double()
    assert got_NS[mask_NS].mean().item() == pytest.approx(torch.cov(pairs, correction=0)[0, 1].item())
    assert got_NS[~mask_NS].eq(-torch.inf).all()


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_pass_at_k_advantages_equal_all_subsets(k):
    """Every subset of k rollouts, enumerated: its reward, normalised over subsets, averaged over those that a rollout is in."""
    patterns = [[i < right for i in range(6)] for right in range(7)] + [[True, False, False, True, False, True]]
    got_PG = pass_at_k_advantages(torch.tensor(patterns), k=k)
    for row, pattern in zip(got_PG.tolist(), patterns, strict=True):
        subsets = list(itertools.combinations(range(6), k))
        rewards = [float(any(pattern[i] for i in subset)) for subset in subsets]
        mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
        for g in range(6):
            own = (
                [(r - mean) / deviation for r, s in zip(rewards, subsets, strict=True) if g in s]
                if deviation
                else [0.0]
            )
            assert row[g] == pytest.approx(statistics.fmean(own), abs=1e-6)
    with pytest.raises(ValueError, match="k=7"):
        pass_at_k_advantages(torch.tensor(patterns), k=7)


def test_w_reinforce_and_maxrl_by_hand():
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.5]])
    got = w_reinforce_advantages(rewards_PG, rewards_PG > 0, positive_weight=0.1)
    assert got[0].tolist() == pytest.approx([0.1, -1, -1, -1]) and got[3].tolist() == pytest.approx(
        [0.1, 0.05, -1, 0.05]
    )
    assert got[1].tolist() == pytest.approx([0.1] * 4) and got[2].tolist() == [-1] * 4
    got = maxrl_advantages(rewards_PG, epsilon=1e-9)
    assert got[0].tolist() == pytest.approx([3, -1, -1, -1]) and got[3].tolist() == pytest.approx([1, 0, -1, 0])
    assert not got[1].any() and not got[2].any()


def test_maxrl_is_the_gradient_of_the_log_pass_rate():
    """One binary answer with p = 0.3, all groups of many rollouts weighed by their probability."""
    p, G, expected = 0.3, 40, 0.0
    for right in range(G + 1):
        weight = math.comb(G, right) * p**right * (1 - p) ** (G - right)
        rewards_PG = torch.tensor([[1.0] * right + [0.0] * (G - right)])
        advantages = maxrl_advantages(rewards_PG, epsilon=1e-12)[0]
        score = torch.tensor([1 / p] * right + [-1 / (1 - p)] * (G - right))  # d log probability / dp
        expected += weight * float((advantages * score).mean())
    assert expected == pytest.approx(1 / p, rel=0.03)


def test_unlikeliness_by_hand():
    rewards_PG = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    log_likelihood_PG = torch.tensor([[-1.0, -3.0, -2.0, -3.0]])
    got = unlikeliness(rewards_PG, rewards_PG > 0, log_likelihood_PG, 0.4)
    assert got[0].tolist() == pytest.approx([1 - 0.4 * 3 / 4, 1.0, 0.0, 1.0])


def test_quality_diversity_by_hand():
    kernel_PGG = equality_kernel(torch.tensor([[0, 0, 1, -4]]))
    got = quality_diversity(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), kernel_PGG)
    assert got[0].tolist() == pytest.approx([2 / 3, 2 / 3, 1.0, 0.0])

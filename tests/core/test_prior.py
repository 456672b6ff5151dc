"""The prior term against exact enumeration: its expected gradient, and where training with it comes to rest.

A policy of two tokens over a vocabulary of three has nine responses; every group of two rollouts is enumerated with its
probability, so that expectations have no sampling error.

Shape legend: Y responses, V vocabulary, K responses of one token, G rollouts of a group, N sequences, S positions.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_vp2o.core.advantages import group_relative_advantages
from megatron_vp2o.core.choices import KLEstimator
from megatron_vp2o.core.objective import PolicyInputs, VP2OObjective
from megatron_vp2o.core.prior import sequence_log_ratio, token_kl_loss

V, BETA = 3, 0.3
RESPONSES = torch.tensor(list(itertools.product(range(V), range(V))))  # [Y, 2]


def token_log_probs(parameters: tuple[Tensor, Tensor]) -> Tensor:
    """Log-probability of each token of each response, [Y, 2]: the second token's distribution depends on the first."""
    first, second = parameters[0].log_softmax(-1), parameters[1].log_softmax(-1)
    return torch.stack([first[RESPONSES[:, 0]], second[RESPONSES[:, 0], RESPONSES[:, 1]]], dim=1)


def random_policy(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return draw(V), draw(V, V)


@pytest.mark.parametrize("seed", range(5))
def test_the_expected_gradient_is_that_of_the_kl_to_the_target(seed):
    generator = torch.Generator().manual_seed(seed)
    parameters, prior = random_policy(generator), random_policy(generator)
    rewards_Y = (torch.rand(len(RESPONSES), generator=generator) < 0.4).double()
    reference_YS = token_log_probs(prior).detach()

    logprobs_YS = token_log_probs(parameters)
    probability_Y = logprobs_YS.sum(1).exp().detach()
    mask_YS = torch.ones_like(logprobs_YS, dtype=torch.bool)
    shaped_Y = rewards_Y - BETA * sequence_log_ratio(logprobs_YS.detach(), reference_YS, mask_YS)
    objective = VP2OObjective(kl_coef=0.0, entropy_coef=0.0)
    expected = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(range(len(RESPONSES)), repeat=2):
        group_N = torch.tensor(pair)
        advantages_PG = group_relative_advantages(shaped_Y[group_N][None], normalise_by_std=False, epsilon=1e-6)
        loss, _ = objective(
            PolicyInputs(logprobs_YS[group_N], logprobs_YS[group_N].detach(), advantages_PG[0], mask_YS[group_N])
        )
        expected = expected + probability_Y[group_N].prod() * loss
    got = torch.autograd.grad(expected, parameters)

    log_Y = token_log_probs(parameters).sum(1)
    log_target_Y = (reference_YS.sum(1) + rewards_Y / BETA).log_softmax(0)
    kl = (log_Y.exp() * (log_Y - log_target_Y)).sum()
    # each of the two rollouts contributes, and its own reward is half of the mean that it is compared with
    want = torch.autograd.grad(2 * 0.5 * BETA * kl, parameters)
    assert max(w.abs().max() for w in want) > 0.02
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=2e-6)


REFERENCE_K = torch.tensor([0.3, 0.1, 0.05, 0.2, 0.25, 0.1], dtype=torch.float64)
REWARD_K = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)


def resting_point(estimator: KLEstimator) -> Tensor:
    """Where gradient descent on the expected loss ends, for one token of six."""
    logits_K = REFERENCE_K.log().clone().requires_grad_()
    for _ in range(4000):
        log_K = logits_K.log_softmax(0)
        p_K = log_K.detach().exp()
        if estimator is KLEstimator.reward:
            log_ratio_K = sequence_log_ratio(
                log_K.detach()[:, None], REFERENCE_K.log()[:, None], torch.ones(6, 1).bool()
            )
            loss = -(p_K * (REWARD_K - BETA * log_ratio_K) * log_K).sum()
        else:
            kl_K = token_kl_loss(REFERENCE_K.log() - log_K, estimator)
            loss = -(p_K * REWARD_K * log_K).sum() + BETA * (p_K * kl_K).sum()
        (gradient,) = torch.autograd.grad(loss, logits_K)
        with torch.no_grad():
            logits_K -= 2.0 * gradient
    return logits_K.detach().softmax(0)


@pytest.mark.parametrize("name", ["reward", "k2", "k3+"])
def test_it_comes_to_rest_at_the_papers_target(name):
    target_K = (REFERENCE_K.log() + REWARD_K / BETA).softmax(0)
    torch.testing.assert_close(resting_point(KLEstimator[name]), target_K, rtol=1e-5, atol=1e-7)


def test_k3_as_a_loss_comes_to_rest_elsewhere():
    """At `beta pi_ref / (Lambda - R)`, with Lambda such that it adds up to 1: more than the target leaves for wrong answers."""
    low, high = 1.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (BETA * REFERENCE_K / (middle - REWARD_K)).sum() > 1 else (low, middle)
    got_K = resting_point(KLEstimator.k3)
    torch.testing.assert_close(got_K, BETA * REFERENCE_K / (low - REWARD_K), rtol=1e-5, atol=1e-7)
    target_K = (REFERENCE_K.log() + REWARD_K / BETA).softmax(0)
    assert got_K[REWARD_K == 0].sum() > 3 * target_K[REWARD_K == 0].sum()


def test_k3_plus_has_the_value_of_k3_and_the_gradient_of_k2():
    ratio_NS = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = {name: token_kl_loss(ratio_NS, KLEstimator[name]) for name in ("k2", "k3", "k3+")}
    torch.testing.assert_close(values["k3+"], values["k3"])
    gradients = {name: torch.autograd.grad(value.sum(), ratio_NS)[0] for name, value in values.items()}
    torch.testing.assert_close(gradients["k3+"], gradients["k2"])
    torch.testing.assert_close(gradients["k2"], ratio_NS.detach())


def test_what_is_outside_the_mask_is_ignored():
    mask_NS = torch.tensor([[False, True, True], [False, False, False]])
    logprobs_NS = torch.tensor([[float("nan"), -1.0, -2.0], [float("nan")] * 3])
    got_N = sequence_log_ratio(logprobs_NS, torch.full((2, 3), -0.5), mask_NS)
    assert got_N.tolist() == [-2.0, 0.0]


def test_the_kl_of_the_reward_is_no_loss():
    with pytest.raises(ValueError, match="kl_estimator=reward"):
        token_kl_loss(torch.zeros(1, 1), KLEstimator.reward)

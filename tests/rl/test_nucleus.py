"""Under a nucleus and a temperature, ratios, drift and mismatch compare like with like, and the gradient is the right one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vp2o.core.budget import budget, budget_sums, sequence_log_ratios
from megatron_vp2o.core.objective import GRPOObjective, PolicyInputs
from megatron_vp2o.core.sampling import sample
from tests.distributed import run_distributed


@pytest.mark.distributed
@pytest.mark.parametrize("ranks,layout", [(1, {}), (2, {"tensor_parallel": 2})])
def test_unmoved_weights_have_ratio_one_and_no_drift(ranks: int, layout: dict[str, Any]) -> None:
    for results in run_distributed("tests.rl.nucleus_job:run", ranks, layout):
        for found in results:
            assert (found["cut"] > 0.05) == (found["top_p"] < 1), found  # the nucleus really was one
            assert found["drift"] <= 1e-5 and found["mismatch"] <= 1e-5, found
            assert found["ratio"] == pytest.approx(1.0, abs=1e-5), found
            assert found["ratio_max"] == pytest.approx(1.0, abs=1e-5), found
            assert found["clip_fraction"] == 0, found


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_the_distribution_sampled_from(seed: int, top_p: float, temperature: float) -> None:
    """Over a vocabulary that can be enumerated: d/dlogits of E_nucleus[A], for advantages of mean zero, by autograd."""
    generator = torch.Generator().manual_seed(seed)
    theta_V = (torch.randn(7, generator=generator)).requires_grad_()
    u_N = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    with torch.no_grad():
        token_N, logprob_N = sample(theta_V.expand(len(u_N), -1), u_N, temperature=temperature, top_p=top_p)
    kept, first = zip(*{int(t): float(p) for t, p in zip(token_N, logprob_N, strict=True)}.items(), strict=True)
    kept_K, weight_K = torch.tensor(kept), torch.tensor(first).exp()
    assert weight_K.sum() == pytest.approx(1.0, abs=1e-4)
    assert top_p > 0.5 or len(kept_K) < 7
    advantage_K = torch.randn(len(kept_K), generator=generator)
    advantage_K = advantage_K - (weight_K * advantage_K).sum() / weight_K.sum()

    logprob_K = (theta_V / temperature).log_softmax(-1)[kept_K]
    inputs = PolicyInputs(
        logprobs_NS=logprob_K[:, None],
        behaviour_logprobs_NS=logprob_K.detach()[:, None],
        advantages_N=weight_K * advantage_K,  # each token as often as it is drawn
        mask_NS=torch.ones(len(kept_K), 1, dtype=torch.bool),
    )
    objective = GRPOObjective(kl_coef=0.0, entropy_coef=0.0, clip_epsilon_low=0.2, clip_epsilon_high=0.2)
    loss, metrics = objective(inputs)
    (ours_V,) = torch.autograd.grad(loss, theta_V)

    truncated_K = (theta_V / temperature)[kept_K].softmax(-1)  # renormalised over the nucleus
    assert torch.allclose(truncated_K.detach(), weight_K, atol=1e-5)
    (expected_V,) = torch.autograd.grad(-(truncated_K * advantage_K).sum(), theta_V)
    torch.testing.assert_close(ours_V, expected_V, atol=2e-6, rtol=1e-4)
    assert metrics["clip_fraction"] == 0 and metrics["ratio"] == len(kept_K)
    ratios_N, valid_N = sequence_log_ratios(
        logprob_K[:, None], inputs.behaviour_logprobs_NS, inputs.mask_NS, normalise_by_length=True
    )
    spent = budget(budget_sums(ratios_N, temper=1.0, valid_N=valid_N))
    assert spent.drift == 0 and spent.ess == pytest.approx(1.0, abs=1e-12)

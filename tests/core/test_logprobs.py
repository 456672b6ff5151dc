"""Log-probabilities and entropies against float64 loops."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vp2o.core.logprobs import token_log_probs_and_entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("valid_vocab", [None, 5])
def test_against_a_loop(temperature, valid_vocab):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, generator=generator) * 4
    targets = torch.randint(0, 5, (2, 3), generator=generator)
    logprobs, entropy = token_log_probs_and_entropy(logits, targets, temperature=temperature, valid_vocab=valid_vocab)
    for n in range(2):
        for s in range(3):
            weights = [math.exp(z / temperature) for z in logits[n, s].tolist()[:valid_vocab]]
            p = [weight / sum(weights) for weight in weights]
            assert logprobs[n, s].item() == pytest.approx(math.log(p[targets[n, s]]), abs=2e-6)
            assert entropy[n, s].item() == pytest.approx(-sum(q * math.log(q) for q in p), abs=2e-6)


def test_half_precision_is_computed_in_float32_and_both_results_have_gradients():
    logits = (torch.randn(4, 6) * 3).bfloat16().requires_grad_()
    targets = torch.arange(4)
    logprobs, entropy = token_log_probs_and_entropy(logits, targets, temperature=1.0)
    assert logprobs.dtype is entropy.dtype is torch.float32
    want = logits.detach().float().log_softmax(-1)[torch.arange(4), targets]
    torch.testing.assert_close(logprobs.detach(), want)
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    assert grad.abs().max() > 0


def test_gradients():
    logits = torch.randn(3, 5, dtype=torch.float64)

    def function(values):
        # the function works in float32; gradcheck's tolerances allow for that with a wide step
        return token_log_probs_and_entropy(values, torch.tensor([0, 4, 2]), temperature=0.8)

    assert torch.autograd.gradcheck(function, logits.requires_grad_(), eps=1e-2, atol=2e-3, rtol=1e-2)


def test_greedy_has_no_density():
    with pytest.raises(ValueError, match="temperature is 0"):
        token_log_probs_and_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), temperature=0.0)

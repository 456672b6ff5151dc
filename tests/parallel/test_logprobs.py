"""The vocabulary-parallel softmax against autograd through a plain one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_vp2o.core.logprobs import token_log_probs_and_entropy
from megatron_vp2o.parallel.logprobs import log_probs_and_entropy


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("valid", [11, 7])
def test_equals_the_plain_softmax_with_gradients(group, temperature, valid):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 5, 11, generator=generator)).requires_grad_()
    targets = torch.randint(valid, (2, 5), generator=generator)
    weight_p, weight_h = torch.randn(2, 2, 5, generator=generator)
    results = []
    for function, extra in ((log_probs_and_entropy, {"group": group}), (token_log_probs_and_entropy, {})):
        logprob, entropy = function(logits, targets, temperature=temperature, valid_vocab=valid, **extra)
        (gradient,) = torch.autograd.grad((logprob * weight_p + entropy * weight_h).sum(), logits)
        results.append((logprob, entropy, gradient))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_gradient_of_either_output_alone(group):
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.arange(4)
    for pick in (0, 1):
        ours = log_probs_and_entropy(logits, targets, temperature=1.0, valid_vocab=9, group=group)[pick]
        plain = token_log_probs_and_entropy(logits, targets, temperature=1.0, valid_vocab=9)[pick]
        (g_ours,), (g_plain,) = (torch.autograd.grad(value.sum(), logits) for value in (ours, plain))
        torch.testing.assert_close(g_ours, g_plain, rtol=1e-5, atol=1e-6)


def test_leaves_its_input_alone_and_stays_finite(group):
    logits = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 2.0, 2.0]])
    before = logits.clone()
    logprob, entropy = log_probs_and_entropy(logits, torch.tensor([0, 1]), temperature=1.0, valid_vocab=3, group=group)
    assert torch.equal(logits, before)
    torch.testing.assert_close(logprob, torch.tensor([0.0, -0.6931472]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, 0.6931472]))

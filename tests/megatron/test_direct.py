"""Decoding straight from the weights against decoding through Megatron's modules: models, prompts and ends drawn at random.

VP2O_DIRECT_DRAWS is the number of draws, VP2O_DIRECT_SEED their seed.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.config.model import PositionEmbedding, RouterScore, SoftmaxType  # noqa: E402
from megatron_vp2o.megatron.actor.generation import MegatronEngine  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.rl.types import Rollouts, SamplingParams  # noqa: E402
from tests.megatron.policy_job import VOCAB, small_config  # noqa: E402

DRAWS = int(os.environ.get("VP2O_DIRECT_DRAWS", "5"))
SEED = int(os.environ.get("VP2O_DIRECT_SEED", "0"))


def drawn(draw: random.Random) -> dict[str, Any]:
    """Settings of a model that can be decoded straight from its weights."""
    score = draw.choice(list(RouterScore))
    settings: dict[str, Any] = {
        "num_query_groups": draw.choice([1, 2, 4]),
        "kv_channels": draw.choice([4, 8, 16]),
        "qk_layernorm": draw.random() < 0.6,
        "moe_router_score_function": score,
        "moe_router_pre_softmax": score is RouterScore.softmax and draw.random() < 0.5,
        "moe_router_enable_expert_bias": score is RouterScore.sigmoid and draw.random() < 0.7,
        "moe_router_topk": draw.choice([1, 2, 3]),
        "share_embeddings_and_output_weights": draw.random() < 0.5,
        "rotary_base": draw.choice([100.0, 10_000.0]),
    }
    if settings["moe_router_topk"] == 1:  # Megatron refuses a softmax of one score
        settings["moe_router_pre_softmax"] = score is RouterScore.softmax
    if draw.random() < 0.5:
        settings |= {
            "position_embedding_type": PositionEmbedding.yarn,
            "yarn_rotary_scaling_factor": draw.choice([2.0, 8.0]),
            "yarn_original_max_position_embeddings": 16,
        }
    return settings


def vary(policy: MegatronPolicy, seed: int) -> None:
    """Norms and biases begin as ones and zeros, which would hide one that is left out or taken twice."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in policy.model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))


def generated(engine: MegatronEngine, direct: bool, *arguments: Any) -> Rollouts:
    engine.direct = direct
    return engine.generate(*arguments)


@pytest.mark.parametrize("seed", range(DRAWS))
def test_both_ways_generate_the_same(seed: int) -> None:
    draw = random.Random(1000 * SEED + seed)
    config = small_config()
    for name, value in drawn(draw).items():
        assert hasattr(config.model, name)
        setattr(config.model, name, value)
    prompts = [[draw.randrange(2, VOCAB) for _ in range(draw.choice([1, 2, 5, 9]))] for _ in range(draw.randint(1, 7))]
    if seed % 3 == 2:
        prompts = [prompt[:1] for prompt in prompts]  # nothing to prefill
    sampling = SamplingParams(1.0, draw.choice([1.0, 0.8]), draw.choice([1, 9, 21]), seed)
    with world.joined(config.parallel, config.seed) as groups:
        policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=3)
        vary(policy, seed)
        engine = MegatronEngine(config, policy, eos_ids=(1, 2), pad_id=0)
        assert engine.direct
        engine.max_batch_size = draw.choice([5, 1024])
        engine.refresh(0)
        if draw.random() < 0.7:
            engine.log_gates(40)
        if draw.random() < 0.7:
            engine.record_routes()
        arguments = prompts, list(range(len(prompts))), sampling, 3
        ours, theirs = generated(engine, True, *arguments), generated(engine, False, *arguments)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.05)
        with engine.at_learner_weights():
            borrowed = [generated(engine, direct, *arguments) for direct in (True, False)]
    assert torch.equal(ours.tokens_NS, theirs.tokens_NS) and torch.equal(ours.total_len_N, theirs.total_len_N)
    for one, other in ((ours, theirs), borrowed):
        torch.testing.assert_close(one.logprobs_NS, other.logprobs_NS, atol=2e-5, rtol=0)
        torch.testing.assert_close(one.model_logprobs_NS, other.model_logprobs_NS, atol=2e-5, rtol=0)
    assert not torch.equal(borrowed[0].logprobs_NS, ours.logprobs_NS)  # the weights are those of the time of the call
    if ours.gates is not None:
        assert theirs.gates is not None
        torch.testing.assert_close(ours.gates.gates_LMJE, theirs.gates.gates_LMJE, atol=2e-5, rtol=0)
    if ours.routes_NSLK is not None:
        assert theirs.routes_NSLK is not None
        assert torch.equal(ours.routes_NSLK.sort(-1)[0], theirs.routes_NSLK.sort(-1)[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("add_bias_linear", True),
        ("softmax_type", SoftmaxType.learnable),
        ("window_size", 4),
        ("moe_shared_expert_intermediate_size", 16),
    ],
)
def test_what_it_does_not_know_goes_through_the_modules(name: str, value: Any) -> None:
    config = small_config()
    setattr(config.model, name, value)
    with world.joined(config.parallel, config.seed) as groups:
        policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=3)
        assert not MegatronEngine(config, policy, eos_ids=(1,), pad_id=0).direct

"""Decoding from the cache computes what the training pass computes, whatever the model: settings drawn at random.

Rotary kinds, windows, sinks, biases, norms and activations each have a path of their own in one of the two; a factor that only
one of them applies shows here as another log-probability. VP2O_DECODE_DRAWS is the number of draws, VP2O_DECODE_SEED their seed.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.config.model import (  # noqa: E402
    Activation,
    PositionEmbedding,
    RouterScore,
    SoftmaxType,
)
from megatron_vp2o.megatron.actor.generation import MegatronEngine  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.rl.types import SamplingParams, TrainBatch  # noqa: E402
from tests.megatron.policy_job import PROMPTS, VOCAB, small_config  # noqa: E402

DRAWS = int(os.environ.get("VP2O_DECODE_DRAWS", "10"))
SEED = int(os.environ.get("VP2O_DECODE_SEED", "0"))


def drawn(seed: int) -> dict[str, Any]:
    """Settings of a model that differ from `small_config`'s; every third draw has YaRN without sinks and windows."""
    draw = random.Random(1000 * SEED + seed)
    settings: dict[str, Any] = {
        "num_query_groups": draw.choice([1, 2, 4]),
        "kv_channels": draw.choice([4, 8, 16]),
        "qk_layernorm": draw.random() < 0.5,
        "add_bias_linear": draw.random() < 0.3,
        "activation_func": draw.choice(list(Activation)),
        "moe_router_score_function": draw.choice(list(RouterScore)),
        "share_embeddings_and_output_weights": draw.random() < 0.5,
        "rotary_base": draw.choice([100.0, 10_000.0]),
    }
    if seed % 3 == 0 or draw.random() < 0.3:
        settings |= {
            "position_embedding_type": PositionEmbedding.yarn,
            "yarn_rotary_scaling_factor": draw.choice([2.0, 8.0, 32.0]),
            "yarn_original_max_position_embeddings": draw.choice([16, 32]),
        }
    if seed % 3 and draw.random() < 0.5:
        settings["softmax_type"] = SoftmaxType.learnable
    if seed % 3 and draw.random() < 0.5:
        settings |= {"window_size": draw.choice([3, 6]), "window_attn_skip_freq": draw.choice([None, 2])}
    return settings


@pytest.mark.parametrize("seed", range(DRAWS))
def test_decoding_is_the_training_pass(seed: int) -> None:
    settings = drawn(seed)
    config = small_config()
    for name, value in settings.items():
        assert hasattr(config.model, name)
        setattr(config.model, name, value)
    with world.joined(config.parallel, config.seed) as groups:
        policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=3)
        engine = MegatronEngine(config, policy, eos_ids=(1,), pad_id=0)
        engine.refresh(0)
        rollouts = engine.generate(PROMPTS, list(range(len(PROMPTS))), SamplingParams(1.0, 1.0, 12, seed), 2)
        mask_NS = rollouts.response_mask_NS()
        found_NS = engine.log_probs(rollouts, 1.0)
        batch = TrainBatch(rollouts.tokens_NS, rollouts.total_len_N, mask_NS)
        learner_NS = policy.log_probs(batch, 3)
    assert mask_NS.sum() > 100 and rollouts.model_logprobs_NS[mask_NS].std() > 0.1
    torch.testing.assert_close(found_NS[mask_NS], rollouts.model_logprobs_NS[mask_NS], atol=2e-5, rtol=0.0)
    torch.testing.assert_close(learner_NS[mask_NS], found_NS[mask_NS], atol=2e-5, rtol=0.0)

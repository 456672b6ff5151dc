"""A run's model of the GPT-OSS shape: sinks, sliding windows, biases, YaRN, clamped gates. One process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.parameters import padded_vocab
from megatron_vp2o.config.schema import ParallelConfig, TrainConfig
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.settings import run_settings
from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.megatron.actor.generation import MegatronEngine  # noqa: E402
from megatron_vp2o.megatron.hf import model as hf_model  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.parallel.groups import Groups  # noqa: E402
from megatron_vp2o.rl.objectives import next_token  # noqa: E402
from megatron_vp2o.rl.types import SamplingParams, TrainBatch  # noqa: E402

HF_CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "hidden_act": "silu",
    "hidden_size": 32,
    "head_dim": 16,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "sliding_window": 5,
    "swiglu_limit": 7.0,
    "vocab_size": 64,
}


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    bundle = world.start(ParallelConfig(), 0)
    try:
        yield bundle
    finally:
        world.stop()


def config() -> TrainConfig:
    settings = run_settings(architecture(HF_CONFIG)) | {"init_method_std": 0.3}
    return compose("train", [f"model.{name}={'null' if value is None else value}" for name, value in settings.items()])


@pytest.fixture
def policy(groups: Groups) -> MegatronPolicy:
    made = MegatronPolicy(config(), groups, vocab_size=50, optimizer_steps=10)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # biases and sinks start at zero, which would hide them
        for name, parameter in made.model.named_parameters():
            if name.endswith(("bias", "softmax_offset")):
                parameter.normal_(0.0, 0.5, generator=generator)
    return made


def tokens() -> torch.Tensor:
    return torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_it_is_the_converted_model(policy: MegatronPolicy, groups: Groups) -> None:
    other = hf_model.build(architecture(HF_CONFIG), ParallelConfig(), groups, vocab_rows=64, dtype=torch.float32)
    other.load_state_dict(policy.model.state_dict())
    expected = hf_model.logits(other, tokens(), groups, 64)
    policy.model.eval()
    found = hf_model.logits(policy.model, tokens(), groups, 64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_learns(policy: MegatronPolicy) -> None:
    mask = torch.ones(3, 24, dtype=torch.bool)
    batch = TrainBatch(tokens(), torch.full((3,), 24), mask, temperature=1.0)
    policy.forward_backward(batch, next_token, 3)
    still = [name for name, p in policy.model.named_parameters() if not p.main_grad.any()]  # type: ignore[attr-defined]
    assert still == []
    assert not policy.optimizer_step(1).skipped


def test_decoding_agrees_with_scoring(policy: MegatronPolicy) -> None:
    """Prompts of two lengths; responses much longer than the window."""
    engine = MegatronEngine(config(), policy, eos_ids=[1], pad_id=0)
    engine.refresh(0)
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=20, seed=3)
    rollouts = engine.generate([[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]], [0, 1], sampling, group_size=2)
    assert int(rollouts.tokens_NS.max()) < 50
    scored = engine.log_probs(rollouts, 1.0)
    mask = rollouts.response_mask_NS()
    torch.testing.assert_close(rollouts.logprobs_NS[mask], scored[mask], rtol=1e-4, atol=1e-4)


def test_layers_alternate_between_window_and_all(policy: MegatronPolicy) -> None:
    layers = [layer.self_attention.core_attention.scale_mask_softmax for layer in policy.model.decoder.layers]
    assert [softmax.window_size for softmax in layers] == [(4, 0), None, (4, 0), None]
    assert padded_vocab(64, 1) == policy.padded_vocab == 64
    assert policy.model_vocab == 64 and policy.valid_vocab == 50

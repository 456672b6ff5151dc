"""Shipped model groups against the config.json of the models that they are named for: the same settings, the same
TransformerConfig as a converted checkpoint's."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

import pytest
import torch

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.schema import Implementation, ParallelConfig
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.settings import run_settings
from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron.core.transformer.utils import is_layer_window_attention  # noqa: E402

from megatron_vp2o.megatron.hf import model as hf_model  # noqa: E402
from megatron_vp2o.megatron.model import build as model  # noqa: E402

PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "vocab_size": 151936,
    },
    "mixtral_8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "gpt_oss_20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "vocab_size": 201088,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shipped_shape_is_the_published_one(name: str) -> None:
    shape, published = compose("train", [f"model={name}"]).model, architecture(PUBLISHED[name])
    for setting, value in run_settings(published).items():
        own = getattr(shape, setting)
        assert (own.value if isinstance(own, Enum) else own) == value, setting


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_run_builds_the_converted_model(name: str) -> None:
    shape, published = compose("train", [f"model={name}"]).model, architecture(PUBLISHED[name])
    shape = dataclasses.replace(shape, implementation=Implementation.local)
    ours = model.transformer_config(shape, ParallelConfig(), inference=True)
    theirs = hf_model.transformer_config(published, ParallelConfig(), torch.bfloat16)
    fields = set(published.settings) | {field for field in published.embedding if field.startswith("yarn_")}
    for field in sorted(fields - {"window_attn_skip_freq", "moe_aux_loss_coeff"}):
        assert getattr(ours, field) == getattr(theirs, field), field
    for layer in range(1, shape.num_layers + 1):
        windowed = [
            is_layer_window_attention(found.window_size, found.window_attn_skip_freq, layer) for found in (ours, theirs)
        ]
        assert windowed[0] == windowed[1]

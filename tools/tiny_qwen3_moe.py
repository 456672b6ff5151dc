"""The small Qwen3-MoE, in transformers' terms, of what needs any real model: documentation, benchmarks, tests of other hosts."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3MoeConfig


def tiny_config(vocab_size: int, **changes: Any) -> Qwen3MoeConfig:
    """Two layers of eight experts, of which a token takes two; 64 wide. `changes` are further or other settings."""
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return Qwen3MoeConfig(vocab_size=vocab_size, **{**settings, **changes})

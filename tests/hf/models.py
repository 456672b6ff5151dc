"""Tiny random models of every family, made and saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB, LAYERS = 104, 4
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def configs() -> dict[str, Any]:
    """A configuration of each family, with the features that set it apart switched on; and variants."""
    t = transformers
    latent = {
        **_SHAPE,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
    }
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    }
    qwen3 = {**_SHAPE, **_MOE, "head_dim": 16, "moe_intermediate_size": 16, "intermediate_size": 48}
    return {
        "qwen3_moe": t.Qwen3MoeConfig(**qwen3, norm_topk_prob=True),
        "qwen3_moe_tied_dense": t.Qwen3MoeConfig(
            **qwen3, norm_topk_prob=False, tie_word_embeddings=True, mlp_only_layers=[1, 2]
        ),
        "mixtral": t.MixtralConfig(**_SHAPE, **_MOE, intermediate_size=48),
        "olmoe": t.OlmoeConfig(**_SHAPE, **_MOE, intermediate_size=48),
        "deepseek_v3": t.DeepseekV3Config(**latent, q_lora_rank=24),
        "deepseek_v3_yarn": t.DeepseekV3Config(
            **{**latent, "first_k_dense_replace": 0}, q_lora_rank=24, rope_parameters=yarn
        ),
        "deepseek_v3_full_query": t.DeepseekV3Config(**{**latent, "n_group": 1}, q_lora_rank=None),
        "gpt_oss": t.GptOssConfig(**_SHAPE, **_MOE, head_dim=16, intermediate_size=16, sliding_window=8),
    }


FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss")
VARIANTS = ("qwen3_moe_tied_dense", "deepseek_v3_yarn", "deepseek_v3_full_query")


def make(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model whose weights are wide enough that every part of it shows in the logits."""
    model = transformers.AutoModelForCausalLM.from_config(
        configs()[name], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "correction_bias" in n)]
        for parameter_name, parameter in named:
            noise = torch.empty(parameter.shape).normal_(0.0, 0.15, generator=generator)
            norm = parameter.dim() == 1 and "norm" in parameter_name
            parameter.copy_(1.0 + noise if norm else noise)
    return model.to(dtype)


def save(name: str, folder: Path, **kwargs: Any) -> Any:
    """Make a model and save it, in several files; returns it."""
    model = make(name, **kwargs)
    model.save_pretrained(folder, max_shard_size="200KB")
    return model


def tokens(rows: int = 2, length: int = 24) -> Tensor:
    """[rows, length]."""
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, tokens_bs: Tensor) -> Tensor:
    """[b, s, V]."""
    return model(input_ids=tokens_bs, use_cache=False).logits


@torch.no_grad()
def greedy(model: Any, tokens_bs: Tensor, count: int) -> Tensor:
    """[b, count] by transformers' own generation."""
    found = model.generate(
        input_ids=tokens_bs,
        attention_mask=torch.ones_like(tokens_bs),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return found[:, tokens_bs.shape[1] :]

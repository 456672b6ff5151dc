"""Between a run's model settings and Hugging Face's: what a converted checkpoint is trained with, and the config.json of a
model that was trained from scratch. Plain data; no Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_vp2o.config.export import PLAIN, hf_source, plain, without_family
from megatron_vp2o.config.names import CONFIG_FILE
from megatron_vp2o.config.schema import ModelConfig, Precision
from megatron_vp2o.config.store import load_config
from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.mapping import Architecture
from megatron_vp2o.hf.tensor_files import config_of

# Settings of the model that a checkpoint's manifest compares with a run's; they are TransformerConfig's names, too.
_DEFAULTS = {
    "moe_shared_expert_intermediate_size": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
}
LATER = PLAIN
"""Settings that manifests of older checkpoints lack, with the values that these have."""
_STATED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "qk_layernorm",
    "layernorm_epsilon",
    "num_moe_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_router_pre_softmax",
)
ARCHITECTURE = (*_STATED, *_DEFAULTS)
"""Settings that make another model, under names that Megatron's TransformerConfig has, too."""
YARN = (
    "yarn_rotary_scaling_factor",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
)
"""Settings that only a model with YaRN has a use for; manifests of other models do not have them."""
WITHOUT_WEIGHTS = ("window_attn_skip_freq", "activation_func")
"""Settings that no weight shows. Manifests of older checkpoints lack them and YARN, whatever the model: nobody knows these then."""
OF_THE_CHECKPOINT = (
    *ARCHITECTURE,
    *LATER,
    "rotary_base",
    "share_embeddings_and_output_weights",
    "vocab_size",
    *WITHOUT_WEIGHTS,
    *YARN,
)
"""All settings of a model that its checkpoint decides; `model=checkpoint` takes them from there."""


def manifest_model(model: Architecture) -> dict[str, Any]:
    """What the manifest of a training checkpoint says of its model."""
    return {
        **{name: model.settings[name] for name in _STATED},
        **{name: model.settings.get(name, value) for name, value in {**_DEFAULTS, **LATER}.items()},
        "window_size": list(model.settings["window_size"]) if "window_size" in model.settings else None,
        "position_embedding_type": model.embedding["position_embedding_type"],
        "rotary_base": model.embedding["rotary_base"],
        "share_embeddings_and_output_weights": model.tied,
        "vocab_size": model.vocab_size,
        "window_attn_skip_freq": _every(model.settings.get("window_attn_skip_freq")),
        "activation_func": model.settings["activation_func"],
        **{name: model.embedding[name] for name in YARN if model.embedding["position_embedding_type"] == "yarn"},
    }


def run_settings(model: Architecture) -> dict[str, Any]:
    """The `model.*` settings of a run that starts from this checkpoint.

    Raises:
        CheckpointError: runs here cannot train the family; converting and verifying it is all there is.
    """
    settings = manifest_model(model)
    trained = model.family in ("qwen3_moe", "mixtral", "gpt_oss") and all(model.moe_layers)
    if not trained or settings["window_attn_skip_freq"] == 1:
        raise CheckpointError(
            f"runs train models of the Qwen3-MoE, Mixtral and GPT-OSS shapes with experts in every layer; this {model.family} "
            "checkpoint can be converted and verified, and loaded by a Megatron program of yours"
        )
    if settings["window_size"] is not None:
        settings["window_size"] = settings["window_size"][0]
    return settings


def model_settings(start: Path) -> dict[str, Any]:
    """The `model.*` settings that a start (`init_from`) has: a Hugging Face folder, a converted checkpoint, a run or its
    checkpoint.

    Raises:
        CheckpointError: there is nothing that says them, it is damaged, or runs here cannot train the model.
        ConfigError: the configuration of the run that it is cannot be read.
    """
    if not start.exists():
        raise CheckpointError(f"init_from={start} does not exist: run what makes it first, or correct the path")
    source = hf_source(start)
    if source is not None:
        return run_settings(architecture(config_of(source)))
    run = next((folder for folder in (start, start.parent.parent) if (folder / CONFIG_FILE).is_file()), None)
    if run is None:
        raise CheckpointError(
            f"init_from={start} has no config.json that tells its model: name the folder of a Hugging Face checkpoint or of a "
            "run, or choose another model"
        )
    return {name: plain(value) for name, value in vars(load_config(run).model).items() if name in OF_THE_CHECKPOINT}


def _every(windowed: list[int] | None) -> int | None:
    """One layer in this many has no window, as a run says it: None where all have one, 1 where that is not the pattern."""
    if windowed is None or all(windowed):
        return None
    every = windowed.index(0) + 1
    pattern = [int((layer + 1) % every != 0) for layer in range(len(windowed))]
    return every if pattern == windowed else 1


def hf_config(
    model: ModelConfig, vocab_size: int, *, eos_id: int | list[int] | None, pad_id: int | None
) -> dict[str, Any]:
    """config.json of a model that was trained from scratch: a Qwen3-MoE with a norm on queries and keys, else a Mixtral.

    Raises:
        CheckpointError: neither family has such a model.
    """
    if names := without_family(model):
        raise CheckpointError(
            f"no Hugging Face family has this model ({', '.join(names)}): train a Qwen3-MoE or Mixtral shape"
        )
    shared = {
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": "bfloat16" if model.precision is Precision.bf16 else "float32",
        "eos_token_id": eos_id,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "max_position_embeddings": model.max_sequence_length,
        "num_attention_heads": model.num_attention_heads,
        "num_experts_per_tok": model.moe_router_topk,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "output_router_logits": False,
        "pad_token_id": pad_id,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_parameters": {"rope_theta": model.rotary_base, "rope_type": "default"},
        "rope_theta": model.rotary_base,  # the name before transformers 5
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
        "sliding_window": None,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    if model.qk_layernorm:
        return shared | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "intermediate_size": model.moe_ffn_hidden_size,  # of dense layers, which there are none of
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": model.moe_ffn_hidden_size,
            "norm_topk_prob": not model.moe_router_pre_softmax,
            "num_experts": model.num_moe_experts,
            "use_sliding_window": False,
        }
    return shared | {
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": model.moe_ffn_hidden_size,
        "model_type": "mixtral",
        "num_local_experts": model.num_moe_experts,
    }

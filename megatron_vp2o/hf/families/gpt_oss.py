"""GPT-OSS (20B, 120B): attention sinks, alternating sliding windows, biases everywhere, clamped gates, stacked experts."""

from __future__ import annotations

from typing import Any

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.families import common
from megatron_vp2o.hf.families.common import EXPERT, Config, rule
from megatron_vp2o.hf.mapping import Architecture, InterleavedGateUp, Layers, Rule, Transpose


def architecture(config: Config) -> Architecture:
    """See `families.architecture`."""
    common.require(config, attention_bias=True, hidden_act="silu", swiglu_alpha=1.702)
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    rules = [
        *common.ends(config),
        *common.norms(config),
        *common.attention(config, bias=True),
        rule("self_attention.core_attention.softmax_offset", "self_attn.sinks", (heads,), 0),
        common.router(config, "mlp.router.weight"),
        rule("mlp.router.bias", "mlp.router.bias", (common.experts(config),), layers=Layers.moe),
        *_experts(config["hidden_size"], config["intermediate_size"]),
    ]
    kinds = config.get("layer_types") or ["sliding_attention", "full_attention"] * layers
    window = config["sliding_window"]
    return Architecture(
        family="gpt_oss",
        num_layers=layers,
        vocab_size=config["vocab_size"],
        num_experts=common.experts(config),
        tied=config.get("tie_word_embeddings", False),
        moe_layers=(True,) * layers,
        rules=tuple(rules),
        settings=common.base_settings(config)
        | {
            "qk_layernorm": False,
            "add_bias_linear": True,
            "activation_func": "quick_gelu",
            "glu_linear_offset": 1.0,
            "activation_func_clamp_value": config.get("swiglu_limit", 7.0),
            "softmax_type": "learnable",
            # A window of w positions is the token itself and w - 1 before it.
            "window_size": (window - 1, 0),
            "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in kinds[:layers]],
            "ffn_hidden_size": config["intermediate_size"],
            "moe_ffn_hidden_size": config["intermediate_size"],
            "moe_router_pre_softmax": False,
        },
        embedding=_rope(config),
    )


def _experts(hidden: int, inner: int) -> list[Rule]:
    def expert(megatron: str, name: str, shape: tuple[int, ...], **kwargs: Any) -> Rule:
        return rule(f"{EXPERT}.{megatron}", f"mlp.experts.{name}", shape, layers=Layers.moe, stacked=True, **kwargs)

    both = InterleavedGateUp()
    return [
        expert("linear_fc1.weight", "gate_up_proj", (hidden, 2 * inner), operation=both, split=0),
        expert("linear_fc1.bias", "gate_up_proj_bias", (2 * inner,), operation=both, split=0),
        expert("linear_fc2.weight", "down_proj", (inner, hidden), operation=Transpose(), split=1),
        expert("linear_fc2.bias", "down_proj_bias", (hidden,)),
    ]


def _rope(config: Config) -> dict[str, Any]:
    parameters = common.rope(config)
    if parameters.get("rope_type") != "yarn" or parameters.get("mscale") or parameters.get("attention_factor"):
        raise CheckpointError(
            f"config.json has rope_type={parameters.get('rope_type')!r}: only 'yarn' without mscale and attention_factor, "
            "as GPT-OSS has it, can be converted"
        )
    return {
        "position_embedding_type": "yarn",
        "rotary_base": float(parameters["rope_theta"]),
        "yarn_rotary_scaling_factor": parameters["factor"],
        "yarn_original_max_position_embeddings": parameters["original_max_position_embeddings"],
        "yarn_beta_fast": parameters.get("beta_fast", 32.0),
        "yarn_beta_slow": parameters.get("beta_slow", 1.0),
        "yarn_mscale": None,
        "yarn_mscale_all_dim": None,
        "yarn_correction_range_round_to_int": parameters.get("truncate", True),
    }

"""GPT-OSS (20B, 120B): attention sinks, alternating sliding windows, biases everywhere, clamped gates, stacked experts."""

from __future__ import annotations

from typing import Any

from megatron_vp2o.hf.families import common
from megatron_vp2o.hf.families.common import EXPERT, Config, rule
from megatron_vp2o.hf.families.fields import at_least, check, require
from megatron_vp2o.hf.mapping import Architecture, InterleavedGateUp, Layers, Rule, Transpose


def architecture(config: Config) -> Architecture:
    """See `families.architecture`."""
    require(config, attention_bias=True, swiglu_alpha=1.702)
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
    windowed = [int(kind == "sliding_attention") for kind in config["layer_types"]]
    at_least(config, 1, "sliding_window")  # transformers makes its mask even where no layer has one
    window = config["sliding_window"] if any(windowed) else None
    return Architecture(
        family="gpt_oss",
        num_layers=layers,
        vocab_size=config["vocab_size"],
        num_experts=common.experts(config),
        tied=config["tie_word_embeddings"],
        moe_layers=(True,) * layers,
        rules=tuple(rules),
        settings=common.base_settings(config)
        | {
            "qk_layernorm": False,
            "add_bias_linear": True,
            "activation_func": "quick_gelu",
            "glu_linear_offset": 1.0,
            "activation_func_clamp_value": config["swiglu_limit"],
            "softmax_type": "learnable",
            "ffn_hidden_size": config["intermediate_size"],
            "moe_ffn_hidden_size": config["intermediate_size"],
            "moe_router_pre_softmax": common.softmax_first(config, normalised=True),
        }
        # A window of w positions is the token itself and w - 1 before it.
        | ({} if window is None else {"window_size": (window - 1, 0), "window_attn_skip_freq": windowed}),
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
    rope = config["rope"]
    base = float(rope["rope_theta"])
    if rope["rope_type"] == "default":
        return {"position_embedding_type": "rope", "rotary_base": base}
    for name in ("mscale", "attention_factor"):
        check(not rope.get(name), "gpt_oss", f"rope_parameters.{name}", rope.get(name), "absent")
    return {
        "position_embedding_type": "yarn",
        "rotary_base": base,
        "yarn_rotary_scaling_factor": rope["factor"],
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": rope["beta_fast"],
        "yarn_beta_slow": rope["beta_slow"],
        "yarn_mscale": None,
        "yarn_mscale_all_dim": None,
        "yarn_correction_range_round_to_int": rope["truncate"],
    }

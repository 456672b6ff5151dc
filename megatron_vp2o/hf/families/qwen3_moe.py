"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): grouped-query attention with a norm on each head's queries and keys."""

from __future__ import annotations

from megatron_vp2o.hf.families import common
from megatron_vp2o.hf.families.common import Config
from megatron_vp2o.hf.families.fields import at_least, check, require
from megatron_vp2o.hf.mapping import Architecture, Layers


def architecture(config: Config) -> Architecture:
    """See `families.architecture`."""
    require(config, attention_bias=False, hidden_act=("silu", "swish"))
    at_least(config, 1, "decoder_sparse_step", "moe_intermediate_size")
    windowed = config["use_sliding_window"] and config["sliding_window"] is not None
    check(not windowed, "qwen3_moe", "use_sliding_window", True, "false, or sliding_window null")
    hidden, width, layers = config["hidden_size"], config["head_dim"], config["num_hidden_layers"]
    step, dense = config["decoder_sparse_step"], config["mlp_only_layers"] or []
    moe_layers = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    check(
        any(moe_layers),
        "qwen3_moe",
        "mlp_only_layers",
        dense,
        f"such that, with decoder_sparse_step={step}, a layer has experts",
    )
    rules = [
        *common.ends(config),
        *common.norms(config),
        *common.attention(config),
        *common.qk_norms(width, width),
        common.router(config, "mlp.gate.weight"),
        *common.swiglu(common.EXPERT, "mlp.experts.{e}", hidden, config["moe_intermediate_size"], Layers.moe),
    ]
    settings = common.base_settings(config) | {
        "qk_layernorm": True,
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_pre_softmax": common.softmax_first(config, normalised=config["norm_topk_prob"]),
    }
    if not all(moe_layers):
        rules += common.swiglu("mlp", "mlp", hidden, config["intermediate_size"], Layers.dense)
        settings |= {"ffn_hidden_size": config["intermediate_size"], "moe_layer_freq": [int(moe) for moe in moe_layers]}
    return Architecture(
        family="qwen3_moe",
        num_layers=layers,
        vocab_size=config["vocab_size"],
        num_experts=common.experts(config),
        tied=config["tie_word_embeddings"],
        moe_layers=moe_layers,
        rules=tuple(rules),
        settings=settings,
        embedding={"position_embedding_type": "rope", "rotary_base": common.plain_rope(config)},
    )

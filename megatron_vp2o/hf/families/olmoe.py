"""OLMoE: the norm of queries and keys is over all heads together, which Megatron's per-head norm is not."""

from __future__ import annotations

from megatron_vp2o.hf.families import common
from megatron_vp2o.hf.families.common import Config
from megatron_vp2o.hf.families.fields import require
from megatron_vp2o.hf.mapping import Architecture, Layers


def architecture(config: Config) -> Architecture:
    """See `families.architecture`."""
    require(config, attention_bias=False, hidden_act=("silu", "swish"), clip_qkv=None)
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    rules = [
        *common.ends(config),
        *common.norms(config),
        *common.attention(config),
        *common.qk_norms(config["num_attention_heads"] * width, config["num_key_value_heads"] * width, 0),
        common.router(config, "mlp.gate.weight"),
        *common.swiglu(common.EXPERT, "mlp.experts.{e}", hidden, inner, Layers.moe),
    ]
    return Architecture(
        family="olmoe",
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        num_experts=common.experts(config),
        tied=config["tie_word_embeddings"],
        moe_layers=(True,) * config["num_hidden_layers"],
        rules=tuple(rules),
        settings=common.base_settings(config)
        | {
            "qk_layernorm": True,
            "moe_ffn_hidden_size": inner,
            "ffn_hidden_size": inner,
            "moe_router_pre_softmax": common.softmax_first(config, normalised=config["norm_topk_prob"]),
        },
        embedding={"position_embedding_type": "rope", "rotary_base": common.plain_rope(config)},
        qk_norm_over_heads=True,
    )

"""Mixtral (8x7B, 8x22B): softmax over the chosen experts."""

from __future__ import annotations

from megatron_vp2o.hf.families import common
from megatron_vp2o.hf.families.common import Config
from megatron_vp2o.hf.families.fields import require
from megatron_vp2o.hf.mapping import Architecture, Layers


def architecture(config: Config) -> Architecture:
    """See `families.architecture`."""
    require(config, hidden_act=("silu", "swish"), sliding_window=None)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    projections = ("w1", "w3", "w2")  # gate, up, down
    rules = [
        *common.ends(config),
        *common.norms(config),
        *common.attention(config),
        common.router(config, "block_sparse_moe.gate.weight"),
        *common.swiglu(common.EXPERT, "block_sparse_moe.experts.{e}", hidden, inner, Layers.moe, projections),
    ]
    return Architecture(
        family="mixtral",
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        num_experts=common.experts(config),
        tied=config["tie_word_embeddings"],
        moe_layers=(True,) * config["num_hidden_layers"],
        rules=tuple(rules),
        settings=common.base_settings(config)
        | {
            "qk_layernorm": False,
            "moe_ffn_hidden_size": inner,
            "ffn_hidden_size": inner,
            "moe_router_pre_softmax": common.softmax_first(config, normalised=True),
        },
        embedding={"position_embedding_type": "rope", "rotary_base": common.plain_rope(config)},
    )

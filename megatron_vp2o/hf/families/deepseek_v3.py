"""DeepSeek-V3 and models of its style: latent attention, sigmoid router with a bias, shared experts, dense first layers.

Both sides store rotary pairs interleaved, heads as [no position; position] and the up-projection of keys and values as
[key; value] head by head, so the matrices are copied (megatron/core/transformer/multi_latent_attention.py).
"""

from __future__ import annotations

from typing import Any

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.families import common
from megatron_vp2o.hf.families.common import Config, rule
from megatron_vp2o.hf.mapping import Architecture, Layers, Rule


def architecture(config: Config) -> Architecture:
    """See `families.architecture`."""
    common.require(
        config,
        attention_bias=False,
        hidden_act="silu",
        rope_interleave=True,
        norm_topk_prob=True,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
    )
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    inner, shared = config["moe_intermediate_size"], config["moe_intermediate_size"] * config["n_shared_experts"]
    first = min(config["first_k_dense_replace"], layers)
    moe_layers = tuple(layer >= first for layer in range(layers))
    rules = [
        *common.ends(config),
        *_norms(hidden),
        *_attention(config),
        common.router(config, "mlp.gate.weight"),
        rule(
            "mlp.router.expert_bias",
            "mlp.gate.e_score_correction_bias",
            (common.experts(config),),
            layers=Layers.moe,
            keeps_dtype=True,
        ),
        *common.swiglu(common.EXPERT, "mlp.experts.{e}", hidden, inner, Layers.moe),
        *common.swiglu("mlp.shared_experts", "mlp.shared_experts", hidden, shared, Layers.moe),
    ]
    if first:
        rules += common.swiglu("mlp", "mlp", hidden, config["intermediate_size"], Layers.dense)
    return Architecture(
        family="deepseek_v3",
        num_layers=layers,
        vocab_size=config["vocab_size"],
        num_experts=common.experts(config),
        tied=config.get("tie_word_embeddings", False),
        moe_layers=moe_layers,
        rules=tuple(rules),
        settings=_settings(config, moe_layers, shared) | _rope(config),
        embedding={"position_embedding_type": "rope", "rotary_base": float(common.rope(config)["rope_theta"])},
        latent_attention=True,
    )


def _norms(hidden: int) -> list[Rule]:
    """Without the local spec's renaming: that of latent attention has none."""
    fused = ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    before = "post_attention_layernorm.weight"
    return [
        rule("input_layernorm.weight", "input_layernorm.weight", (hidden,)),
        rule("pre_mlp_layernorm.weight", before, (hidden,), layers=Layers.moe),
        rule("pre_mlp_layernorm.weight", before, (hidden,), layers=Layers.dense, stored=fused),
    ]


def _attention(config: Config) -> list[Rule]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rank, q_rank = config["kv_lora_rank"], config.get("q_lora_rank")
    plain, rotary, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    ours, theirs = "self_attention.", "self_attn."
    rules = [
        rule(f"{ours}linear_kv_down_proj.weight", f"{theirs}kv_a_proj_with_mqa.weight", (rank + rotary, hidden), 0),
        rule(
            f"{ours}kv_layernorm.weight",
            f"{theirs}kv_a_layernorm.weight",
            (rank,),
            stored=(f"{ours}kv_layernorm.weight", f"{ours}linear_kv_up_proj.layer_norm_weight"),
        ),
        rule(f"{ours}linear_kv_up_proj.weight", f"{theirs}kv_b_proj.weight", (heads * (plain + value), rank), 0),
        rule(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", (hidden, heads * value), 1),
    ]
    width = heads * (plain + rotary)
    if q_rank is None:
        return [rule(f"{ours}linear_q_proj.weight", f"{theirs}q_proj.weight", (width, hidden), 0), *rules]
    return [
        rule(f"{ours}linear_q_down_proj.weight", f"{theirs}q_a_proj.weight", (q_rank, hidden), 0),
        rule(
            f"{ours}q_layernorm.weight",
            f"{theirs}q_a_layernorm.weight",
            (q_rank,),
            stored=(f"{ours}q_layernorm.weight", f"{ours}linear_q_up_proj.layer_norm_weight"),
        ),
        rule(f"{ours}linear_q_up_proj.weight", f"{theirs}q_b_proj.weight", (width, q_rank), 0),
        *rules,
    ]


def _settings(config: Config, moe_layers: tuple[bool, ...], shared: int) -> dict[str, Any]:
    groups, chosen = config.get("n_group", 1), config.get("topk_group", 1)
    return common.base_settings(config) | {
        "num_query_groups": config["num_attention_heads"],
        "kv_channels": config["v_head_dim"],
        "q_lora_rank": config.get("q_lora_rank"),
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "qk_layernorm": True,
        "ffn_hidden_size": config["intermediate_size"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": shared,
        "moe_layer_freq": [int(moe) for moe in moe_layers],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_pre_softmax": True,
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": chosen if groups > 1 else None,
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
    }


def _rope(config: Config) -> dict[str, Any]:
    parameters = common.rope(config)
    kind, base = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    if kind == "default":
        # Megatron scales the softmax by its YaRN settings even without YaRN.
        return {"rope_type": "rope", "rotary_base": base, "rotary_scaling_factor": 1.0, "mscale": 1.0}
    if kind != "yarn" or not parameters.get("mscale_all_dim") or parameters.get("attention_factor") is not None:
        raise CheckpointError(
            f"config.json has rope_type={kind!r}, mscale_all_dim={parameters.get('mscale_all_dim')!r}: only 'default', and "
            "'yarn' with mscale and mscale_all_dim as DeepSeek has them, can be converted"
        )
    return {
        "rope_type": "yarn",
        "rotary_base": base,
        "rotary_scaling_factor": parameters["factor"],
        "original_max_position_embeddings": parameters["original_max_position_embeddings"],
        "beta_fast": parameters.get("beta_fast", 32),
        "beta_slow": parameters.get("beta_slow", 1),
        "mscale": parameters["mscale"],
        "mscale_all_dim": parameters["mscale_all_dim"],
    }

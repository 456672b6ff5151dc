"""DeepSeek-V3 and models of its style: latent attention, sigmoid router with a bias, shared experts, dense first layers.

Both sides store rotary pairs interleaved, heads as [no position; position] and the up-projection of keys and values as
[key; value] head by head, so the matrices are copied (megatron/core/transformer/multi_latent_attention.py).
"""

from __future__ import annotations

from typing import Any

from megatron_vp2o.hf.families import common
from megatron_vp2o.hf.families.common import Config, rule
from megatron_vp2o.hf.families.fields import at_least, check, require
from megatron_vp2o.hf.mapping import Architecture, Layers, Rule

LATENT_EPSILON = 1e-6
"""Epsilon of the norms of the latents of queries, keys and values: transformers and DeepSeek's own code fix it, whatever
`rms_norm_eps` is."""


def architecture(config: Config) -> Architecture:
    """See `families.architecture`."""
    _check(config)
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    inner, shared = config["moe_intermediate_size"], config["moe_intermediate_size"] * config["n_shared_experts"]
    first = max(0, config["first_k_dense_replace"])
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
        tied=config["tie_word_embeddings"],
        moe_layers=moe_layers,
        rules=tuple(rules),
        settings=_settings(config, moe_layers, shared) | _rope(config),
        embedding={"position_embedding_type": "rope", "rotary_base": float(config["rope"]["rope_theta"])},
        latent_attention=True,
        latent_norm_epsilon=LATENT_EPSILON,
        prediction_layers=config["num_mtp_layers"],
    )


def _check(config: Config) -> None:
    require(config, attention_bias=False, hidden_act=("silu", "swish"), rope_interleave=True)
    require(config, num_key_value_heads=config["num_attention_heads"])
    at_least(config, 1, "moe_intermediate_size", "n_shared_experts", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    at_least(config, 1, "n_group", "topk_group")
    at_least(config, 0, "num_mtp_layers")
    if config["q_lora_rank"] is not None:
        at_least(config, 1, "q_lora_rank")
    family, topk, normalised = "deepseek_v3", config["num_experts_per_tok"], bool(config["norm_topk_prob"])
    first, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    check(first is not None and first < layers, family, "first_k_dense_replace", first, f"less than {layers} layers")
    # Megatron normalises the gates of two experts and more, and never that of one.
    bound = f"{'true' if topk > 1 else 'false'} with num_experts_per_tok={topk}, as Megatron's sigmoid router has it"
    check(normalised == (topk > 1), family, "norm_topk_prob", config["norm_topk_prob"], bound)
    scale = config["routed_scaling_factor"]
    check(scale != 0, family, "routed_scaling_factor", scale, "other than 0, which Megatron takes for none")
    _check_groups(common.experts(config), topk, config["n_group"], config["topk_group"])


def _check_groups(experts: int, topk: int, groups: int, chosen: int) -> None:
    """Refuse routing limited to groups of experts where the two implementations choose groups differently.

    transformers ranks a group by the sum of its best 2 experts (modeling_deepseek_v3.py), Megatron by the sum of its best
    topk // chosen (moe_utils.py, `group_limited_topk`).
    """
    family, each = "deepseek_v3", experts // groups
    check(experts % groups == 0, family, "n_group", groups, f"a divisor of n_routed_experts={experts}")
    check(each > 1, family, "n_group", groups, f"such that a group has 2 of n_routed_experts={experts} or more")
    check(chosen <= groups, family, "topk_group", chosen, f"n_group={groups} or less")
    check(
        topk <= chosen * each,
        family,
        "num_experts_per_tok",
        topk,
        f"{chosen * each}, the experts of topk_group, or less",
    )
    bound = f"such that num_experts_per_tok={topk} // topk_group is 2, or equal to n_group={groups}: Megatron ranks a group by "
    bound += "its best num_experts_per_tok // topk_group experts, transformers by its best 2"
    check(chosen == groups or topk // chosen == 2, family, "topk_group", chosen, bound)


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
    rank, q_rank = config["kv_lora_rank"], config["q_lora_rank"]
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
    groups, chosen = config["n_group"], config["topk_group"]
    return common.base_settings(config) | {
        "num_query_groups": config["num_attention_heads"],
        "kv_channels": config["v_head_dim"],
        "q_lora_rank": config["q_lora_rank"],
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
        "moe_router_num_groups": groups if chosen < groups else None,
        "moe_router_group_topk": chosen if chosen < groups else None,
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
    }


def _rope(config: Config) -> dict[str, Any]:
    rope = config["rope"]
    base, kind = float(rope["rope_theta"]), rope["rope_type"]
    if kind == "default":
        # Megatron scales the softmax by its YaRN settings even without YaRN.
        return {"rope_type": "rope", "rotary_base": base, "rotary_scaling_factor": 1.0, "mscale": 1.0}
    family, mscale, all_dim = "deepseek_v3", rope.get("mscale"), rope.get("mscale_all_dim")
    factor = rope.get("attention_factor")
    check(factor is None, family, "rope_parameters.attention_factor", factor, "absent")
    check(
        rope["truncate"],
        family,
        "rope_parameters.truncate",
        rope["truncate"],
        "true: Megatron's latent attention rounds",
    )
    check(mscale or not all_dim, family, "rope_parameters.mscale", mscale, f"given, as mscale_all_dim={all_dim} is")
    return {
        "rope_type": "yarn",
        "rotary_base": base,
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope["beta_fast"],
        "beta_slow": rope["beta_slow"],
        # Without one of the two, transformers scales cosine and sine as if they were 1 and 0.
        "mscale": mscale if all_dim else 1.0,
        "mscale_all_dim": all_dim or 0.0,
    }

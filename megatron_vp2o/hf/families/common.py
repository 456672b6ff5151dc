"""What the families share: the rules of a Llama-like decoder. Configurations here are those that `fields.resolve` returns.

Shape legend: V vocabulary, D hidden, F intermediate, n query heads, g key/value heads, d head width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_vp2o.hf.families.fields import check
from megatron_vp2o.hf.mapping import QKV, GateUp, Layers, Part, Rule

LAYER, DECODER = "model.layers.{l}.", "decoder.layers.{l}."

Config = Mapping[str, Any]


def experts(config: Config) -> int:
    """The number of routed experts: the families name it differently."""
    return int(
        next(config[name] for name in ("num_local_experts", "num_experts", "n_routed_experts") if name in config)
    )


def plain_rope(config: Config) -> float:
    """The base of an unscaled rotary embedding.

    Raises:
        CheckpointError: it is scaled.
    """
    rope = config["rope"]
    check(rope["rope_type"] == "default", config["model_type"], "rope_type", rope["rope_type"], "'default'")
    return float(rope["rope_theta"])


def softmax_first(config: Config, *, normalised: bool) -> bool:
    """Megatron's `moe_router_pre_softmax`: whether the softmax is over all experts.

    Normalised over the chosen experts, softmax before and after choosing are the same gates, and Megatron has only the
    second of these; of one expert that gate is always 1, which Megatron refuses (transformer_config.py).
    """
    topk = config["num_experts_per_tok"]
    bound = "2 or more: with one expert a token and gates that add up to 1 the router has no effect, and Megatron refuses it"
    check(topk > 1 or not normalised, config["model_type"], "num_experts_per_tok", topk, bound)
    return not normalised


def base_settings(config: Config) -> dict[str, Any]:
    """Fields of TransformerConfig that all families have."""
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "num_moe_experts": experts(config),
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def ends(config: Config) -> list[Rule]:
    """Embedding, final norm and, unless it is tied, the output projection."""
    shape = (config["vocab_size"], config["hidden_size"])
    rules = [
        _whole("embedding.word_embeddings.weight", "model.embed_tokens.weight", shape, vocabulary=True),
        _whole("decoder.final_layernorm.weight", "model.norm.weight", (config["hidden_size"],)),
    ]
    if not config["tie_word_embeddings"]:
        rules.append(_whole("output_layer.weight", "lm_head.weight", shape, vocabulary=True))
    return rules


def _whole(megatron: str, name: str, shape: tuple[int, ...], vocabulary: bool = False) -> Rule:
    split = 0 if vocabulary else None
    return Rule(megatron, (Part(name, shape),), layers=Layers.none, split=split, vocabulary=vocabulary)


def rule(megatron: str, name: str, shape: tuple[int, ...], split: int | None = None, **kwargs: Any) -> Rule:
    """A rule inside of the layers with one Hugging Face tensor; both names without the layer's prefix."""
    part = Part(LAYER + name, shape, stacked=kwargs.pop("stacked", False))
    stored = tuple(DECODER + other for other in kwargs.pop("stored", ()))
    return Rule(DECODER + megatron, (part,), split=split, stored=stored, **kwargs)


def attention(config: Config, *, bias: bool = False) -> list[Rule]:
    """Grouped-query attention with separate q, k and v."""
    hidden, width = config["hidden_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    operation = QKV(groups, width)

    def qkv(kind: str, *rest: int) -> Rule:
        parts = tuple(
            Part(f"{LAYER}self_attn.{letter}_proj.{kind}", (count * width, *rest))
            for letter, count in (("q", heads), ("k", groups), ("v", groups))
        )
        return Rule(f"{DECODER}self_attention.linear_qkv.{kind}", parts, operation, split=0)

    rules = [
        qkv("weight", hidden),
        rule("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (hidden, heads * width), 1),
    ]
    if bias:
        rules += [qkv("bias"), rule("self_attention.linear_proj.bias", "self_attn.o_proj.bias", (hidden,))]
    return rules


def norms(config: Config) -> list[Rule]:
    """The two norms of a layer. Megatron's local spec stores them under the names of the fused layers of
    transformer-engine's, which for experts has no fused layer (models/gpt/gpt_layer_specs.py)."""
    shape = (config["hidden_size"],)
    fused = "mlp.linear_fc1.layer_norm_weight"
    moe, dense = (fused, "pre_mlp_layernorm.weight"), (fused,)
    before = "post_attention_layernorm.weight"
    return [
        rule(
            "input_layernorm.weight",
            "input_layernorm.weight",
            shape,
            stored=("self_attention.linear_qkv.layer_norm_weight",),
        ),
        rule("pre_mlp_layernorm.weight", before, shape, layers=Layers.moe, stored=moe),
        rule("pre_mlp_layernorm.weight", before, shape, layers=Layers.dense, stored=dense),
    ]


def qk_norms(q_width: int, k_width: int, split: int | None = None) -> list[Rule]:
    return [
        rule("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", (q_width,), split),
        rule("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", (k_width,), split),
    ]


def swiglu(
    megatron: str, name: str, hidden: int, inner: int, layers: Layers, projections: tuple[str, str, str] | None = None
) -> list[Rule]:
    """Gate, up and down of a feed-forward block, of an expert if the names have {e}."""
    gate, up, down = projections or ("gate_proj", "up_proj", "down_proj")
    both = tuple(Part(f"{LAYER}{name}.{which}.weight", (inner, hidden)) for which in (gate, up))
    return [
        Rule(f"{DECODER}{megatron}.linear_fc1.weight", both, GateUp(), layers, split=0),
        rule(f"{megatron}.linear_fc2.weight", f"{name}.{down}.weight", (hidden, inner), 1, layers=layers),
    ]


EXPERT = "mlp.experts.local_experts.{e}"


def router(config: Config, name: str) -> Rule:
    return rule("mlp.router.weight", name, (experts(config), config["hidden_size"]), layers=Layers.moe)

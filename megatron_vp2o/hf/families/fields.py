"""The fields of each family's config.json: their types and the values that a file which leaves them out means.

Types and defaults are those of transformers' configuration classes; a test compares them with the installed ones, field by
field, and fails for a field that is not here. `resolve` reads a file as transformers does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_vp2o.errors import CheckpointError

_WEIGHTLESS: dict[str, tuple[str, Any]] = {
    "initializer_range": ("float", 0.02),
    "use_cache": ("bool", True),
    "output_router_logits": ("bool", False),
    "attention_dropout": ("float|int", 0.0),
}
"""Fields that all families have and that change no logits of a model in evaluation mode."""

FIELDS: dict[str, dict[str, tuple[str, Any]]] = {
    "qwen3_moe": {
        **_WEIGHTLESS,
        "vocab_size": ("int", 151936),
        "hidden_size": ("int", 2048),
        "intermediate_size": ("int", 6144),
        "num_hidden_layers": ("int", 24),
        "num_attention_heads": ("int", 32),
        "num_key_value_heads": ("int", 4),
        "hidden_act": ("str", "silu"),
        "max_position_embeddings": ("int", 32768),
        "rms_norm_eps": ("float", 1e-6),
        "tie_word_embeddings": ("bool", False),
        "rope_parameters": ("dict|none", None),
        "attention_bias": ("bool", False),
        "use_sliding_window": ("bool", False),
        "sliding_window": ("int|none", 4096),
        "decoder_sparse_step": ("int", 1),
        "moe_intermediate_size": ("int", 768),
        "num_experts_per_tok": ("int", 8),
        "num_experts": ("int", 128),
        "norm_topk_prob": ("bool", False),
        "router_aux_loss_coef": ("float", 0.001),
        "mlp_only_layers": ("list[int]|none", None),
        "pad_token_id": ("int|none", None),
        "bos_token_id": ("int|none", None),
        "eos_token_id": ("int|list[int]|none", None),
    },
    "mixtral": {
        **_WEIGHTLESS,
        "vocab_size": ("int", 32000),
        "hidden_size": ("int", 4096),
        "intermediate_size": ("int", 14336),
        "num_hidden_layers": ("int", 32),
        "num_attention_heads": ("int", 32),
        "num_key_value_heads": ("int", 8),
        "head_dim": ("int|none", None),
        "hidden_act": ("str", "silu"),
        "max_position_embeddings": ("int", 131072),
        "rms_norm_eps": ("float", 1e-5),
        "pad_token_id": ("int|none", None),
        "bos_token_id": ("int|none", 1),
        "eos_token_id": ("int|list[int]|none", 2),
        "tie_word_embeddings": ("bool", False),
        "sliding_window": ("int|none", None),
        "num_experts_per_tok": ("int", 2),
        "num_local_experts": ("int", 8),
        "router_aux_loss_coef": ("float", 0.001),
        "router_jitter_noise": ("float", 0.0),
        "rope_parameters": ("dict|none", None),
    },
    "olmoe": {
        **_WEIGHTLESS,
        "vocab_size": ("int", 50304),
        "hidden_size": ("int", 2048),
        "intermediate_size": ("int", 2048),
        "num_hidden_layers": ("int", 16),
        "num_attention_heads": ("int", 16),
        "num_key_value_heads": ("int|none", None),
        "hidden_act": ("str", "silu"),
        "max_position_embeddings": ("int", 4096),
        "rms_norm_eps": ("float", 1e-5),
        "pad_token_id": ("int|none", 1),
        "bos_token_id": ("int|none", None),
        "eos_token_id": ("int|list[int]|none", 50279),
        "tie_word_embeddings": ("bool", False),
        "rope_parameters": ("dict|none", None),
        "attention_bias": ("bool", False),
        "clip_qkv": ("float|none", None),
        "num_experts_per_tok": ("int", 8),
        "num_experts": ("int", 64),
        "router_aux_loss_coef": ("float", 0.01),
        "norm_topk_prob": ("bool", False),
    },
    "deepseek_v3": {
        **_WEIGHTLESS,
        "attention_dropout": ("float|int|none", 0.0),
        "vocab_size": ("int", 129280),
        "hidden_size": ("int", 7168),
        "intermediate_size": ("int", 18432),
        "moe_intermediate_size": ("int", 2048),
        "num_hidden_layers": ("int", 61),
        "num_attention_heads": ("int", 128),
        "num_key_value_heads": ("int|none", 128),
        "n_shared_experts": ("int", 1),
        "n_routed_experts": ("int", 256),
        "routed_scaling_factor": ("float", 2.5),
        "kv_lora_rank": ("int", 512),
        "q_lora_rank": ("int|none", 1536),
        "qk_rope_head_dim": ("int", 64),
        "v_head_dim": ("int|none", 128),
        "qk_nope_head_dim": ("int", 128),
        "n_group": ("int|none", 8),
        "topk_group": ("int|none", 4),
        "num_experts_per_tok": ("int|none", 8),
        "first_k_dense_replace": ("int|none", 3),
        "norm_topk_prob": ("bool|none", True),
        "hidden_act": ("str", "silu"),
        "max_position_embeddings": ("int", 4096),
        "rms_norm_eps": ("float", 1e-6),
        "pad_token_id": ("int|none", None),
        "bos_token_id": ("int|none", 0),
        "eos_token_id": ("int|list[int]|none", 1),
        "pretraining_tp": ("int|none", 1),
        "tie_word_embeddings": ("bool", False),
        "rope_parameters": ("dict|none", None),
        "rope_interleave": ("bool|none", True),
        "attention_bias": ("bool", False),
        "num_mtp_layers": ("int", 1),
    },
    "gpt_oss": {
        **_WEIGHTLESS,
        "num_hidden_layers": ("int", 36),
        "num_local_experts": ("int", 128),
        "vocab_size": ("int", 201088),
        "hidden_size": ("int", 2880),
        "intermediate_size": ("int", 2880),
        "head_dim": ("int", 64),
        "num_attention_heads": ("int", 64),
        "num_key_value_heads": ("int", 8),
        "sliding_window": ("int|none", 128),
        "tie_word_embeddings": ("bool", False),
        "hidden_act": ("str", "silu"),
        "max_position_embeddings": ("int", 131072),
        "rms_norm_eps": ("float", 1e-5),
        "rope_parameters": ("dict|none", None),
        "num_experts_per_tok": ("int", 4),
        "swiglu_alpha": ("float", 1.702),
        "swiglu_limit": ("float", 7.0),
        "router_aux_loss_coef": ("float", 0.001),
        "layer_types": ("list[str]|none", None),
        "pad_token_id": ("int|none", None),
        "bos_token_id": ("int|none", None),
        "eos_token_id": ("int|list[int]|none", None),
        "attention_bias": ("bool", True),
    },
}
"""Family -> field -> (types, default)."""

ALIASES: dict[str, dict[str, str]] = {
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "mixtral": {"num_experts": "num_local_experts"},
    "olmoe": {"num_local_experts": "num_experts"},
    "deepseek_v3": {"num_local_experts": "n_routed_experts", "num_nextn_predict_layers": "num_mtp_layers"},
    "gpt_oss": {"num_experts": "num_local_experts"},
}
"""Other names under which a file may give a field."""

THETA = {"qwen3_moe": 10000.0, "mixtral": 1000000.0, "olmoe": 10000.0, "deepseek_v3": 10000.0, "gpt_oss": 150000.0}
"""Rotary base of a file that gives none."""

GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""`rope_parameters` of a GPT-OSS file that gives none."""

_ROPE_KEYS = {
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
}
_ROPE_KEYS |= {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"}

_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "is_encoder_decoder": (False, None),
    "per_layer_config": (None, {}),
    "transformers_weights": (None,),
    "mlp_layer_types": (None,),
    "dtype": (None, "float32", "bfloat16", "float16", "float64"),
    "torch_dtype": (None, "float32", "bfloat16", "float16", "float64"),
}
"""Settings of any transformers model that change what is computed or loaded, and the values that do not."""

_EXTRA: dict[str, dict[str, tuple[Any, ...]]] = {
    "deepseek_v3": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
    "olmoe": {"sliding_window": (None,)},
}
"""Settings that are no fields of transformers' class, and that only these values leave without effect on the model."""


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of the family with the value that transformers gives it, and `rope`, its rotary parameters in one place.

    Raises:
        CheckpointError: a value is of another type or out of range, or two names of a field disagree.
    """
    family = str(config["model_type"])
    found: dict[str, Any] = {"model_type": family}
    given = _by_own_name(config, family)
    for name, (kinds, default) in FIELDS[family].items():
        value = given.get(name, default)
        check(is_a(value, kinds), family, name, value, "of type " + kinds.replace("none", "null").replace("|", " or "))
        check(not isinstance(value, float) or math.isfinite(value), family, name, value, "a finite number")
        found[name] = value
    for name, allowed in (_ELSEWHERE | _EXTRA.get(family, {})).items():
        if name in config:
            check(config[name] in allowed, family, name, config[name], " or ".join(map(repr, allowed)) + ", or absent")
    if found.get("num_key_value_heads", 0) is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    found["head_dim"] = _head_width(config, found, family)
    found["layer_types"] = _layer_types(config, found, family)
    found["rope"] = _rope(config, found, family)
    _check_shared(found, family)
    return found


def is_a(value: Any, kinds: str) -> bool:
    """Whether a value of JSON is of one of these types, as transformers' strict configuration classes see it: an integer is
    no float, and a boolean is no integer."""
    plain = {"int": int, "float": float, "bool": bool, "str": str, "dict": dict, "none": type(None)}
    for kind in kinds.split("|"):
        if kind.startswith("list["):
            if isinstance(value, list) and all(is_a(item, kind[5:-1]) for item in value):
                return True
        elif type(value) is plain[kind]:
            return True
    return False


def check(good: bool, family: str, name: str, value: Any, bound: str) -> None:
    """Raise CheckpointError, naming the setting, its value and what can be converted, unless it is good."""
    if not good:
        text = repr(value)
        text = text if len(text) <= 100 else text[:100] + "..."
        raise CheckpointError(
            f"config.json of {family} has {name}={text}, which cannot be converted: it must be {bound}"
        )


def at_least(found: Mapping[str, Any], least: int, *names: str) -> None:
    """Check that integers are not null and not below `least`."""
    for name in names:
        value = found[name]
        check(value is not None and value >= least, found["model_type"], name, value, f"{least} or more")


def _by_own_name(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    given = dict(config)
    for other, name in ALIASES[family].items():
        if other in given:
            value = given.pop(other)
            check(given.get(name, value) == value, family, other, value, f"the same as {name}={given.get(name)!r}")
            given[name] = value
    return given


def _head_width(config: Mapping[str, Any], found: Mapping[str, Any], family: str) -> int:
    at_least(found, 1, "hidden_size", "num_attention_heads")
    derived = found["hidden_size"] // found["num_attention_heads"]
    if family == "deepseek_v3":
        at_least(found, 1, "qk_rope_head_dim")
        value, name = config.get("head_dim", found["qk_rope_head_dim"]), "head_dim"
        wanted = found["qk_rope_head_dim"]
        check(value == wanted, family, name, value, f"qk_rope_head_dim ({wanted}), or absent")
    elif family == "olmoe":
        value, name = config.get("head_dim", derived), "head_dim"
        fits = value == derived and derived * found["num_attention_heads"] == found["hidden_size"]
        check(fits, family, name, value, "hidden_size / num_attention_heads, without a remainder")
    elif family == "qwen3_moe":
        value, name = config.get("head_dim", derived), "head_dim"
    else:
        value, name = found["head_dim"], "head_dim"
        value = derived if value is None or (family == "mixtral" and value == 0) else value
    good = is_a(value, "int") and value > 0 and value % 2 == 0
    check(good, family, name, value, "a positive even number: rotary embeddings turn pairs")
    return int(value)


def _layer_types(config: Mapping[str, Any], found: Mapping[str, Any], family: str) -> list[str]:
    """The attention of each layer."""
    layers = found["num_hidden_layers"]
    at_least(found, 1, "num_hidden_layers")
    check(layers <= 100_000, family, "num_hidden_layers", layers, "100,000 or less")
    full, sliding = "full_attention", "sliding_attention"
    kinds = config.get("layer_types")
    if family != "gpt_oss":
        check(kinds is None or kinds == [full] * layers, family, "layer_types", kinds, f"{full!r} for each of {layers}")
        return [full] * layers
    if kinds is None:
        return [full if layer % 2 else sliding for layer in range(layers)]
    good = len(kinds) == layers and set(kinds) <= {full, sliding}
    check(good, family, "layer_types", kinds, f"a list of {layers} names, each {sliding!r} or {full!r}")
    return list(kinds)


def _rope(config: Mapping[str, Any], found: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Rotary parameters, as transformers 5 puts them together: `rope_scaling` takes the place of `rope_parameters`, and the
    base is theirs, else the file's `rope_theta`, else the family's."""
    scaling = config.get("rope_scaling")
    check(is_a(scaling, "dict|none"), family, "rope_scaling", scaling, "an object, or null")
    own = found["rope_parameters"]
    if own is None and family == "gpt_oss":
        own = GPT_OSS_ROPE
    rope = dict(scaling or own or {})
    what = "rope_scaling" if scaling else "rope_parameters"
    unknown = sorted(map(str, rope.keys() - _ROPE_KEYS))
    check(not unknown, family, what, rope, f"without {', '.join(unknown)}, which nothing here knows")
    rope.setdefault("rope_theta", config.get("rope_theta", THETA[family]))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    partial = config.get("partial_rotary_factor")
    rope.setdefault("partial_rotary_factor", partial)
    for name, value in (
        ("partial_rotary_factor", partial),
        (f"{what}.partial_rotary_factor", rope["partial_rotary_factor"]),
    ):
        check(value is None or value == 1, family, name, value, "1, or absent: the rotation is of whole heads")
    theta = rope["rope_theta"]
    check(positive(theta), family, "rope_theta", theta, "a positive number")
    check(
        rope["rope_type"] in ("default", "yarn"), family, f"{what}.rope_type", rope["rope_type"], "'default' or 'yarn'"
    )
    if rope["rope_type"] == "yarn":
        _check_yarn(config, found, rope, family, what)
    return rope


def _check_yarn(
    config: Mapping[str, Any], found: Mapping[str, Any], rope: dict[str, Any], family: str, what: str
) -> None:
    check(rope["rope_theta"] > 1, family, "rope_theta", rope["rope_theta"], "more than 1 with rope_type='yarn'")
    name = "original_max_position_embeddings"
    rope[name] = config.get(name, rope.get(name, found["max_position_embeddings"]))
    check(is_a(rope[name], "int") and rope[name] > 0, family, f"{what}.{name}", rope[name], "a positive integer")
    check(positive(rope.get("factor")), family, f"{what}.factor", rope.get("factor"), "a positive number")
    for beta, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        rope[beta] = rope.get(beta) or default
        check(positive(rope[beta]), family, f"{what}.{beta}", rope[beta], "a positive number")
    for scale in ("mscale", "mscale_all_dim", "attention_factor"):
        value = rope.get(scale)
        good = value is None or (is_a(value, "int|float") and math.isfinite(value))
        check(good, family, f"{what}.{scale}", value, "a number, or absent")
    rope.setdefault("truncate", True)
    check(is_a(rope["truncate"], "bool"), family, f"{what}.truncate", rope["truncate"], "true or false")
    rope["factor"] = float(rope["factor"])


def positive(value: Any) -> bool:
    return is_a(value, "int|float") and math.isfinite(value) and value > 0


def _check_shared(found: Mapping[str, Any], family: str) -> None:
    """What every family asks of its numbers."""
    at_least(found, 1, "vocab_size", "intermediate_size", "num_experts_per_tok", "num_key_value_heads")
    at_least(found, 1, "max_position_embeddings")
    experts = next(name for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in found)
    at_least(found, 1, experts)
    topk, heads = found["num_experts_per_tok"], found["num_attention_heads"]
    check(topk <= found[experts], family, "num_experts_per_tok", topk, f"{experts}={found[experts]} or less")
    groups = found["num_key_value_heads"]
    check(heads % groups == 0, family, "num_key_value_heads", groups, f"a divisor of num_attention_heads={heads}")
    spread = found["initializer_range"]
    check(spread >= 0, family, "initializer_range", spread, "0 or more")
    eps, pad, rows = found["rms_norm_eps"], found["pad_token_id"], found["vocab_size"]
    check(eps >= 0, family, "rms_norm_eps", eps, "0 or more")
    check(pad is None or -rows <= pad < rows, family, "pad_token_id", pad, f"in a vocabulary of {rows}")


def require(found: Mapping[str, Any], **expected: Any) -> None:
    """Refuse settings that Megatron has no counterpart of.

    Raises:
        CheckpointError: naming the setting, its value and what can be converted.
    """
    for name, value in expected.items():
        allowed = value if isinstance(value, tuple) else (value,)
        check(found[name] in allowed, found["model_type"], name, found[name], alternatives(allowed))


def alternatives(values: Iterable[Any]) -> str:
    return " or ".join(map(repr, values)) + ": Megatron has no counterpart of another here"

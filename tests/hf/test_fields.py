"""What a config.json means, against transformers' own configuration classes: types, defaults, rotary parameters."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.families.fields import ALIASES, FIELDS, GPT_OSS_ROPE, THETA, is_a, resolve
from tests.hf import fuzz

PROBES: tuple[Any, ...] = (2, 0.5, True, "silu", None, [2], ["full_attention"], [0.5], {}, {"rope_type": "default"})


@pytest.mark.parametrize("family", FIELDS)
def test_every_default_is_that_of_transformers(family: str) -> None:
    """The table is exactly the class's own fields: a field that a new transformers adds fails here."""
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = [field for field in dataclasses.fields(CONFIG_MAPPING[family]) if field.name not in base]
    assert {field.name: field.default for field in own} == {name: value for name, (_, value) in FIELDS[family].items()}
    assert CONFIG_MAPPING[family].default_theta == THETA[family]


@pytest.mark.parametrize("family", FIELDS)
def test_every_type_is_that_of_transformers(family: str) -> None:
    for name, (kinds, _) in FIELDS[family].items():
        if name == "rope_parameters":
            continue
        for probe in PROBES:
            try:
                CONFIG_MAPPING[family](**{name: probe})
                taken = True
            except Exception as error:
                taken = "expected" not in str(error) and "match any type" not in str(error)
            assert is_a(probe, kinds) == taken, (name, probe, kinds)


def test_the_rotary_parameters_of_a_gpt_oss_file_without_any() -> None:
    assert transformers.GptOssConfig().rope_parameters == {**GPT_OSS_ROPE, "rope_theta": THETA["gpt_oss"]}


def test_the_other_names_are_those_of_transformers() -> None:
    for family, names in ALIASES.items():
        for other, name in names.items():
            assert getattr(CONFIG_MAPPING[family](**{name: 3}), other) == 3
            assert getattr(CONFIG_MAPPING[family](**{other: 3}), name) == 3


@pytest.mark.parametrize("family", FIELDS)
def test_resolved_values_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Fields of random files: all fields, and the rotary parameters from wherever they stand."""
    rng = random.Random(f"resolve {family}")
    compared = scaled = 0
    transformers.logging.set_verbosity_error()
    while compared < 60 or scaled < 10:
        config = fuzz.draw(family, rng)
        try:
            found = resolve(config)
        except CheckpointError:
            continue
        (tmp_path / "config.json").write_text(json.dumps(config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = transformers.AutoConfig.from_pretrained(tmp_path)
        for name in FIELDS[family]:
            if name not in ("rope_parameters", "sliding_window", "mlp_only_layers", "layer_types", "head_dim"):
                assert found[name] == getattr(expected, name), (name, config)
        rope = {name: value for name, value in expected.rope_parameters.items() if value is not None}
        rope.pop("type", None)
        assert rope.items() <= found["rope"].items(), config
        compared += 1
        scaled += found["rope"]["rope_type"] == "yarn"


QWEN3 = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
DEEPSEEK = {"model_type": "deepseek_v3", "num_hidden_layers": 4, "n_routed_experts": 16, "num_experts_per_tok": 4}
DEEPSEEK |= {"n_group": 4, "topk_group": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
GPT_OSS = {"model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
MIXTRAL = {"model_type": "mixtral", "num_hidden_layers": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}

IMPOSSIBLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (QWEN3, {"rope_parameters": PLAIN, "rope_scaling": YARN}, "rope_type='yarn'"),
    (MIXTRAL, {"rope_parameters": PLAIN, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    (DEEPSEEK, {"num_experts_per_tok": 3}, "topk_group=2.*best 2"),
    (DEEPSEEK, {"n_group": 3}, "n_group=3.*divisor"),
    (DEEPSEEK, {"topk_group": 5}, "topk_group=5.*n_group=4 or less"),
    (DEEPSEEK, {"n_shared_experts": 0}, "n_shared_experts=0.*1 or more"),
    (DEEPSEEK, {"rope_parameters": {**YARN, "truncate": False}}, "truncate=False"),
    (DEEPSEEK, {"rope_parameters": {**YARN, "mscale_all_dim": 1.0}}, "mscale=None"),
    (DEEPSEEK, {"num_experts_per_tok": 1}, "norm_topk_prob=True.*false with num_experts_per_tok=1"),
    (QWEN3, {"num_experts_per_tok": 1}, "num_experts_per_tok=1.*2 or more"),
    (MIXTRAL, {"num_experts_per_tok": 1}, "num_experts_per_tok=1.*2 or more"),
    (GPT_OSS, {"num_experts_per_tok": 1}, "num_experts_per_tok=1.*2 or more"),
    (QWEN3, {"num_experts_per_tok": 5}, "num_experts_per_tok=5.*num_experts=4 or less"),
    (QWEN3, {"decoder_sparse_step": 0}, "decoder_sparse_step=0.*1 or more"),
    (QWEN3, {"mlp_only_layers": [0, 1]}, "mlp_only_layers"),
    (QWEN3, {"num_key_value_heads": None}, "num_key_value_heads=None.*int"),
    (QWEN3, {"num_key_value_heads": 5}, "num_key_value_heads=5.*divisor"),
    (QWEN3, {"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'.*float"),
    (QWEN3, {"hidden_size": "64"}, "hidden_size='64'.*int"),
    (QWEN3, {"rope_theta": "1e6"}, "rope_theta='1e6'.*positive number"),
    (QWEN3, {"num_local_experts": 8}, "num_local_experts=8.*num_experts=4"),
    (QWEN3, {"is_causal": False}, "is_causal=False"),
    (QWEN3, {"per_layer_config": {"0": {}}}, "per_layer_config"),
    (QWEN3, {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan.*finite"),
    (QWEN3, {"model_type": ["qwen3_moe"]}, "model_type="),
    (GPT_OSS, {"layer_types": ["full_attention"]}, "layer_types=.*list of 2"),
    (GPT_OSS, {"sliding_window": None}, "sliding_window=None.*1 or more"),
    (GPT_OSS, {"sliding_window": None, "layer_types": ["full_attention"] * 2}, "sliding_window=None.*1 or more"),
    (GPT_OSS, {"initializer_range": -1.0}, "initializer_range=-1.0.*0 or more"),
    (
        GPT_OSS,
        {"rope_parameters": {**YARN, "rope_theta": 1e4}, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "dynamic",
    ),
]


@pytest.mark.parametrize(("config", "change", "message"), IMPOSSIBLE)
def test_what_cannot_be_is_refused_by_name(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    architecture(config)
    with pytest.raises(CheckpointError, match=message):
        architecture({**config, **change})


def test_a_deepseek_file_without_groups_has_those_of_transformers() -> None:
    config = {name: value for name, value in DEEPSEEK.items() if "group" not in name} | {"num_experts_per_tok": 8}
    settings = architecture({**config, "n_routed_experts": 64}).settings
    assert (settings["moe_router_num_groups"], settings["moe_router_group_topk"]) == (8, 4)


def test_nulls_that_transformers_takes() -> None:
    assert architecture({**MIXTRAL, "head_dim": None}).settings["kv_channels"] == 128
    windowless = {**GPT_OSS, "layer_types": ["full_attention"] * 2}
    assert "window_size" not in architecture(windowless).settings

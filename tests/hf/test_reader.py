"""`model=checkpoint`: a run's model settings are those of the folder that it starts from."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import transformers
from omegaconf import OmegaConf

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.export import CARRIED, SOURCE
from megatron_vp2o.config.register import CHECKPOINT, register, resource_dir
from megatron_vp2o.config.schema import ModelConfig
from megatron_vp2o.config.store import save_config
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.hf.reader import read_models_of_checkpoints
from megatron_vp2o.hf.settings import OF_THE_CHECKPOINT
from tests.hf import models


@pytest.fixture(autouse=True)
def reader() -> Iterator[None]:
    read_models_of_checkpoints()
    yield
    OmegaConf.clear_resolver(CHECKPOINT)
    register.cache_clear()


def read(folder: Path, *overrides: str) -> ModelConfig:
    return compose("train", ["model=checkpoint", f"init_from={folder}", *overrides]).model


def drawn(seed: int) -> Any:
    """A configuration of a family that runs train, with every number drawn."""
    draw = Random(seed)
    groups = draw.choice([1, 2, 4])
    shape: dict[str, Any] = {
        "vocab_size": draw.randrange(100, 999),
        "hidden_size": 32 * draw.randint(1, 8),
        "num_hidden_layers": 2 * draw.randint(1, 9),
        "num_key_value_heads": groups,
        "num_attention_heads": groups * draw.randint(1, 4),
        "head_dim": 16 * draw.randint(1, 4),
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "num_local_experts": draw.randint(4, 12),
        "num_experts_per_tok": draw.randint(2, 4),
        "tie_word_embeddings": draw.random() < 0.5,
        "eos_token_id": None,
    }
    rope = {"rope_type": "default", "rope_theta": float(draw.randrange(1000, 10**6))}
    family = seed % 3
    if family == 0:
        own: dict[str, Any] = {"moe_intermediate_size": 16 * draw.randint(1, 9), "norm_topk_prob": draw.random() < 0.5}
        return transformers.Qwen3MoeConfig(**shape, **own, rope_parameters=rope)
    if family == 1:
        return transformers.MixtralConfig(**shape, intermediate_size=16 * draw.randint(1, 9), rope_parameters=rope)
    layers = shape["num_hidden_layers"]
    yarn = {
        **rope,
        "rope_type": "yarn",
        "factor": float(draw.randint(2, 40)),
        "beta_fast": float(draw.randint(20, 40)),
        "beta_slow": 1.5,
        "truncate": draw.random() < 0.5,
        "original_max_position_embeddings": draw.randrange(64, 4096),
    }
    own = {
        "intermediate_size": 16 * draw.randint(1, 9),
        "sliding_window": draw.randint(2, 64),
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
    }
    return transformers.GptOssConfig(**shape, **own, rope_parameters=yarn)


@pytest.mark.parametrize("seed", range(12))
def test_settings_are_those_that_transformers_reads(seed: int, tmp_path: Path) -> None:
    drawn(seed).save_pretrained(tmp_path)
    there = transformers.AutoConfig.from_pretrained(tmp_path)
    model = read(tmp_path, "model.recompute=true")
    width = {"qwen3_moe": "moe_intermediate_size", "mixtral": "intermediate_size", "gpt_oss": "intermediate_size"}
    assert model.num_layers == there.num_hidden_layers and model.hidden_size == there.hidden_size
    assert model.num_attention_heads == there.num_attention_heads
    assert model.num_query_groups == there.num_key_value_heads and model.kv_channels == there.head_dim
    assert model.vocab_size == there.vocab_size and model.layernorm_epsilon == there.rms_norm_eps
    assert model.num_moe_experts == there.num_local_experts and model.moe_router_topk == there.num_experts_per_tok
    assert model.moe_ffn_hidden_size == getattr(there, width[there.model_type])
    assert model.rotary_base == there.rope_parameters["rope_theta"]
    assert model.share_embeddings_and_output_weights == there.tie_word_embeddings
    assert model.qk_layernorm == (there.model_type == "qwen3_moe")
    if there.model_type == "qwen3_moe":
        assert model.moe_router_pre_softmax == (not there.norm_topk_prob)
    if there.model_type == "gpt_oss":
        rope = there.rope_parameters
        assert model.window_size == there.sliding_window - 1 and model.window_attn_skip_freq == 2
        assert model.softmax_type.value == "learnable" and model.activation_func.value == "quick_gelu"
        assert model.position_embedding_type.value == "yarn" and model.add_bias_linear
        assert model.yarn_rotary_scaling_factor == rope["factor"]
        assert (model.yarn_beta_fast, model.yarn_beta_slow) == (rope["beta_fast"], rope["beta_slow"])
        assert model.yarn_original_max_position_embeddings == rope["original_max_position_embeddings"]
        assert model.yarn_correction_range_round_to_int == rope["truncate"]
    assert model.recompute and model.max_sequence_length == 2048


@pytest.mark.parametrize("name", models.configs())
def test_every_family_is_read_or_refused(name: str, tmp_path: Path) -> None:
    models.configs()[name].save_pretrained(tmp_path)
    if name in ("qwen3_moe", "mixtral", "gpt_oss"):
        assert read(tmp_path).num_layers == models.LAYERS
        return
    with pytest.raises(ConfigError, match=r"runs train models of the .* can be converted and verified"):
        read(tmp_path)


def test_what_is_given_stays_as_it_is_given(tmp_path: Path) -> None:
    """It is compared with the checkpoint when the run starts (test_hf_runs)."""
    models.configs()["mixtral"].save_pretrained(tmp_path)
    assert read(tmp_path, "model.num_layers=9", "model.window_size=null").num_layers == 9


@pytest.mark.parametrize("place", [CARRIED, SOURCE])
def test_converted_checkpoints_and_runs_say_it_too(place: str, tmp_path: Path) -> None:
    models.configs()["gpt_oss"].save_pretrained(tmp_path / place)
    assert read(tmp_path).window_size == 7
    if place == SOURCE:
        (tmp_path / "checkpoints" / "step_3").mkdir(parents=True)
        assert read(tmp_path / "checkpoints" / "step_3").window_size == 7


def test_a_run_from_scratch_says_it_by_its_configuration(tmp_path: Path) -> None:
    first = compose("countdown_tiny_supervised", ["model.num_layers=7", "model.recompute=true", f"run_dir={tmp_path}"])
    save_config(first, tmp_path)
    model = read(tmp_path)
    assert model.num_layers == 7 and not model.recompute
    assert (
        dataclasses.replace(model, recompute=True, max_sequence_length=first.model.max_sequence_length) == first.model
    )


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist: run what makes it first"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json that tells its model"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
        (lambda folder: change(folder, model_type="llama"), "model_type='llama'"),
        (lambda folder: change(folder, hidden_size="wide"), "hidden_size"),
        (lambda folder: change(folder, num_experts_per_tok=None), "num_experts_per_tok"),
        (lambda folder: change(folder, quantization_config={"quant_method": "fp8"}), "quantised"),
    ],
)
def test_bad_folders_are_one_clear_error(damage: Any, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    models.configs()["qwen3_moe"].save_pretrained(folder)
    damage(folder)
    with pytest.raises(ConfigError) as caught:
        read(folder)
    assert said in str(caught.value) and "model=checkpoint" in str(caught.value) and "\n" not in str(caught.value)


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def test_it_needs_a_checkpoint() -> None:
    with pytest.raises(ConfigError, match="init_from is null: name the checkpoint's folder"):
        compose("train", ["model=checkpoint"])


def test_without_a_reader_it_says_what_to_call() -> None:
    OmegaConf.clear_resolver(CHECKPOINT)
    register.cache_clear()
    with pytest.raises(ConfigError, match="read_models_of_checkpoints"):
        compose("train", ["model=checkpoint", "init_from=somewhere"])


def test_the_choice_has_all_that_a_checkpoint_decides() -> None:
    lines = (resource_dir("conf") / "model" / "checkpoint.yaml").read_text().splitlines()
    said = [line for line in lines if "${" in line]
    assert said == [f"{name}: ${{checkpoint:{name},${{init_from}}}}" for name in OF_THE_CHECKPOINT]
    assert set(OF_THE_CHECKPOINT) <= {field.name for field in dataclasses.fields(ModelConfig)}

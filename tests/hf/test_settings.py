"""A run's model settings and config.json say the same of a model."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest

from megatron_vp2o.config.schema import ModelConfig, Precision, RouterScore
from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.plan import make_plan
from megatron_vp2o.hf.settings import hf_config, manifest_model, run_settings


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (ModelConfig(), "qwen3_moe"),
        (ModelConfig(moe_router_pre_softmax=True, share_embeddings_and_output_weights=True), "qwen3_moe"),
        (ModelConfig(qk_layernorm=False, rotary_base=5e5, precision=Precision.bf16), "mixtral"),
    ],
)
def test_settings_survive_the_way_there_and_back(model: ModelConfig, kind: str) -> None:
    config = hf_config(model, 104, eos_id=1, pad_id=0)
    assert config["model_type"] == kind and config["eos_token_id"] == 1
    back = run_settings(architecture(config))
    for name, value in back.items():
        own = getattr(model, name)
        if name != "vocab_size":
            assert value == (own.value if isinstance(own, Enum) else own), name
    assert manifest_model(architecture(config)) == back
    assert back["vocab_size"] == 104


@pytest.mark.parametrize(
    "change",
    [
        {"moe_shared_expert_intermediate_size": 32},
        {"moe_router_score_function": RouterScore.sigmoid},
        {"add_bias_linear": True},
        {"window_size": 8},
        {"qk_layernorm": False, "moe_router_pre_softmax": True},
    ],
)
def test_a_model_without_a_family_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="no Hugging Face family"):
        hf_config(ModelConfig(**change), 104, eos_id=None, pad_id=None)


def test_another_vocabulary_is_refused() -> None:
    model = architecture(hf_config(ModelConfig(), 104, eos_id=1, pad_id=0))
    with pytest.raises(CheckpointError, match=r"64 rows.*vocab_size=104"):
        make_plan(model, padded_vocab=64)

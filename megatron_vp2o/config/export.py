"""What a run can be exported as, known before it starts: the Hugging Face model that it started from, else a Qwen3-MoE or a
Mixtral."""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vp2o.config.schema import ModelConfig, RouterScore, TrainConfig

SOURCE = "source"
"""Folder in a run's folder: what the Hugging Face checkpoint that it started from has beside its weights."""
CARRIED = "hf"
"""Folder in a converted Megatron checkpoint: the same, and the headers of its weight files."""
PLAIN: dict[str, Any] = {
    "add_bias_linear": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "softmax_type": "vanilla",
    "window_size": None,
    "position_embedding_type": "rope",
}
"""Settings of a model with the values that Qwen3-MoE and Mixtral have."""


def hf_source(start: Path) -> Path | None:
    """The folder with the config.json that a start (`init_from`) carries: a Hugging Face checkpoint's own, a converted
    checkpoint's, a run's, or that of a run's checkpoint. None where there is none."""
    places = (start, start / CARRIED, start / SOURCE, start.parent.parent / SOURCE)
    return next((place for place in places if os.path.isfile(place / "config.json")), None)


def is_hf(start: Path) -> bool:
    """Whether this is a Hugging Face checkpoint, and not one of Megatron's."""
    return os.path.isfile(start / "config.json") and not os.path.exists(start / ".metadata")


def without_family(model: ModelConfig) -> list[str]:
    """The settings for which neither a Qwen3-MoE nor a Mixtral is this model."""
    other = {
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size is not None,
        "moe_router_score_function": model.moe_router_score_function is not RouterScore.softmax,
        "moe_router_enable_expert_bias": model.moe_router_enable_expert_bias,
        **{name: plain(getattr(model, name)) != value for name, value in PLAIN.items()},
        "moe_router_pre_softmax (without qk_layernorm)": model.moe_router_pre_softmax and not model.qk_layernorm,
    }
    return [f"model.{name}" for name, wrong in other.items() if wrong]


def export_problems(config: TrainConfig) -> Iterator[str]:
    """Why `checkpoint.export_hf` will be refused at the end of the run."""
    if not config.checkpoint.export_hf or not (names := without_family(config.model)):
        return
    if os.path.isfile(Path(config.run_dir) / SOURCE / "config.json"):
        return
    if config.init_from is None or (os.path.exists(config.init_from) and hf_source(Path(config.init_from)) is None):
        yield (
            f"checkpoint.export_hf=true: no Hugging Face family has this model ({', '.join(names)}): train a Qwen3-MoE or "
            "Mixtral shape, start from a Hugging Face checkpoint (init_from), or set it to false"
        )


def plain(value: Any) -> Any:
    """A setting as it stands in a manifest."""
    return value.value if isinstance(value, enum.Enum) else list(value) if isinstance(value, tuple) else value

"""The model families that can be converted: one module each, found by the `model_type` of config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.families import deepseek_v3, gpt_oss, mixtral, olmoe, qwen3_moe
from megatron_vp2o.hf.families.fields import resolve
from megatron_vp2o.hf.mapping import Architecture

FAMILIES: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {
    "qwen3_moe": qwen3_moe.architecture,
    "mixtral": mixtral.architecture,
    "olmoe": olmoe.architecture,
    "deepseek_v3": deepseek_v3.architecture,
    "gpt_oss": gpt_oss.architecture,
}
"""model_type -> what makes a model of a configuration that `fields.resolve` returned."""


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The model that a config.json describes.

    Raises:
        CheckpointError: its family, or a setting of it, cannot be represented here; the reason is in the message.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"config.json has model_type={kind!r}, and {', '.join(FAMILIES)} can be converted: "
            "add a module to megatron_vp2o/hf/families for another"
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise CheckpointError(
            f"the checkpoint is quantised ({method}): its numbers are not the weights. Dequantise it first, e.g. load it "
            "with transformers as bfloat16 and save_pretrained it"
        )
    return FAMILIES[kind](resolve(config))

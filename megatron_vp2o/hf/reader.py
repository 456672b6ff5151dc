"""`model=checkpoint`: the settings of a run's model are those of the checkpoint that it starts from.

conf/model/checkpoint.yaml writes each as `${checkpoint:NAME,${init_from}}`, which OmegaConf asks `_setting` for when the
configuration is composed: before it is validated, and only for those that the recipe or the command line does not give
otherwise. Nothing heavy is imported before such a setting is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from megatron_vp2o.config.register import CHECKPOINT
from megatron_vp2o.config.schema import ModelConfig
from megatron_vp2o.errors import UserError


def read_models_of_checkpoints() -> None:
    """Let configurations say `model=checkpoint` in this process."""
    OmegaConf.register_new_resolver(CHECKPOINT, _setting, replace=True)


def _setting(name: str, init_from: str | None) -> Any:
    if init_from is None:
        raise InterpolationResolutionError(
            "model=checkpoint takes the model's settings from the checkpoint that the run starts from, and init_from is null: "
            "name the checkpoint's folder, or choose another model"
        )
    try:
        return _settings(init_from)[name]
    except UserError as error:
        raise InterpolationResolutionError(f"model=checkpoint: {error}") from error


def _settings(init_from: str) -> Mapping[str, Any]:
    from megatron_vp2o.config.export import plain
    from megatron_vp2o.hf.settings import model_settings  # imports torch

    default = ModelConfig()
    return {name: plain(getattr(default, name)) for name in vars(default)} | model_settings(Path(init_from))

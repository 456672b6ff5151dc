"""From a recipe's name and overrides to a TrainConfig, without the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import hydra
from omegaconf import DictConfig, OmegaConf

from megatron_vp2o.config.explain import CLASSES_OF_A_GROUP, COMPOSITION_ERRORS, explain, unknown_setting
from megatron_vp2o.config.register import register
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.config.written import as_written
from megatron_vp2o.errors import ConfigError


def compose(name: str = "train", overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> TrainConfig:
    """The configuration that `--config-name name overrides... [--config-dir config_dir]` gives, not yet validated.

    Raises ConfigError, in one line, for an unknown recipe, setting or choice, or a value of the wrong type.
    """
    register()
    folder = str(Path(config_dir).resolve()) if config_dir is not None else None
    context = (
        hydra.initialize(version_base="1.3", config_path=None)
        if folder is None
        else hydra.initialize_config_dir(version_base="1.3", config_dir=folder)
    )
    try:
        with context:
            return to_config(hydra.compose(config_name=name, overrides=as_written(overrides)))
    except ConfigError:
        raise
    except COMPOSITION_ERRORS as error:
        raise ConfigError(explain(error)) from error


def to_config(node: DictConfig) -> TrainConfig:
    """The composed config as plain dataclasses, interpolations resolved.

    Raises ConfigError for a setting that the dataclasses don't have (added with `+`) and for a config not built on
    `train`; OmegaConf's own errors for an interpolation that leads nowhere.
    """
    if OmegaConf.get_type(node) is not TrainConfig:
        raise ConfigError("this config is not built on `train`: begin it with `defaults: [train, _self_]`")
    _refuse_additions(node, "", {group: OmegaConf.get_type(node, group) for group in CLASSES_OF_A_GROUP})
    return cast(TrainConfig, OmegaConf.to_object(node))


def _refuse_additions(node: DictConfig, prefix: str, chosen: dict[str, type | None]) -> None:
    kind = OmegaConf.get_type(node)
    if kind is None or not dataclasses.is_dataclass(kind):
        return  # free-form: notes
    names = {field.name for field in dataclasses.fields(kind)}
    for key in map(str, node):
        if key not in names:
            raise ConfigError(unknown_setting(f"{prefix}{key}", chosen))
        if not OmegaConf.is_interpolation(node, key) and isinstance(node[key], DictConfig):
            _refuse_additions(node[key], f"{prefix}{key}.", chosen)

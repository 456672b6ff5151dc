"""The resolved configuration as it is kept with a run: `config.yaml` in the run folder."""

from __future__ import annotations

import dataclasses
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_vp2o import atomic
from megatron_vp2o.config.compose import to_config
from megatron_vp2o.config.explain import explain
from megatron_vp2o.config.names import CONFIG_FILE
from megatron_vp2o.config.register import GROUPS
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.errors import ConfigError

#: Distributions whose versions decide what a run computes.
DISTRIBUTIONS = (
    "megatron-vp2o",
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "reasoning-gym",
    "hydra-core",
)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the installed distributions that matter; None for one that is not installed."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{name: version(name) for name in DISTRIBUTIONS}}


def as_plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries of YAML's own types; enumerations by name."""
    plain = yaml.safe_load(OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True))
    return dict(plain)


def save_config(config: TrainConfig, run_dir: str | Path) -> Path:
    """Write `config.yaml` (`versions` and `config`) into `run_dir` atomically and return its path. One rank calls this."""
    content = {"versions": versions(), "config": as_plain(config)}
    return atomic.write_text(Path(run_dir) / CONFIG_FILE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _drop_other_tasks(section: dict[str, Any], task: type) -> None:
    """Configurations were stored with the settings of all tasks once; leave those of the run's own."""
    own = {field.name for field in dataclasses.fields(task)}
    others = {field.name for cls in GROUPS["task"].values() for field in dataclasses.fields(cls)} - own
    for name in others & set(section):
        del section[name]


def load_config(run_dir: str | Path) -> TrainConfig:
    """The configuration stored in `run_dir`.

    Raises ConfigError where there is none, or where it is not one that this version understands.
    """
    path = Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: {run_dir} holds no run")
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        plain = stored["config"]
        algorithm = GROUPS["algorithm"][plain["algorithm"]["name"]]
        task = GROUPS["task"][plain.get("task", {}).get("name", "countdown")]
        _drop_other_tasks(plain.get("task", {}), task)
        node = OmegaConf.merge(OmegaConf.structured(TrainConfig(algorithm=algorithm(), task=task())), plain)
        return to_config(cast(DictConfig, node))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the stored configuration of a run ({type(error).__name__}: {error})"
        ) from error

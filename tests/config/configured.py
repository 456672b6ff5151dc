"""Configurations with some settings changed, and what is wrong with them."""

import pytest

from megatron_vp2o.config.schema import (
    CountdownTaskConfig,
    GRPOConfig,
    ShortestPathTaskConfig,
    SupervisedConfig,
    TrainConfig,
    VP2OConfig,
)
from megatron_vp2o.config.validate import validate
from megatron_vp2o.errors import ConfigError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


SHORTEST_PATH = {"task.rows", "task.columns", "task.blocked_probability"}


def configured(settings: dict, supervised: bool = False, vp2o: bool = False) -> TrainConfig:
    algorithm = VP2OConfig() if vp2o else SupervisedConfig() if supervised else GRPOConfig()
    task = ShortestPathTaskConfig() if settings.keys() & SHORTEST_PATH else CountdownTaskConfig()
    config = TrainConfig(algorithm=algorithm, task=task, run_dir="runs/run")
    for name, value in settings.items():
        *path, leaf = name.split(".")
        section = config
        for part in path:
            section = getattr(section, part)
        assert hasattr(section, leaf), name
        setattr(section, leaf, value)
    return config


def problems(config: TrainConfig, world_size: int = 1, **context) -> list[str]:
    try:
        validate(config, world_size, **context)
    except ConfigError as error:
        return str(error).split("\n")
    return []

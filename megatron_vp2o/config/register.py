"""What Hydra needs to know of us: the dataclasses in its ConfigStore, and where `conf/` and `recipes/` lie."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, OmegaConf

from megatron_vp2o.config import schema
from megatron_vp2o.config.rows import RowsTaskConfig

# group -> choice -> dataclass. These choices are the dataclasses as they stand; conf/GROUP/*.yaml are deltas on them.
GROUPS: dict[str, dict[str, Any]] = {
    "algorithm": {"supervised": schema.SupervisedConfig, "grpo": schema.GRPOConfig, "vp2o": schema.VP2OConfig},
    "model": {"tiny": schema.ModelConfig},
    "parallel": {"single": schema.ParallelConfig},
    "optimizer": {"adamw": schema.OptimizerConfig},
    "task": {
        "countdown": schema.CountdownTaskConfig,
        "shortest_path": schema.ShortestPathTaskConfig,
        "rows": RowsTaskConfig,
    },
    "rollout": {"in_process": schema.RolloutConfig},
    "evaluation": {"standard": schema.EvaluationConfig},
    "checkpoint": {"standard": schema.CheckpointConfig},
    "logging": {"local": schema.LoggingConfig},
}


def resource_dir(kind: Literal["conf", "recipes"]) -> Path:
    """The folder of the shipped YAML files: inside the package (installed from a wheel) or beside it (a checkout).

    Raises FileNotFoundError when neither is there (a wheel built without its data files).
    """
    package = Path(__file__).resolve().parents[1]
    # The packaged place first: a wheel's neighbour `site-packages/conf` would be somebody else's.
    for folder in (package / f"_{kind}", package.parent / kind):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{kind}/ is neither in {package} nor beside it: reinstall megatron_vp2o")


def recipe_names() -> list[str]:
    """Names that `--config-name` takes, without `train` itself."""
    return sorted(path.stem for path in resource_dir("recipes").glob("*.yaml"))


class ResourceSearchPath(SearchPathPlugin):
    """Puts `recipes/` and `conf/` on Hydra's search path, so that a recipe is found by its name alone."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for kind in ("recipes", "conf"):
            search_path.append(provider="megatron_vp2o", path=f"file://{resource_dir(kind)}")


@cache
def register() -> None:
    """Tell Hydra of the dataclasses, the folders, and the list of recipes that `--help` prints. Done once a process."""
    store = ConfigStore.instance()
    # Missing, because Hydra cannot merge one subclass of AlgorithmConfig or of TaskConfig over another.
    store.store(name="schema", node=schema.TrainConfig(algorithm=MISSING, task=MISSING))
    for group, choices in GROUPS.items():
        for name, node in choices.items():
            store.store(group=group, name=name, node=node)
    Plugins.instance().register(ResourceSearchPath)
    OmegaConf.register_new_resolver(
        "vp2o_recipes", lambda: "\n".join(f"  {name}" for name in recipe_names()), replace=True
    )

"""What Hydra needs to know of us: the dataclasses in its ConfigStore, and where `conf/` and `recipes/` lie."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from megatron_vp2o.config import schema
from megatron_vp2o.config.rows import RowsTaskConfig
from megatron_vp2o.config.written import WrittenFiles

#: Folder in recipes/ of those that nobody has run: for hardware that we did not have.
PLANNED = "planned"

#: The resolver behind `model=checkpoint` (conf/model/checkpoint.yaml), which hf/reader.py puts in its place.
CHECKPOINT = "checkpoint"

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
        "own": schema.OwnTaskConfig,
        "addends": schema.AddendsTaskConfig,
        "coloring": schema.ColoringTaskConfig,
        "open_path": schema.OpenPathTaskConfig,
        "linear_order": schema.LinearOrderTaskConfig,
        "brackets": schema.BracketsTaskConfig,
        "change": schema.ChangeTaskConfig,
    },
    "reward": {"task": schema.RewardConfig},
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


def recipe_files() -> dict[str, Path]:
    """Files of the recipes by the names that `--config-name` takes, without `train` itself; the planned ones come last."""
    return {path.stem: path for folder in _recipe_folders() for path in sorted(folder.glob("*.yaml"))}


def recipe_names() -> list[str]:
    """Names of all recipes; the planned ones, which nobody has run yet, come last."""
    return list(recipe_files())


def recipe_list() -> str:
    """The recipes for a help text: first what has been run."""
    ready = [f"  {name}" for name, path in recipe_files().items() if path.parent.name != PLANNED]
    planned = [f"  {name}" for name, path in recipe_files().items() if path.parent.name == PLANNED]
    return "\n".join([*ready, "", "Recipes for large models on GPUs: planned, never run", *planned])


def _recipe_folders() -> list[Path]:
    return [resource_dir("recipes"), resource_dir("recipes") / PLANNED]


def group_choices(group: str) -> list[str]:
    """What `GROUP=` takes: the dataclasses, and the shipped files of conf/GROUP."""
    return sorted({*GROUPS[group], *(path.stem for path in (resource_dir("conf") / group).glob("*.yaml"))})


def _group_list() -> str:
    return "\n".join(f"  {group}: {', '.join(group_choices(group))}" for group in GROUPS)


class ResourceSearchPath(SearchPathPlugin):
    """Puts `recipes/` and `conf/` on Hydra's search path, so that a recipe is found by its name alone."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in (*_recipe_folders(), resource_dir("conf")):
            search_path.append(provider="megatron_vp2o", path=f"file://{folder}")


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
    SourcesRegistry.instance().types["file"] = WrittenFiles
    OmegaConf.register_new_resolver("vp2o_recipes", recipe_list, replace=True)
    OmegaConf.register_new_resolver("vp2o_groups", _group_list, replace=True)
    if not OmegaConf.has_resolver(CHECKPOINT):
        OmegaConf.register_new_resolver(CHECKPOINT, _no_reader)


def _no_reader(name: str, init_from: str | None) -> Any:
    raise InterpolationResolutionError(
        "model=checkpoint needs a program that reads checkpoints: call megatron_vp2o.hf.reader.read_models_of_checkpoints() "
        "before composing a configuration"
    )

"""From the launcher's command line to its settings, and to what is left for the runs."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import hydra
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from megatron_vp2o.config.explain import COMPOSITION_ERRORS, explain
from megatron_vp2o.config.register import register as register_runs
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.launch.settings import ExecutorSettings, LaunchSettings, register

AUTO = "auto"
_OURS = re.compile(r"^[+~]*(executor|seeds|stages)(?=[.=@]|$)([^=]*)")
_OPEN = re.compile(r"^executor\.(environment|sbatch_args)[.=]")  # their keys are the user's
_OF_ONE_STAGE = re.compile(r"^([\w-]+):([^=]+=.*)$", re.DOTALL)


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        recipe: of `--config-name`; None where `stages` lists them.
        config_dir: of `--config-dir`, absolute.
        overrides: of every run.
        stage_overrides: further ones, by the recipe they are for (`RECIPE:KEY=VALUE`).
    """

    settings: LaunchSettings
    recipe: str | None
    config_dir: Path | None = None
    overrides: tuple[str, ...] = ()
    stage_overrides: dict[str, list[str]] = field(default_factory=dict)

    @property
    def executor(self) -> ExecutorSettings:
        return self.settings.executor

    @property
    def stages(self) -> list[str] | None:
        """The stages that were listed; None for `auto` or none."""
        stages = self.settings.stages
        return None if stages is None or stages == AUTO else stages


def read(recipe: str | None, config_dir: str | None, overrides: Sequence[str]) -> Request:
    """The request that these arguments make.

    Raises:
        ConfigError: in one line, for settings that there are not, and for lists that make no sense.
    """
    folder = None
    if config_dir is not None:
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {config_dir} is not a folder")
    ours: list[str] = []
    rest: list[str] = []
    of_stages: dict[str, list[str]] = {}
    for override in overrides:
        if _OURS.match(override):
            ours.append(override)
        elif of_one := _OF_ONE_STAGE.match(override):
            of_stages.setdefault(of_one[1], []).append(of_one[2])
        elif "=" in override or override.startswith("~"):
            rest.append(override)
        else:
            raise ConfigError(f"cannot read {override!r}: write KEY=VALUE, and the recipe as --config-name {override}")
    settings = _compose(ours, folder)
    stages = settings.stages
    if stages is not None and stages != AUTO and not _are_stages(stages):
        raise ConfigError(f"stages={stages} must be {AUTO} or a list of recipes and shell commands, [warmup,reinforce]")
    if len(set(settings.seeds)) < len(settings.seeds) or any(seed < 0 for seed in settings.seeds):
        raise ConfigError(f"seeds={settings.seeds} must be different numbers that are at least 0")
    if recipe is None and not isinstance(stages, list):
        raise ConfigError("name a recipe with --config-name, or several with stages=[...]; --help lists them")
    if recipe is not None and isinstance(stages, list):
        raise ConfigError(f"--config-name {recipe} and stages={stages}: give one of them")
    return Request(settings, recipe, folder, tuple(rest), of_stages)


def _are_stages(stages: object) -> bool:
    return isinstance(stages, list) and bool(stages) and all(isinstance(stage, str) and stage for stage in stages)


def _compose(overrides: Sequence[str], folder: Path | None) -> LaunchSettings:
    register_runs()
    register()
    context = (
        hydra.initialize(version_base="1.3", config_path=None)
        if folder is None
        else hydra.initialize_config_dir(version_base="1.3", config_dir=str(folder))
    )
    chosen = [override for override in overrides if override.startswith("executor=")]
    try:
        with context:
            # The choice alone first: then the names of its settings are known, and a wrong one can be told.
            first = cast(LaunchSettings, OmegaConf.to_object(hydra.compose("launch", overrides=chosen)))
            known = [found.name for found in dataclasses.fields(first.executor)]
            for override in overrides:
                _refuse_unknown(override, known, chosen[-1] if chosen else "executor=local")
            forced = [f"++{override}" if _OPEN.match(override) else override for override in overrides]
            return cast(LaunchSettings, OmegaConf.to_object(hydra.compose("launch", overrides=forced)))
    except ConfigError:
        raise
    except MissingConfigException as error:
        choices = [choice for choice in error.options or [] if not choice.endswith("_settings")]
        raise ConfigError(f"{chosen[-1]}: there is no such executor; there are: {', '.join(choices)}") from error
    except COMPOSITION_ERRORS as error:
        raise ConfigError(explain(error)) from error


def _refuse_unknown(override: str, known: list[str], executor: str) -> None:
    match = _OURS.match(override)
    assert match is not None
    if not match[2].startswith("."):
        return
    name = match[2][1:].split(".")[0]
    if match[1] != "executor" or name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"did you mean 'executor.{near[0]}'?" if near else f"{executor} has: {', '.join(known)}"
        raise ConfigError(f"there is no setting {match[1] + match[2]!r}; {hint}")

"""Hydra's and OmegaConf's errors, said in one line: the setting, what is wrong with it, and the nearest right one."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_type_hints

import yaml
from hydra.errors import CompactHydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from megatron_vp2o.config import schema
from megatron_vp2o.config.register import GROUPS, recipe_names

#: What composing a configuration may raise; `explain` says each in one line.
#: (ValueError is what Hydra raises for a malformed defaults list.)
COMPOSITION_ERRORS = (CompactHydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)


#: Groups whose choices are different classes, with different settings.
CLASSES_OF_A_GROUP = ("algorithm", "task")


def setting_names(
    config_class: type = schema.TrainConfig,
    algorithm: type = schema.GRPOConfig,
    task: type = schema.CountdownTaskConfig,
) -> list[str]:
    """Dotted names of all settings of a run with `algorithm` and `task`, sections included ("model", "model.num_layers")."""
    chosen = {schema.AlgorithmConfig: algorithm, schema.TaskConfig: task}

    def walk(cls: type, prefix: str) -> Iterator[str]:
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            kind = chosen.get(hints[field.name], hints[field.name])
            yield prefix + field.name
            if dataclasses.is_dataclass(kind):
                yield from walk(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]

    return list(walk(config_class, ""))


def unknown_setting(key: str, chosen: Mapping[str, type | None] | None = None) -> str:
    """Says that `key` is no setting, and which one was probably meant.

    Args:
        chosen: the run's class of each of CLASSES_OF_A_GROUP, where it is known.
    """
    known: dict[str, list[type]] = {}
    for group in CLASSES_OF_A_GROUP:
        classes, own = GROUPS[group], (chosen or {}).get(group)
        for choice, cls in classes.items():
            if own in classes.values() and own is not cls and key in setting_names(**{group: cls}):
                return f"{key} is a setting of {group}={choice}, but this run has another {group}"
        known[group] = [own] if own is not None and own in classes.values() else list(classes.values())
    combinations = (dict(zip(known, classes, strict=True)) for classes in itertools.product(*known.values()))
    names = list(dict.fromkeys(name for classes in combinations for name in setting_names(**classes)))
    if key in names:  # a recipe with a dotted key: OmegaConf takes it for one name
        nested = "{".join(f"{part}: " for part in key.split(".")) + "..." + "}" * key.count(".")
        return f"{key!r} is no key of a recipe, where sections are nested: write `{nested}`"
    section, _, leaf = key.rpartition(".")
    siblings = [name for name in names if name.rpartition(".")[0] == section]
    own_names = {name.rpartition(".")[2]: name for name in siblings}
    everywhere = {name.rpartition(".")[2]: name for name in names}
    whole = {name: name for name in names} if not siblings else {}  # the section itself is misspelt
    for word, choices in ((leaf, own_names), (key, whole), (leaf, everywhere)):
        for found in difflib.get_close_matches(word, choices, n=1, cutoff=0.7):
            return f"there is no setting {key!r}; did you mean {choices[found]!r}?"
    listed = siblings or [name for name in names if "." not in name]
    return f"there is no setting {key!r}; there are: {', '.join(listed)}"


def _nearest(word: str, choices: Iterable[str]) -> str:
    choices = list(choices)
    found = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else f"; there are: {', '.join(choices)}"


def explain(error: BaseException) -> str:
    """One line for one of COMPOSITION_ERRORS."""
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if isinstance(error, OverrideParseException):
        reason = re.sub(rf"Error parsing override '{re.escape(str(error.override))}'", "", error.message)
        return (
            f"cannot read the override {error.override!r} ({_line(reason)}): write KEY=VALUE, and quote what is special"
        )
    if isinstance(error, yaml.YAMLError):
        return f"cannot read a YAML file: {_line(str(error))}"
    cause: BaseException = error
    while (
        not isinstance(cause, OmegaConfBaseException) and (deeper := cause.__cause__ or cause.__context__) is not None
    ):
        cause = deeper
    if not isinstance(cause, OmegaConfBaseException):
        message = _line(str(error))
        found = re.search(r"Could not override '([^']+)'\. No match in the defaults list", message)
        return f"there is no group {found[1]!r}" + _nearest(found[1], GROUPS) if found else message
    found = re.match(r"In '([^']+)'", str(error))
    where = f"in {found[1]}.yaml: " if found else ""
    key = cause.full_key or ""
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and key:
        asked = re.match(r"Could not override '([^']+)'", str(error))  # OmegaConf names only the part it stumbled at
        key = asked[1] if asked and asked[1].startswith(f"{key}.") else key
        return where + unknown_setting(key, _chosen(cause.object_type))
    reason = _line(str(cause.msg or cause).split("full_key:")[0])
    return f"{where}{key}: {reason}" if key else f"{where}{reason}"


def _missing(error: MissingConfigException) -> str:
    name = str(error.missing_cfg_file)
    group, _, choice = name.rpartition("/")
    if group in GROUPS and error.options is not None:
        return f"{group}={choice}: there is no such choice" + _nearest(choice, error.options)
    if "primary config" in str(error):
        return f"--config-name {name}: there is no such recipe" + _nearest(name, [*recipe_names(), "train"])
    return _line(str(error).split("Config search path")[0])


def _chosen(object_type: Any) -> dict[str, type | None]:
    """Which group's class the section is that an error came from; nothing is known of the others."""
    return {group: object_type for group in CLASSES_OF_A_GROUP if object_type in GROUPS[group].values()}


def _line(text: str) -> str:
    kept = (line.strip() for line in text.splitlines() if "https://hydra.cc" not in line)
    return re.sub(r"\s+", " ", " ".join(kept)).strip()

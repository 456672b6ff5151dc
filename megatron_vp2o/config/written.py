"""What a person wrote, before Hydra and OmegaConf have read it as something else.

They read `name=2026_11_26` as the number 20261126, take 7 for true and "1e-3" for a number. Here texts stay as they were
written, and a value of another kind than its setting's is refused, in overrides and in YAML files alike.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from megatron_vp2o.config import schema
from megatron_vp2o.errors import ConfigError

_TAGS = {"bool": bool, "int": int, "float": float, "null": type(None)}
_NUMBERS = (int, float)


@cache
def _kinds() -> Mapping[str, set[type]]:
    """Types that each setting may have, over all classes of the schema, by dotted name."""
    found: dict[str, set[type]] = {}

    def walk(cls: type, prefix: str) -> None:
        for name, hint in get_type_hints(cls).items():
            key = f"{prefix}{name}"
            found.setdefault(key, set()).update(_types(hint))
            for section in (hint, *_subclasses(hint)):
                if dataclasses.is_dataclass(section):
                    walk(section, f"{key}.")  # type: ignore[arg-type]

    walk(schema.TrainConfig, "")
    return found


def _types(hint: Any) -> set[type]:
    if get_origin(hint) in (Union, types.UnionType):
        return set().union(*(_types(part) for part in get_args(hint)))
    return {get_origin(hint) or hint}


def _subclasses(hint: Any) -> Iterator[type]:
    for cls in hint.__subclasses__() if isinstance(hint, type) and dataclasses.is_dataclass(hint) else ():
        yield cls
        yield from _subclasses(cls)


def _problem(key: str, value: Any, quoted: bool) -> str:
    """What is wrong with a value of this kind for this setting; empty where nothing is, or Hydra will say it."""
    allowed = _kinds().get(key, set())
    if bool in allowed and type(value) in _NUMBERS:
        return f"{key}={value} must be true or false"
    if float in allowed and type(value) is int and abs(value) > sys.float_info.max:
        return f"{key}={str(value)[:20]}... has {len(str(abs(value)))} digits and is no number that a computer's floats hold"
    if quoted and allowed & {bool, *_NUMBERS} and str not in allowed:
        kind = "true or false" if bool in allowed else "a number"
        return f"{key}={value!r} is text, because of its quotes, and must be {kind}: write it without quotes"
    return ""


def is_text(key: str) -> bool:
    """Whether this setting is a text, or null."""
    return str in _kinds().get(key, set())


def as_written(overrides: Sequence[str]) -> list[str]:
    """The overrides, with quotes around what a text setting is set to where Hydra would read a number or a truth value.

    What cannot be parsed stays as it is: Hydra says what is wrong with it.

    Raises:
        ConfigError: a number for a switch, or a quoted text for a number.
    """
    out = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            out.append(text)
            continue
        _refuse_kinds(override.key_or_group, override._value)
        out.append(_quoted(text, override) if is_text(override.key_or_group) else text)
    return out


def is_swept(override: str) -> bool:
    """Whether `--multirun` makes a run of each of several values."""
    try:
        return OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        return False


def without_quotes(override: str) -> str:
    """The override, its value as it is without the quotes around it."""
    try:
        value: Any = OverridesParser.create().parse_override(override)._value
    except HydraException:
        return override
    return f"{override.partition('=')[0]}={value.text}" if isinstance(value, QuotedString) else override


def _refuse_kinds(key: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_kinds(f"{key}.{name}", inner)
        return
    for one in value.list if isinstance(value, ChoiceSweep) else [value]:
        text = one.text if isinstance(one, QuotedString) else one
        if problem := _problem(key, text, isinstance(one, QuotedString)):
            raise ConfigError(problem)


def _quoted(text: str, override: Override) -> str:
    before, _, raw = text.partition("=")
    value: Any = override._value
    values, raws = [value], [raw]
    if isinstance(value, ChoiceSweep):
        values, raws = value.list, raw.split(",")
        if not value.simple_form or len(values) != len(raws):
            return text
    if not any(isinstance(one, bool | int | float) for one in values):
        return text
    parts = (f"'{r.strip()}'" if isinstance(v, bool | int | float) else r for v, r in zip(values, raws, strict=True))
    return f"{before}={','.join(parts)}"


class WrittenFiles(FileConfigSource):
    """Hydra's source of YAML files, for which a text setting is what the file says."""

    def load_config(self, config_path: str) -> ConfigResult:
        """See the class. Raises ConfigError for a value of another kind than its setting's."""
        result = super().load_config(config_path)
        if result.header.get("package"):
            return result  # it says itself where its settings go
        file = Path(self.path, self._normalize_file_name(config_path))
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=get_yaml_loader())
        group = str(Path(config_path).parent)
        prefix = "" if group == "." else group.replace("/", ".") + "."
        for key, node in _scalars(root, ""):
            setting = f"{prefix}{key}"
            kind = _TAGS.get(node.tag.rpartition(":")[2], str)
            if problem := _file_problem(setting, node, kind):
                raise ConfigError(f"in {file.name}: {problem}")
            if is_text(setting) and kind not in (str, type(None)):
                OmegaConf.update(result.config, key, node.value)
        return result


def _file_problem(setting: str, node: yaml.ScalarNode, kind: type) -> str:
    if kind in _NUMBERS and bool in _kinds().get(setting, set()):
        return f"{setting}: {node.value} must be true or false"
    if kind is int and node.value.lstrip("+-").isdigit():
        return _problem(setting, int(node.value), False)
    return _problem(setting, node.value, kind is str and node.style in ("'", '"'))


def _scalars(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Dotted keys and values of a file, the defaults list left out."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or (not prefix and key.value == "defaults"):
            continue
        if isinstance(value, yaml.ScalarNode):
            yield f"{prefix}{key.value}", value
        else:
            yield from _scalars(value, f"{prefix}{key.value}.")

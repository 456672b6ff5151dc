"""Settings of a plug-in, as the host's own configuration has them: a tree under `vp2o`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_vp2o.config.ranges import range_problems
from megatron_vp2o.config.schema import SpecializationConfig, SteinConfig
from megatron_vp2o.core.choices import OrthogonalityScale
from megatron_vp2o.errors import ConfigError


@dataclass
class PluginConfig:
    """What a plug-in does. By default nothing: then it leaves the host's run as it is, to the bit."""

    stein: SteinConfig = field(default_factory=SteinConfig)
    """`enabled` transforms expert gradients; `monitor` alone computes and logs the diagnostics."""
    specialization: SpecializationConfig = field(default_factory=SpecializationConfig)
    """Losses that are added to the host's."""

    @property
    def observes(self) -> bool:
        """Whether routing statistics are wanted."""
        return self.stein.enabled or self.stein.monitor

    @property
    def active(self) -> bool:
        """Whether the plug-in does anything."""
        return self.observes or self.specialises

    @property
    def specialises(self) -> bool:
        """Whether a specialisation loss is on."""
        return self.specialization.orthogonality_coef > 0 or self.specialization.variance_coef > 0


def read_settings(given: Mapping[str, Any] | Sequence[str] | None, where: str) -> PluginConfig:
    """The settings in a host's configuration.

    Args:
        given: a tree such as `{"stein": {"enabled": True}}`, or lines such as "stein.enabled=true"; None for the defaults.
        where: how the host's user writes the tree, for messages.

    Raises:
        ConfigError: for a name, type, value or combination that cannot work; quotes it.
    """
    plain: Any = OmegaConf.to_container(given, resolve=True) if OmegaConf.is_config(given) else given
    if isinstance(plain, (str, bytes)) or not isinstance(plain, (Mapping, Sequence, type(None))):
        raise ConfigError(f"{where}={plain!r}: write a tree of settings, such as {where}.stein.enabled=true")
    try:
        tree = (
            OmegaConf.create(dict(plain)) if isinstance(plain, Mapping) else OmegaConf.from_dotlist(list(plain or ()))
        )
        _refuse_unknown(OmegaConf.to_container(tree), PluginConfig, where)
        merged = OmegaConf.merge(OmegaConf.structured(PluginConfig), tree)
        config = cast(PluginConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = f"{where}.{error.full_key}" if getattr(error, "full_key", None) else where
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None
    problems = list(range_problems(config, f"{where}."))
    stein = config.stein
    if config.observes and (stein.neighbours is None) == (stein.coactivation_threshold is None):
        problems.append(
            f"{where}.stein.neighbours={stein.neighbours} and "
            f"{where}.stein.coactivation_threshold={stein.coactivation_threshold}: set exactly one of them, and the other to null"
        )
    losses = config.specialization
    relative = losses.orthogonality_scale is OrthogonalityScale.relative
    if losses.orthogonality_coef > 0 and relative and not config.observes:
        problems.append(
            f"{where}.specialization.orthogonality_scale=relative needs {where}.stein.monitor=true (or enabled=true), which finds "
            "the loss's first value after the first step: set it, or orthogonality_scale=absolute"
        )
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def _refuse_unknown(tree: Any, kind: type, where: str) -> None:
    known: dict[str, Any] = {entry.name: entry.type for entry in fields(kind)}
    groups = {"stein": SteinConfig, "specialization": SpecializationConfig}
    for key, value in tree.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise ConfigError(f"{where}.{key}: no such setting; {hint}")
        if kind is PluginConfig:
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{where}.{key}={value!r}: write its settings, such as {where}.{key}.{_first(groups[key])}"
                )
            _refuse_unknown(value, groups[key], f"{where}.{key}")


def _first(kind: type) -> str:
    entry = fields(kind)[0]
    return f"{entry.name}={entry.default}"

"""Settings that changed between the start of a run and going on with it: which make it another run, which would put its data
out of place, and which are the user's choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vp2o.config.names import CONFIG_FILE
from megatron_vp2o.config.ranges import as_yaml
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.config.store import as_plain, load_config

# Another model, task or algorithm is another run, whether or not it has a checkpoint yet.
_ANOTHER_RUN = ("algorithm.name", "task.", "model.")
# Where the data stands is kept as a number of prompts or documents, which means something else under other values of these.
_PLACES_DATA = (
    "seed",
    "algorithm.data.source",
    "algorithm.data.text_field",
    "algorithm.data.tokenizer",
)
# Of no consequence to what is trained, or (paths of data) compared by content.
_FREE = (
    "name",
    "run_dir",
    "resume",
    "notes",
    "threads",
    "exp_manager",
    "logging.",
    "checkpoint.",
    "parallel.",  # the checkpoint says under which layout it was saved
    "rollout.server.",
    "rollout.launch",
    "rollout.urls",
    "rollout.store",
    "model.implementation",
    "model.recompute",
    "model.logits_chunk_mib",
    "algorithm.data.path",
    "task.path",
    "task.index_dir",
)


@dataclass
class Changes:
    """Settings that are not what they were, each as "NAME is OLD there and NEW here"."""

    another_run: list[str] = field(default_factory=list)
    misplaced: list[str] = field(default_factory=list)
    """Data would be repeated or skipped."""
    chosen: list[str] = field(default_factory=list)
    """Training goes on with the new value."""


def changes(config: TrainConfig, run_dir: str | Path) -> Changes:
    """Compare with the settings that are kept in `run_dir`; nothing has changed where there are none.

    Raises:
        ConfigError: they cannot be read.
    """
    if not (Path(run_dir) / CONFIG_FILE).exists():
        return Changes()
    return compare(_flat(as_plain(load_config(run_dir))), _flat(as_plain(config)))


def compare(there: dict[str, Any], here: dict[str, Any]) -> Changes:
    """Two configurations, as settings by their dotted names."""
    found = Changes()
    for key in [*here, *(key for key in there if key not in here)]:
        if there.get(key) == here.get(key) or _is_among(key, _FREE):
            continue
        change = f"{key} is {as_yaml(there.get(key))} there and {as_yaml(here.get(key))} here"
        if _is_among(key, _ANOTHER_RUN):
            found.another_run.append(change)
        elif _is_among(key, _PLACES_DATA):
            found.misplaced.append(change)
        else:
            found.chosen.append(change)
    return found


def _is_among(key: str, names: tuple[str, ...]) -> bool:
    """Whether a setting is one of these, or in a section that is (named with a dot at its end)."""
    return any(key.startswith(name) if name.endswith(".") else key == name for name in names)


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, dict) and prefix + key not in ("notes", "exp_manager"):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

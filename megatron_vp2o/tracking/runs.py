"""Recorded runs as the console and the report look at them: columns, names, evaluations, measures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_vp2o.config.names import CONFIG_FILE
from megatron_vp2o.tracking.record import Number, RecordError, read

ACCURACY = "greedy_accuracy"

Point = tuple[float, float | None]
"""x, and y or None where a line is to be broken (the value was NaN or infinite)."""


@dataclass(frozen=True)
class Run:
    """One run folder, read."""

    folder: Path
    name: str
    columns: Mapping[str, Sequence[Number | None]]
    config: Mapping[str, Any] = field(default_factory=dict)  # nested plain types; empty where none was stored
    versions: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def supervised(self) -> bool:
        return "supervised/loss" in self.columns

    @property
    def steps(self) -> int:
        """Training steps recorded."""
        return int(self.columns["step"][-1] or 0)

    def has(self, key: str) -> bool:
        """Whether it was measured at any step."""
        return any(value is not None for value in self.columns.get(key, ()))

    def points(self, x: str, y: str) -> list[Point]:
        """Where both were measured, in order."""
        if x not in self.columns or y not in self.columns:
            return []
        return [
            (float(a), float(b) if math.isfinite(b) else None)
            for a, b in zip(self.columns[x], self.columns[y], strict=True)
            if a is not None and b is not None and math.isfinite(a)
        ]

    def values(self, key: str) -> list[float]:
        """The finite ones measured, in order."""
        return [float(v) for v in self.columns.get(key, ()) if v is not None and math.isfinite(v)]

    def last(self, key: str) -> float | None:
        """The last finite value measured."""
        values = self.values(key)
        return values[-1] if values else None

    def at(self, key: str, row: int) -> float | None:
        """The value on a line of the record (an index), None where it was not measured."""
        value = self.columns[key][row] if key in self.columns else None
        return None if value is None else float(value)

    def evaluations(self, prefix: str = "eval") -> list[int]:
        """Indices of the lines that hold an evaluation."""
        column = self.columns.get(f"{prefix}/{ACCURACY}", ())
        return [row for row, value in enumerate(column) if value is not None]

    def best_evaluation(self) -> int | None:
        """Index of the line with the highest greedy accuracy, the earliest of equals; None without evaluations."""
        rows = self.evaluations()
        return max(rows, key=lambda row: self.at(f"eval/{ACCURACY}", row) or 0.0) if rows else None

    def setting(self, *path: str) -> Any:
        """A setting of the stored configuration, None where there is none."""
        node: Any = self.config
        for name in path:
            node = node.get(name) if isinstance(node, Mapping) else None
        return node


@dataclass(frozen=True)
class Measure:
    """A row of a comparison: a metric's key without its prefix, and how to say it."""

    key: str
    label: str
    percent: bool = False
    unit: str = ""


def measures(runs: Sequence[Run]) -> list[Measure]:
    """What evaluations of these runs measured, in the order in which people ask."""
    found = {match.group(1) for run in runs for key in run.columns if (match := re.fullmatch(r"eval/pass@(\d+)", key))}
    rows = [Measure(ACCURACY, "greedy accuracy", percent=True)]
    rows += [Measure(f"pass@{k}", f"pass@{k}", percent=True) for k in sorted(map(int, found))]
    rows += [
        Measure("distinct", "distinct right answers"),
        Measure("coverage", "coverage of right answers", percent=True),
        Measure("answer_entropy", "answer entropy", unit="nats"),
        Measure("response_length", "response length", unit="tokens"),
        Measure("solution_length", "solution length", unit="tokens"),
    ]
    return [row for row in rows if any(run.has(f"eval/{row.key}") for run in runs)]


def load_run(folder: str | Path) -> Run:
    """A run from its folder's `metrics.jsonl` and, where there is one, `config.yaml`.

    Raises:
        RecordError: if the record is missing, empty or damaged, or the configuration is no YAML mapping.
    """
    folder = Path(folder)
    columns = read(folder)
    stored: Mapping[str, Any] = {}
    path = folder / CONFIG_FILE
    if path.is_file():
        try:
            stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecordError(f"{path} is not YAML ({' '.join(str(error).split())}): restore or remove it") from error
        if not isinstance(stored, Mapping) or not isinstance(stored.get("config", {}), Mapping):
            raise RecordError(f"{path} is not the stored configuration of a run: restore or remove it")
    config = stored.get("config", {})
    name = str(config.get("name") or folder.resolve().name)
    return Run(folder, name, columns, config, stored.get("versions") or {})


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Several runs; where names repeat, the folders become the names."""
    runs = [load_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else Run(run.folder, str(run.folder), run.columns, run.config, run.versions)
        for run in runs
    ]


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the beginning that they share, cut at an underscore, hyphen, dot or slash."""
    if len(set(names)) < 2:
        return list(names)
    shared = 0
    while len({name[: shared + 1] for name in names}) == 1:
        shared += 1
    cut = max(names[0].rfind(mark, 0, shared) for mark in "_-./") + 1
    shorter = [name[cut:] for name in names]
    return shorter if all(shorter) else list(names)

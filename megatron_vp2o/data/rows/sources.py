"""Which files, or which data set of the `datasets` library, a path means."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_vp2o.errors import DataError

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonl.gz": "gzip", ".ndjson.gz": "gzip", ".parquet": "parquet"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
SAVED = ("dataset_info.json", "dataset_dict.json")  # what datasets' save_to_disk writes


@dataclass(frozen=True)
class Source:
    """One file, or one data set."""

    kind: str  # jsonl | gzip | parquet | saved | hub
    path: str
    split: str = ""  # of a data set

    def __str__(self) -> str:
        return f"{self.path} ({self.split})" if self.split else self.path


def find_sources(path: str, split: str) -> list[Source]:
    """The files of a path in the order of their names, or the data set of a folder or hub name.

    Args:
        split: which split of a data set.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    place = Path(path)
    if place.is_file():
        return [Source(_kind(place), str(place))]
    if place.is_dir():
        if any((place / name).is_file() for name in SAVED):
            _needs("datasets", path)
            return [Source("saved", str(place), split)]
        files = [
            entry
            for entry in sorted(place.rglob("*"))
            if _suffix(entry) and entry.is_file() and not _hidden(entry, place)
        ]
        if not files:
            raise DataError(
                f"task.path={path}: the folder has no file that ends in {', '.join(SUFFIXES)}: name another"
            )
        return [Source(_kind(entry), str(entry)) for entry in files]
    if HUB_NAME.fullmatch(path) and not place.suffix:
        _needs("datasets", path)
        return [Source("hub", path, split)]
    raise DataError(
        f"task.path={path} does not exist: name a file ({', '.join(SUFFIXES)}), a folder of them, or a data set of the hub as "
        "owner/name"
    )


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def _hidden(path: Path, folder: Path) -> bool:
    """Also what is inside an index, which may hold a copy of the rows."""
    from megatron_vp2o.data.rows.index import MARK

    return any(part.startswith((".", "_")) or MARK in part for part in path.relative_to(folder).parts)


def _kind(path: Path) -> str:
    suffix = _suffix(path)
    if not suffix:
        raise DataError(f"task.path={path} is no kind of file that can be read: it must end in {', '.join(SUFFIXES)}")
    if SUFFIXES[suffix] == "parquet":
        _needs("pyarrow", str(path))
    return SUFFIXES[suffix]


def _needs(package: str, path: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DataError(f"task.path={path} needs {package}, which is not installed: pip install 'megatron-vp2o[rows]'")

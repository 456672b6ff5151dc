"""Where each row of a file lies and what it is, kept on disk, so that a start reads neither the file nor its prompts again.

An index is a folder beside the file, `NAME.rows-HASH` (or in a cache folder where the file's own cannot be written to). HASH is
that of the settings of columns. In it:

    index.json   what file it was made from, its columns, bad rows, kinds of conversations
    rows.bin     one `ENTRY` a row
    rows.jsonl   of a compressed file: its lines;  rows.arrow   of a parquet file: its rows

It is made again when the file has changed, by one process: others wait.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_vp2o.config.rows import ColumnsConfig
from megatron_vp2o.data.rows.columns import BadRow, Columns, Example, find_columns
from megatron_vp2o.data.rows.readers import (
    ArrowReader,
    DatasetReader,
    Found,
    JsonlReader,
    Reader,
    load_dataset,
    to_arrow,
    unpack,
)
from megatron_vp2o.data.rows.sources import Source
from megatron_vp2o.errors import DataError

logger = logging.getLogger(__name__)

FORMAT = 1
MARK = ".rows-"  # in the names of index folders
ENTRY = np.dtype(
    [("offset", "<i8"), ("length", "<i4"), ("kind", "<u2"), ("number", "<i8"), ("key", "<u8"), ("size", "<i4")]
)
CHUNK = 65536  # rows that are written, or looked at, together
LOOKED_AT = 100  # first rows, which tell the columns
SHOWN = 20  # bad rows whose reasons are kept
MOST_KINDS = 65536
SAMPLES, SAMPLE = 64, 4096  # places of a file, and bytes at each, that tell whether it has changed


@dataclass
class Index:
    """An index that is open; `entries` is mapped into memory."""

    source: Source
    reader: Reader
    entries: np.ndarray
    columns: Columns
    kinds: list[str]
    bad: int
    reasons: list[tuple[int, str]]  # of the first bad rows: number and reason
    tools: int  # rows with tools, which are not used
    digest: str  # of all rows

    def __len__(self) -> int:
        return len(self.entries)

    def example(self, local: int) -> Example:
        """Row `local`.

        Raises:
            DataError: it is not what was indexed.
        """
        entry = self.entries[local]
        try:
            example = self.columns.read(self.reader.read(int(entry["offset"]), int(entry["length"])))
        except BadRow as error:
            raise DataError(
                f"{self.place(local)}: {error}. The file has changed since the run started; start it again"
            ) from None
        if example.key() != int(entry["key"]):
            raise DataError(
                f"{self.place(local)} is another row than at start: the file has changed; start the run again"
            )
        return example

    def place(self, local: int) -> str:
        """File and line, for messages."""
        word = "line" if self.source.kind in ("jsonl", "gzip") else "row"
        return f"{self.source}, {word} {int(self.entries[local]['number'])}"


def open_index(source: Source, settings: ColumnsConfig, cache: str | None, *, progress: bool = False) -> Index:
    """The index of a source, made if it is not there or the file has changed since.

    Args:
        cache: folder for indexes; None: beside the file, or where that cannot be written to in the user's cache folder.

    Raises:
        DataError: the file cannot be read, has no row that can be used, or no folder can hold its index.
    """
    dataset = load_dataset(source) if source.kind in ("saved", "hub") else None
    identity = _identity(source, dataset)
    folder = _folder(source, settings, cache)
    with _locked(folder):
        header = _fresh(folder, identity)
        if header is None:
            _build(source, dataset, settings, identity, folder, progress=progress)
            header = _fresh(folder, identity)
            assert header is not None
    rows = np.memmap(folder / "rows.bin", ENTRY, "r") if header["rows"] else np.empty(0, ENTRY)
    return Index(
        source,
        _reader(source, dataset, folder),
        rows,
        Columns(**header["columns"]),
        header["kinds"],
        header["bad"],
        [(number, reason) for number, reason in header["reasons"]],
        header["tools"],
        header["digest"],
    )


def _identity(source: Source, dataset: Any) -> dict[str, Any]:
    """What tells whether a file is still the same: size, time of change, and the bytes at some places of it."""
    if dataset is not None:
        return {"format": FORMAT, "fingerprint": dataset._fingerprint, "rows": len(dataset)}
    try:
        with open(source.path, "rb") as file:
            status = os.fstat(file.fileno())
            digest = blake2b(digest_size=16)
            for i in range(SAMPLES):
                file.seek(max(0, status.st_size - SAMPLE) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    except OSError as error:
        raise DataError(f"task.path: {source.path} cannot be read ({error.strerror})") from error
    return {"format": FORMAT, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "sample": digest.hexdigest()}


def _folder(source: Source, settings: ColumnsConfig, cache: str | None) -> Path:
    mark = MARK + blake2b(json.dumps(asdict(settings), sort_keys=True).encode(), digest_size=4).hexdigest()
    path = Path(source.path).resolve()
    if cache is None and source.kind not in ("saved", "hub") and os.access(path.parent, os.W_OK):
        return path.parent / f"{path.name}{mark}"
    base = Path(cache) if cache is not None else _user_cache()
    name = source.path.replace("/", "_") if source.kind == "hub" else path.name
    whole = blake2b(
        f"{path if source.kind != 'hub' else source.path} {source.split}".encode(), digest_size=8
    ).hexdigest()
    return base / f"{name}-{whole}{mark}"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_vp2o" / "rows"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the others find what it has made."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("a")
    except OSError as error:
        raise DataError(
            f"no index can be kept in {folder.parent} ({error.strerror}): name a folder with task.index_dir"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process makes the index %s; waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fresh(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The index's own description, or None where it is missing, damaged, or of the file as it was."""
    try:
        header = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        whole = (folder / "rows.bin").stat().st_size == header["rows"] * ENTRY.itemsize
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return header if whole and header.get("identity") == identity else None


def _reader(source: Source, dataset: Any, folder: Path) -> Reader:
    if source.kind == "parquet":
        return ArrowReader(folder / "rows.arrow")
    if source.kind == "gzip":
        return JsonlReader(folder / "rows.jsonl")
    return DatasetReader(dataset) if dataset is not None else JsonlReader(Path(source.path))


def _build(
    source: Source, dataset: Any, settings: ColumnsConfig, identity: dict[str, Any], folder: Path, *, progress: bool
) -> None:
    """Write the index to a folder of its own, and put that into its place as a whole."""
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f"no index can be kept in {folder.parent} ({error.strerror}): name a folder with task.index_dir"
        ) from error
    try:
        if source.kind == "gzip":
            unpack(Path(source.path), temporary / "rows.jsonl")
        elif source.kind == "parquet":
            with (temporary / "rows.arrow").open("wb") as target:
                to_arrow(Path(source.path), target)
        builder = _Builder(source, settings)
        with (temporary / "rows.bin").open("wb") as out:
            found = _reader(source, dataset, temporary).scan()
            first = list(islice(found, LOOKED_AT))
            builder.look_at(first)
            items = chain(first, found)
            for item in tqdm(
                items, desc=f"indexing {source}", unit="rows", delay=2.0, disable=not progress, leave=False
            ):
                builder.add(item)
                if len(builder.pending) == CHUNK:
                    out.write(builder.flush())
            out.write(builder.flush())
        header = builder.header() | {"identity": identity}
        (temporary / "index.json").write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except OSError as error:
        raise DataError(f"the index of {source} cannot be written to {folder} ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Builder:
    """Takes rows as they come."""

    def __init__(self, source: Source, settings: ColumnsConfig) -> None:
        self.source, self.settings = source, settings
        self.columns: Columns | None = None
        self.kinds: dict[str, int] = {}
        self.pending: list[tuple[int, int, int, int, int, int]] = []
        self.rows = self.bad = self.tools = 0
        self.reasons: list[tuple[int, str]] = []
        self._digest = blake2b(digest_size=16)

    def look_at(self, first: list[Found]) -> None:
        """Find the columns."""
        rows = [found.row for found in first if not isinstance(found.row, BadRow)]
        if not rows:
            self.reasons = [(found.number, str(found.row)) for found in first[:3]]
            self.header()  # refuses
        try:
            self.columns = find_columns(self.settings, rows)
        except BadRow as error:
            raise DataError(f"{self.source}: {error}") from None

    def add(self, found: Found) -> None:
        assert self.columns is not None
        try:
            if isinstance(found.row, BadRow):
                raise found.row
            example = self.columns.read(found.row)
            kind = self.kinds.setdefault(example.kind(), len(self.kinds))
            if kind >= MOST_KINDS:
                raise BadRow(f"more than {MOST_KINDS} different orders of roles")
        except BadRow as error:
            self.bad += 1
            if len(self.reasons) < SHOWN:
                self.reasons.append((found.number, str(error)))
            return
        key = example.key()
        self.tools += bool(found.row.get("tools"))
        self.pending.append((found.offset, found.length, kind, found.number, key, example.size()))
        self.rows += 1
        answer = json.dumps([example.answer, example.completion], default=str)
        self._digest.update(b"%d " % key + answer.encode("utf-8", "surrogatepass"))

    def flush(self) -> bytes:
        written = np.array(self.pending, ENTRY).tobytes()
        self.pending = []
        return written

    def header(self) -> dict[str, Any]:
        if not self.rows:
            reasons = "; ".join(f"{number}: {reason}" for number, reason in self.reasons[:3])
            raise DataError(f"{self.source} has no row that can be used ({reasons or 'it is empty'})")
        assert self.columns is not None
        return {
            "rows": self.rows,
            "columns": asdict(self.columns),
            "kinds": list(self.kinds),
            "bad": self.bad,
            "reasons": self.reasons,
            "tools": self.tools,
            "digest": self._digest.hexdigest(),
        }

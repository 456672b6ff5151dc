"""Files as rows: all of them in order for an index, and one by its place.

A row's place is two numbers: for JSONL the byte offset and the length of its line, for tables the row number and 0.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from megatron_vp2o.data.rows.columns import BadRow
from megatron_vp2o.data.rows.sources import Source
from megatron_vp2o.errors import DataError

LONGEST_LINE = 64 << 20  # bytes; a longer line is a bad row, and is not read into memory
BATCH = 256  # rows of a parquet file that are decoded together


class Found(NamedTuple):
    """A row as it stands in a file."""

    offset: int
    length: int
    number: int  # line of the file, or row of the table, counted from 1
    row: dict[str, Any] | BadRow


class Reader(Protocol):
    """One file."""

    def scan(self) -> Iterator[Found]: ...
    def read(self, offset: int, length: int) -> dict[str, Any]:
        """Raises BadRow where there is no such row any more."""
        ...


class JsonlReader:
    """Lines of JSON. Only what is asked for is in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")

    def scan(self) -> Iterator[Found]:
        self._file.seek(0)
        offset = 0
        number = 0
        while line := self._file.readline(LONGEST_LINE + 1):
            number += 1
            length = len(line)
            if length > LONGEST_LINE and not line.endswith(b"\n"):
                while (rest := self._file.readline(1 << 20)) and not rest.endswith(b"\n"):
                    length += len(rest)
                yield Found(offset, 0, number, BadRow(f"a line of more than {LONGEST_LINE >> 20} MiB"))
                offset = self._file.tell()
                continue
            if not line.isspace() and line not in (b"\xef\xbb\xbf\n", b"\xef\xbb\xbf"):
                try:
                    yield Found(offset, length, number, parsed(line))
                except BadRow as error:
                    yield Found(offset, length, number, error)
            offset += length

    def read(self, offset: int, length: int) -> dict[str, Any]:
        return parsed(os.pread(self._file.fileno(), length, offset))


def parsed(line: bytes) -> dict[str, Any]:
    """The object of a line. Raises BadRow."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise BadRow("not JSON that can be read (nested too deeply)") from None
    except ValueError as error:
        raise BadRow(f"not JSON that can be read ({error})") from None
    if not isinstance(row, dict):
        raise BadRow(f"a JSON {type(row).__name__}, not an object with columns")
    return row


def unpack(source: Path, target: Path) -> None:
    """Decompress a gzip file.

    Raises:
        DataError: it is damaged.
    """
    try:
        with gzip.open(source, "rb") as packed, target.open("wb") as plain:
            while block := packed.read(1 << 20):
                plain.write(block)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{source} is a damaged gzip file ({error}): fetch or write it again") from error


class ArrowReader:
    """A parquet file's rows from a copy of it in Arrow's format, which can be mapped into memory and read at any row."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        sizes = [self._file.get_batch(i).num_rows for i in range(self._file.num_record_batches)]
        self._first = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def scan(self) -> Iterator[Found]:
        for batch in range(self._file.num_record_batches):
            first = int(self._first[batch])
            for i, row in enumerate(self._file.get_batch(batch).to_pylist()):
                yield Found(first + i, 0, first + i + 1, row)

    def read(self, offset: int, length: int) -> dict[str, Any]:
        batch = int(np.searchsorted(self._first, offset, side="right")) - 1
        (row,) = self._file.get_batch(batch).slice(offset - int(self._first[batch]), 1).to_pylist()
        return dict(row)


def to_arrow(source: Path, target: BinaryIO) -> None:
    """Write a parquet file's rows in Arrow's format, a few row groups' worth of memory at a time.

    Raises:
        DataError: it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source) as file:
            schema = _with_batches(file.schema_arrow)
            with pa.ipc.new_file(target, schema) as out:
                for batch in file.iter_batches(BATCH):
                    batch.validate(full=True)
                    out.write_batch(batch)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{source} cannot be read as parquet ({reason}): fetch or write it again") from error


def _with_batches(schema: Any) -> Any:
    """The schema without metadata, which may be another library's own (pandas', Hugging Face's)."""
    return schema.remove_metadata()


class DatasetReader:
    """A data set of the `datasets` library."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def scan(self) -> Iterator[Found]:
        for number, row in enumerate(self.dataset):
            yield Found(number, 0, number + 1, dict(row))

    def read(self, offset: int, length: int) -> dict[str, Any]:
        return dict(self.dataset[offset])


def load_dataset(source: Source) -> Any:
    """A data set from a folder that `save_to_disk` wrote, or from the hub.

    Raises:
        DataError: it is not there, cannot be read or reached, or lacks the split.
    """
    import datasets

    try:
        if source.kind == "saved":
            loaded = datasets.load_from_disk(source.path)
        else:
            name, _, subset = source.path.partition(":")
            loaded = datasets.load_dataset(name, subset or None, split=source.split)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"task.path={source.path}: the datasets library cannot load it ({reason})") from error
    if isinstance(loaded, dict):
        if source.split not in loaded:
            raise DataError(
                f"task.hub_split={source.split}: {source.path} has {', '.join(sorted(loaded))}; choose one of them"
            )
        loaded = loaded[source.split]
    return loaded

"""`metrics.jsonl`, the record of a run: one line a step, never lost, never half-read.

A line is a strict JSON object with every key of the run's schema, null where nothing was measured. JSON has no NaN
and no infinity, so these are the strings "NaN", "Infinity" and "-Infinity"; no metric is text, so they are unambiguous.
"""

from __future__ import annotations

import difflib
import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from megatron_vp2o.config.names import RECORD_FILE
from megatron_vp2o.errors import UserError

Number = int | float
Row = dict[str, Number | None]

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RecordError(UserError):
    """A record that is missing, damaged, or does not fit the run."""


class MetricsRecord:
    """Appends to a run's record. One process of a run has one.

    Args:
        run_dir: folder of the run; made on the first write.
        keys: of every line, in order, "step" among them (`schema_for`).
    """

    def __init__(self, run_dir: str | Path, keys: Sequence[str]) -> None:
        if "step" not in keys:
            raise ValueError(f"the keys of a record must have 'step': {list(keys)}")
        self.path = Path(run_dir) / RECORD_FILE
        self._keys = tuple(keys)
        self._file: BinaryIO | None = None
        self._last_step = -1

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Write one line, on disk when this returns.

        Raises:
            ValueError: for a key that is not in the schema, no `step`, or a step that is not after the last one.
            TypeError: for a value that is no number.
            RecordError: if the file already holds lines (see `truncate_after`).
        """
        self._check_keys(metrics)
        step = metrics.get("step")
        if not isinstance(step, numbers.Integral) or int(step) <= self._last_step:
            raise ValueError(f"a line needs a whole `step` after {self._last_step}, got {step!r}")
        line = self._encode(metrics)
        if self._file is None:
            self._file = self._open_new()
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._last_step = int(step)

    def truncate_after(self, step: int) -> None:
        """Drop every line after that of `step`, and a torn last line; go on appending there. -1 drops all.

        Atomic: a process killed meanwhile leaves the old file or the new one. Keys that the schema gained since the
        lines were written are filled in with null.

        Raises:
            RecordError: if the line of `step` is missing, or one up to it is damaged or has a key the schema lacks.
        """
        self.close()
        if not self.path.exists():
            if step < 0:
                return
            raise RecordError(self._cannot_go_on(step, "there is no such file"))
        last = -1
        temporary = self.path.with_name(f".{RECORD_FILE}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                for number, line in _whole_lines(self.path):
                    if last >= step:  # what follows is dropped unread
                        break
                    found, row = _decode(self.path, number, line, after=last)
                    if found > step:
                        break
                    last = found
                    file.write(self._refit(number, line, row))
                file.flush()
                os.fsync(file.fileno())
            if last != max(step, -1):
                raise RecordError(self._cannot_go_on(step, f"its last step before that is {last}"))
            temporary.replace(self.path)
            _sync_folder(self.path.parent)
        finally:
            temporary.unlink(missing_ok=True)
        self._file = self.path.open("ab")
        self._last_step = last

    def close(self) -> None:
        """Close the file; the next `append` needs `truncate_after` first."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> MetricsRecord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cannot_go_on(self, step: int, reason: str) -> str:
        return (
            f"{self.path} has no line for step {step}, where the run is to go on ({reason}): put the record that "
            "belongs to the checkpoint back, or start in another run_dir"
        )

    def _open_new(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("ab")
        if file.tell() > 0:
            file.close()
            raise RecordError(
                f"{self.path} already holds a run's record: resume that run (resume=auto), or choose another run_dir"
            )
        _sync_folder(self.path.parent)
        return file

    def _check_keys(self, metrics: Mapping[str, Any]) -> None:
        unknown = [key for key in metrics if key not in self._keys]
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._keys, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"unknown metric {unknown[0]!r}{hint}: add it to megatron_vp2o/tracking/sections.py")

    def _encode(self, metrics: Mapping[str, Any]) -> bytes:
        row = {key: _plain(key, metrics.get(key)) for key in self._keys}
        return json.dumps(row, allow_nan=False).encode() + b"\n"

    def _refit(self, number: int, line: bytes, row: Row) -> bytes:
        dropped = [key for key in row if key not in self._keys]
        if dropped:
            raise RecordError(
                f"{self.path}, line {number}: has {dropped[0]!r}, which this run does not record: resume with the "
                "algorithm, evaluation.pass_at and version that it was started with, or start in another run_dir"
            )
        return line if len(row) == len(self._keys) else self._encode(row)


def read(run_dir: str | Path) -> dict[str, list[Number | None]]:
    """The record of a run as columns: key -> one value for each line, None where it was not measured.

    A line that is still being written is left out.

    Raises:
        RecordError: if there is no record, it has no whole line, or a line is damaged (with its number).
    """
    path = Path(run_dir) / RECORD_FILE
    if not path.is_file():
        raise RecordError(f"{path} does not exist: {run_dir} is not the folder of a run")
    columns: dict[str, list[Number | None]] = {}
    count, last = 0, -1
    for number, line in _whole_lines(path):
        last, row = _decode(path, number, line, after=last)
        for key in row:
            if key not in columns:
                columns[key] = [None] * count
        for key, column in columns.items():
            column.append(row.get(key))
        count += 1
    if count == 0:
        raise RecordError(f"{path} has no line yet: the run has not finished its first evaluation")
    return columns


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line with its newline), without a last line that has no newline."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, line


def _decode(path: Path, number: int, line: bytes, *, after: int) -> tuple[int, Row]:
    def damaged(reason: str) -> RecordError:
        return RecordError(f"{path}, line {number}: {reason}; restore the file, or cut it before that line")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        row = json.loads(line, parse_constant=refuse)
    except ValueError as error:  # not JSON, or not UTF-8
        raise damaged(f"not a JSON object ({error})") from error
    if not isinstance(row, dict):
        raise damaged(f"not a JSON object but {str(row)[:40]!r}")
    for key, value in row.items():
        if isinstance(value, str) and value in _NON_FINITE:
            row[key] = _NON_FINITE[value]
        elif value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise damaged(f"{key} is {str(value)[:40]!r}, not a number")
    step = row.get("step")
    if not isinstance(step, int) or step <= after:
        raise damaged(f"step is {step!r}, which must be a whole number after {after}")
    return step, row


def _plain(key: str, value: Any) -> Number | str | None:
    if value is None:
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"metric {key!r} is {value!r} ({type(value).__name__}), not a number: call .item() on tensors")
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The results folder: one file for each model, checkpoint, benchmark and length; one line for each sample.

    OUT/samples/LABEL/step_000080/aime24@8192.jsonl

The first line is the header: what was evaluated, and how. A file takes samples under that header only. Lines are appended
whole and synced, and a line that a kill tore in two is cut off when the file is next opened, so a sample is there or not there.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vp2o.errors import DataError

FORMAT = 1
SAMPLES = "samples"
EXPECTED = ".expected"
"""Suffix of the file beside it that says how many samples it is to have."""
Key = tuple[str, int]
"""Name of a problem, number of the sample."""


@dataclass(frozen=True)
class Sample:
    """One graded answer."""

    problem: str
    sample: int
    values: dict[str, float]
    reason: str
    thinking_tokens: int
    solution_tokens: int
    truncated: bool
    text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """What metrics need of the problem: a rating, a subject."""

    def line(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False, sort_keys=True)


class SampleFile:
    """A file of the results folder, open for appending. Use it as a context; one process at a time."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Open or begin it.

        Raises:
            DataError: it holds samples of something else, is damaged, or another process writes it.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            self.done = self._begin({"format": FORMAT, **header})
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def append(self, samples: Iterable[Sample]) -> None:
        """Write those that are not there yet; they are on the disk when this returns."""
        new = [sample for sample in samples if (sample.problem, sample.sample) not in self.done]
        if new:
            self._write("".join(sample.line() + "\n" for sample in new))
            self.done |= {(sample.problem, sample.sample) for sample in new}

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is evaluating into {self.path}: wait for it, or choose another --out"
            ) from None

    def _begin(self, header: dict[str, Any]) -> set[Key]:
        size = os.fstat(self._file).st_size
        whole = _whole_lines(self._file, size)
        if whole < size:
            os.ftruncate(self._file, whole)
        os.lseek(self._file, 0, os.SEEK_END)
        if whole == 0:
            self._write(json.dumps({"header": header}, ensure_ascii=False, sort_keys=True) + "\n")
            return set()
        found, samples = read(self.path)
        if differing := differences(found, header):
            raise DataError(
                f"{self.path} holds samples of another evaluation ({differing}): choose another --out, or evaluate the same "
                "as before"
            )
        return {(sample.problem, sample.sample) for sample in samples}

    def _write(self, text: str) -> None:
        view = memoryview(text.encode("utf-8", errors="replace"))
        while view:
            view = view[os.write(self._file, view) :]
        os.fsync(self._file)


def _whole_lines(file: int, size: int) -> int:
    """Bytes up to the end of the last whole line."""
    end = size
    while end > 0:
        begin = max(0, end - 65536)
        at = os.pread(file, end - begin, begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0


def differences(there: Mapping[str, Any], here: Mapping[str, Any], name: str = "") -> str:
    """What two headers differ in, as `name is A there and B here`; empty where they are the same."""
    found = []
    for key in sorted(there.keys() | here.keys()):
        a, b, full = there.get(key), here.get(key), f"{name}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found.append(differences(a, b, f"{full}."))
        elif a != b:
            found.append(f"{full} is {a} there and {b} here")
    return ", ".join(part for part in found if part)


def read(path: Path) -> tuple[dict[str, Any], list[Sample]]:
    """Header and samples of a file; a torn last line is left out.

    Raises:
        DataError: a line that is no sample, or a sample that is there twice.
    """
    text = path.read_bytes()
    lines = text[: text.rfind(b"\n") + 1].splitlines()
    try:
        header = json.loads(lines[0])["header"]
        samples = [Sample(**json.loads(line)) for line in lines[1:]]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}): remove it, and evaluate that part again"
        ) from error
    if header.get("format") != FORMAT:
        raise DataError(f"{path} has format {header.get('format')}, and this version reads {FORMAT}: use another --out")
    seen: set[Key] = set()
    for sample in samples:
        if (key := (sample.problem, sample.sample)) in seen:
            raise DataError(
                f"{path} has sample {key[1]} of problem {key[0]} twice: remove the file, and evaluate again"
            )
        seen.add(key)
    return header, samples


def path_of(out: Path, label: str, step: int, benchmark: str, length: int) -> Path:
    """Where the samples of one model, benchmark and length are."""
    return out / SAMPLES / label / f"step_{step:06d}" / f"{benchmark}@{length}.jsonl"


def files(out: Path) -> Iterator[Path]:
    """All sample files that have more than nothing in them, in a fixed order."""
    yield from (
        path for path in sorted((out / SAMPLES).glob("*/step_*/*@*.jsonl")) if b"\n" in path.read_bytes()[:65536]
    )

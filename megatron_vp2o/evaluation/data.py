"""Rows of a benchmark: a local file, or the few problems of our own that the package carries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vp2o.data.rows.columns import BadRow
from megatron_vp2o.data.rows.readers import JsonlReader
from megatron_vp2o.errors import DataError
from megatron_vp2o.evaluation.benchmark import Benchmark, Question
from megatron_vp2o.rewards.grade import RowError

OWN = "own"
"""What `--data` says for the problems of our own."""
OWN_FOLDER = Path(__file__).parent / "own"
SOURCE_FILE = "{name}.source.json"
"""Beside a file that `make eval-data` fetched: where it came from, and its checksum."""


@dataclass(frozen=True)
class Questions:
    """What is asked of a benchmark, and the identity of its rows."""

    benchmark: Benchmark
    questions: tuple[Question, ...]
    own: bool
    """Whether these are problems of our own, which say nothing about the benchmark."""
    digest: str
    """Hash of the questions as they are asked and graded."""
    revision: str


def load(benchmark: Benchmark, data: str, seed: int) -> Questions:
    """All questions of a benchmark.

    Args:
        data: a folder with `NAME.jsonl` or `NAME.parquet`, or `own`.
        seed: of the order of choices.

    Raises:
        DataError: the file is missing, damaged or has a row that is no question; names it, and what brings the file.
    """
    own = data == OWN or benchmark.remote is None
    path = OWN_FOLDER / benchmark.own_file if own else _find(benchmark, Path(data))
    questions: list[Question] = []
    for number, row in enumerate(_rows(path)):
        try:
            questions.append(benchmark.ask(row, number, seed))
        except RowError as error:
            raise DataError(f"{path}, row {number + 1}: {error}") from error
    if not questions:
        raise DataError(f"{path} has no rows")
    names = [question.id for question in questions]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} has two problems of the name {twice!r}: give each row its own `id`")
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.id, question.prompt, question.row], sort_keys=True).encode())
    return Questions(benchmark, tuple(questions), own, digest.hexdigest()[:16], _revision(benchmark, path, own))


def _find(benchmark: Benchmark, folder: Path) -> Path:
    for suffix in (".jsonl", ".parquet"):
        if (path := folder / f"{benchmark.name}{suffix}").is_file():
            return path
    raise DataError(
        f"{folder} has no {benchmark.name}.jsonl or .parquet, the rows of {benchmark.title}: `make eval-data "
        f"BENCHMARKS={benchmark.name} DATA={folder}` fetches them ({benchmark.remote.describe() if benchmark.remote else ''}), "
        f"docs/evaluation.md says which columns a file of yours needs, and --data {OWN} takes our own few problems, which only "
        "show that everything works"
    )


def _revision(benchmark: Benchmark, path: Path, own: bool) -> str:
    if own:
        return "our own problems"
    note = path.with_name(SOURCE_FILE.format(name=benchmark.name))
    if not note.is_file():
        return f"local file {path.name}"
    source = json.loads(note.read_text(encoding="utf-8"))
    actual = sha256(path)
    if source["sha256"] != actual:
        raise DataError(
            f"{path} has the checksum {actual[:16]}, and {note.name} says {source['sha256'][:16]}: it was changed after it was "
            "fetched. Fetch it again, or remove the note if you changed it on purpose"
        )
    return str(source["source"])


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rows(path: Path) -> Sequence[dict[str, Any]]:
    if path.suffix == ".parquet":
        return _parquet(path)
    rows = []
    for found in JsonlReader(path).scan():
        if isinstance(found.row, BadRow):
            raise DataError(f"{path}, line {found.number}: {found.row}")
        rows.append(found.row)
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path} needs pyarrow: pip install 'megatron-vp2o[rows]', or convert it to JSONL") from None
    try:
        return list(pq.read_table(path).to_pylist())
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no parquet file ({error}): fetch or make it again") from error

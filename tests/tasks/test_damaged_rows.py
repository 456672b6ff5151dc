"""Files of rows with damage drawn at random: a clear error, or rows left out and counted."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from megatron_vp2o.config.rows import OnBadRow, RowsTaskConfig
from megatron_vp2o.data.rows.index import MARK
from megatron_vp2o.errors import DataError, UserError
from megatron_vp2o.rl.types import Split
from megatron_vp2o.tasks import make_task
from tests.data.row_files import LAYOUTS, plain_rows, write
from tests.tasks.row_tasks import FORMATS, NONE_HELD_OUT, make, of_task
from tests.tasks.row_tasks import tokenizer as tokenizer

DAMAGES = int(os.environ.get("VP2O_DAMAGED_FILES", "40"))
DAMAGE_SEED = int(os.environ.get("VP2O_DAMAGED_SEED", "0"))


def _damaged(random: Random, folder: Path, number: int) -> Path:
    """A file of random layout and format with random damage: bytes flipped, cut, put in; values of other types."""
    layout, suffix = random.choice(list(LAYOUTS)), random.choice(FORMATS)
    rows = LAYOUTS[layout](random, random.randrange(8, 30))
    if random.random() < 0.6:
        for _ in range(random.randrange(1, 4)):
            _damage_value(random, rows[random.randrange(len(rows))])
    path = folder / f"{number}.{suffix}"
    try:
        write(path, rows)
    except Exception:  # pyarrow cannot write columns of mixed types: then as JSONL
        path = write(folder / f"{number}.jsonl", rows)
    data = bytearray(path.read_bytes())
    for _ in range(random.randrange(3)):
        at = random.randrange(len(data))
        match random.randrange(4):
            case 0:
                data[at] ^= 1 << random.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = random.randbytes(random.randrange(1, 40))
            case 3:
                del data[at : at + random.randrange(1, 200)]
        data = data or bytearray(b"\n")
    path.write_bytes(bytes(data))
    return path


def _damage_value(random: Random, value: Any) -> None:
    """Something of a row's tree replaced, removed, or added."""
    while isinstance(value, (dict, list)) and value:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = random.choice(keys)
        inner = value[key]
        if isinstance(inner, (dict, list)) and inner and random.random() < 0.7:
            value = inner
            continue
        if random.random() < 0.3:
            del value[key]
        else:
            value[key] = random.choice(
                [None, 3, 2.5, True, "", "\ud83d", [], {}, [[]], {"role": "user"}, ["x"], "x" * 3000, float("nan")]
            )
        return


def test_damaged_files_are_a_clear_error_or_counted_skips(tmp_path: Path, tokenizer: str) -> None:
    """VP2O_DAMAGED_FILES files (VP2O_DAMAGED_SEED): nothing but a UserError that names the file, or rows that are all there."""
    random = Random(DAMAGE_SEED)
    outcomes: Counter[str] = Counter()
    for number in range(DAMAGES):
        path = _damaged(random, tmp_path, number)
        try:
            task = make(str(path), tokenizer, on_bad_row=OnBadRow.skip, max_prompt_tokens=400)
            rows = [row for split in Split for row in of_task(task, split)]
        except UserError as error:
            assert str(path) in str(error), error
            assert len(str(error)) < 3000
            outcomes["error"] += 1
            continue
        assert len(rows) >= 2 and all(row["prompt"] for row in rows)
        outcomes["skipped" if task.counts["bad_rows"] or task.counts["long_prompts"] else "whole"] += 1
        strict = RowsTaskConfig(path=str(path), tokenizer=tokenizer, **NONE_HELD_OUT)
        if task.counts["bad_rows"]:
            with pytest.raises(DataError, match=r"task\.on_bad_row=skip"):
                make_task(strict)
        shutil.rmtree(next(tmp_path.glob(f"{path.name}{MARK}*")))
    print(dict(outcomes))
    assert set(outcomes) == {"error", "skipped", "whole"} or DAMAGES < 20


def test_a_damaged_gzip_or_parquet_file_is_named(tmp_path: Path, tokenizer: str) -> None:
    rows = plain_rows(Random(19), 300)
    packed = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain text")
    whole = write(tmp_path / "whole.parquet", rows).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "not.parquet").write_bytes(b"plain text")
    for name in ("cut.jsonl.gz", "not.jsonl.gz", "cut.parquet", "not.parquet"):
        with pytest.raises(DataError, match=name):
            make(str(tmp_path / name), tokenizer)
        assert not [entry for entry in tmp_path.iterdir() if entry.is_dir()]  # nothing half-made is left

"""Random rows, and files of them in every format that is read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

Row = dict[str, Any]
WORDS = [
    "find",
    "the",
    "sum",
    "of",
    "two",
    "small",
    "numbers",
    "été",
    "数学",
    "😀",
    "x^2",
    "\\frac{1}{2}",
    '"quoted"',
    "a\nb",
]


def text(random: Random, least: int = 1, most: int = 12) -> str:
    return " ".join(random.choice(WORDS) for _ in range(random.randint(least, most))) + f" {random.randrange(10**9)}"


def plain_rows(random: Random, count: int) -> list[Row]:
    return [
        {"prompt": text(random), "answer": str(random.randrange(100)), "level": random.randrange(5)}
        for _ in range(count)
    ]


def verl_rows(random: Random, count: int) -> list[Row]:
    """As verl's preprocessing writes them."""
    rows = []
    for i in range(count):
        prompt = [{"role": "user", "content": text(random)}]
        if random.random() < 0.3:
            prompt.insert(0, {"role": "system", "content": "Be brief."})
        reward = {"style": "rule", "ground_truth": str(random.randrange(100))}
        rows.append(
            {
                "data_source": "openai/gsm8k",
                "prompt": prompt,
                "ability": "math",
                "reward_model": reward,
                "extra_info": {"split": "train", "index": i},
            }
        )
    return rows


def trl_rows(random: Random, count: int) -> list[Row]:
    """TRL's conversational prompt and completion."""
    return [
        {
            "prompt": [{"role": "user", "content": text(random)}],
            "completion": [{"role": "assistant", "content": text(random, 1, 3)}],
        }
        for _ in range(count)
    ]


def message_rows(random: Random, count: int) -> list[Row]:
    """TRL's conversational language modelling."""
    rows = []
    for _ in range(count):
        turns = []
        for _ in range(random.randint(1, 2)):
            turns += [{"role": "user", "content": text(random)}, {"role": "assistant", "content": text(random, 1, 3)}]
        rows.append({"messages": turns})
    return rows


LAYOUTS = {"plain": plain_rows, "verl": verl_rows, "trl": trl_rows, "messages": message_rows}


def jsonl(rows: Sequence[Row], random: Random | None = None) -> bytes:
    """With a random generator: blank lines, and other white space and escapes than json.dumps', now and then."""
    lines = []
    for row in rows:
        if random is not None and random.random() < 0.1:
            lines.append(random.choice(["", "   ", "\t"]))
        line = json.dumps(row, ensure_ascii=random is None or random.random() < 0.5)
        lines.append(f"  {line} " if random is not None and random.random() < 0.1 else line)
    return ("\n".join(lines) + "\n").encode()


def write(path: Path, rows: Sequence[Row], random: Random | None = None) -> Path:
    """By the name's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=7)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(jsonl(rows, random)))
    else:
        path.write_bytes(jsonl(rows, random))
    return path

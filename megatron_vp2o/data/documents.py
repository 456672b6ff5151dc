"""Where supervised token data comes from: demonstrations of a task, or a JSONL file of text.

Megatron's IndexedDataset is a third source, in `megatron/indexed.py`.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.types import Split, Task, Tokenizer


@dataclass(frozen=True)
class Document:
    """A run of tokens that belong together."""

    tokens: np.ndarray  # int64, one dimension; may be empty
    loss_start: int  # tokens before this position don't count in the loss


class Documents(Protocol):
    """A finite collection that is gone through again and again."""

    splittable: bool  # whether a document longer than a row may be cut (text), or must be whole (a demonstration)

    def __len__(self) -> int: ...

    def get(self, index: int, epoch: int) -> Document:
        """Document `index`; the same arguments always give the same document."""
        ...


class TaskDemonstrations:
    """Prompt, right answer and end-of-sequence of a task's problems; only the answer and its end count in the loss.

    Each epoch puts a problem differently where the task can, and draws one of its right answers anew.
    """

    splittable = False

    def __init__(self, task: Task, split: Split, seed: int) -> None:
        self.task = task
        self.split = split
        self.seed = seed

    def __len__(self) -> int:
        return self.task.size(self.split)

    def get(self, index: int, epoch: int) -> Document:
        problem = self.task.problem(self.split, index, variant=epoch)
        draw = blake2b(f"{self.seed} {epoch} {index}".encode(), digest_size=4).digest()
        tokenizer = self.task.tokenizer
        prompt = problem.prompt_tokens(tokenizer)
        answer = tokenizer.encode(self.task.demonstration(problem, int.from_bytes(draw, "big")))
        return Document(np.array([*prompt, *answer, tokenizer.eos_id], dtype=np.int64), len(prompt))


class JsonlText:
    """The text in one field of each line of a JSONL file, tokenised when it is read, with an end-of-sequence.

    Only the byte offsets of the lines are kept in memory (8 bytes each), found in one pass over the file when this is
    made. Lines of white space are not documents. The first document is read at once, so that a wrong field name is
    found early; a bad line further on is found when its turn comes.

    Raises:
        ConfigError: if there is no such file or nothing in it, and, with the number of the line, for what is no JSON
            object, lacks the field, or holds text that the tokenizer refuses with a ValueError or KeyError.
    """

    splittable = True

    def __init__(self, path: str | Path, text_field: str, tokenizer: Tokenizer) -> None:
        self.path = Path(path)
        self.text_field = text_field
        self.tokenizer = tokenizer
        if not self.path.is_file():
            raise ConfigError(
                f"there is no file {self.path}: set algorithm.data.path to a JSONL file, one object a line"
            )
        self._offsets = array("q")
        self._file = self.path.open("rb")
        offset = 0
        for line in self._file:
            if not line.isspace():
                self._offsets.append(offset)
            offset += len(line)
        if not self._offsets:
            raise ConfigError(f"{self.path} has no documents: it needs one JSON object a line")
        self.get(0, 0)

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, index: int, epoch: int) -> Document:
        self._file.seek(self._offsets[index])
        line = self._file.readline()
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            raise self._bad_line(index, "not UTF-8", line) from None
        except json.JSONDecodeError as error:
            raise self._bad_line(index, f"not JSON ({error.msg} at column {error.colno})", line) from None
        if not isinstance(record, dict) or not isinstance(record.get(self.text_field), str):
            raise self._bad_line(index, f'no object with text in its field "{self.text_field}"', line)
        try:
            tokens = self.tokenizer.encode(record[self.text_field])
        except (KeyError, ValueError) as error:
            raise self._bad_line(index, f"the tokenizer refuses it ({error})", line) from error
        return Document(np.array([*tokens, self.tokenizer.eos_id], dtype=np.int64), 0)

    def _bad_line(self, index: int, problem: str, line: bytes) -> ConfigError:
        number, left = 1, self._offsets[index]
        with self.path.open("rb") as file:
            while left > 0:
                left -= len(file.readline())
                number += 1
        start = line[:80].decode("utf-8", "replace").rstrip()
        return ConfigError(
            f"{self.path}, line {number}: {problem}. Mend or remove the line, or name the field of the text with "
            f"algorithm.data.text_field; the line starts: {start}"
        )

"""Where supervised token data comes from: demonstrations of a task, or a JSONL file of text.

Megatron's IndexedDataset is a third source, in `megatron/indexed.py`.
"""

from __future__ import annotations

import json
import zlib
from array import array
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.interfaces import Task, Tokenizer
from megatron_vp2o.rl.types import Split

CHECKED_BYTES = 2**26
"""How much of a JSONL file is read before a run starts: half a second."""


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

    def identity(self) -> str:
        """Tells whether the files are those of another time; empty where settings alone make the documents."""
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

    def identity(self) -> str:
        return ""


class JsonlText:
    """The text in one field of each line of a JSONL file, tokenised when it is read, with an end-of-sequence.

    Only the byte offsets of the lines are kept in memory (8 bytes each), found in one pass over the file when this is
    made. Lines of white space are not documents. Lines are read at once as far as CHECKED_BYTES, so that what is wrong
    is found before anything is spent; a bad line further on, or one that only the tokenizer refuses, when its turn comes.

    Raises:
        ConfigError: if there is no such file or nothing in it, if all texts are empty, and, with the number of the line, for
            what is no JSON object, lacks the field, or holds text that is no Unicode or that the tokenizer refuses with a
            ValueError or KeyError.
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
        offset = self._crc32 = 0
        for line in self._file:
            self._crc32 = zlib.crc32(line, self._crc32)
            if not line.isspace():
                self._offsets.append(offset)
            offset += len(line)
        if not self._offsets:
            raise ConfigError(f"{self.path} has no documents: it needs one JSON object a line")
        self._bytes = offset
        self.get(0, 0)
        self._check_start()

    def __len__(self) -> int:
        return len(self._offsets)

    def identity(self) -> str:
        return f"{len(self)} documents, {self._bytes} bytes, crc32 {self._crc32:08x}"

    def get(self, index: int, epoch: int) -> Document:
        self._file.seek(self._offsets[index])
        line = self._file.readline()
        text = self._text(index, line)
        try:
            tokens = self.tokenizer.encode(text)
        except (KeyError, ValueError) as error:
            raise self._bad_line(index, f"the tokenizer refuses it ({error})", line) from error
        return Document(np.array([*tokens, self.tokenizer.eos_id], dtype=np.int64), 0)

    def _check_start(self) -> None:
        """Read the first lines, without the tokenizer, which takes a hundred times as long."""
        empty = 0
        for index, offset in enumerate(self._offsets):
            if offset > CHECKED_BYTES:
                break
            self._file.seek(offset)
            empty += not self._text(index, self._file.readline())
        else:
            index += 1
        if empty == index:
            raise ConfigError(
                f"{self.path}: the texts in the field {self.text_field!r} of all {index} lines that were read are empty: "
                "there is nothing to learn; name the field of the text with algorithm.data.text_field"
            )

    def _text(self, index: int, line: bytes) -> str:
        """The text of a line; `index` says which document it is, for the error."""
        try:
            # Numbers are not used. As integers, those of more than 4300 digits would be refused by Python.
            record = json.loads(line, parse_int=float)
        except UnicodeDecodeError:
            raise self._bad_line(index, "not UTF-8", line) from None
        except json.JSONDecodeError as error:
            raise self._bad_line(index, f"not JSON ({error.msg} at column {error.colno})", line) from None
        except RecursionError:
            raise self._bad_line(index, "nested too deeply to be read", line) from None
        text = record.get(self.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise self._bad_line(index, f'no object with text in its field "{self.text_field}"', line)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = (
                f"not Unicode (half of a surrogate pair, \\u{ord(text[error.start]):04x}, at character {error.start})"
            )
            raise self._bad_line(index, problem, line) from None
        return text

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

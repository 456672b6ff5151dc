"""What of a row is the prompt, the answer and the demonstration; the layouts of verl and TRL are recognised."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from megatron_vp2o.config.rows import ColumnsConfig

Message = dict[str, Any]
ROLES_KEPT = ("system", "developer", "user", "assistant", "tool")
VERL_ANSWER = "reward_model.ground_truth"


class BadRow(Exception):
    """A row that cannot be used; the argument is the reason."""


@dataclass(frozen=True)
class Example:
    """A row, read."""

    prompt: str | tuple[Message, ...]  # text, or chat messages
    answer: Any  # None where there is no such column
    completion: str | None  # a right response, for supervised training
    row: dict[str, Any]  # every column, with `prompt`, `answer` and `completion` under these names

    def size(self) -> int:
        """Bytes of the prompt's texts."""
        return sum(len(text.encode()) for text in self.texts())

    def texts(self) -> list[str]:
        """The prompt, or the contents of its messages."""
        return [self.prompt] if isinstance(self.prompt, str) else [message["content"] for message in self.prompt]

    def kind(self) -> str:
        """`text`, or the roles of the messages in their order: what a chat template's structure depends on."""
        return "text" if isinstance(self.prompt, str) else ",".join(message["role"] for message in self.prompt)

    def key(self) -> int:
        """64-bit hash of the prompt: equal prompts are the same question, whatever stands beside them."""
        text = self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, sort_keys=True, default=str)
        return int.from_bytes(blake2b(text.strip().encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Columns:
    """Names of the columns, dotted where they lie in another one; None where the file has none."""

    prompt: str
    answer: str | None
    completion: str | None

    def read(self, row: Mapping[str, Any]) -> Example:
        """Raises BadRow."""
        raw = _at(row, self.prompt)
        if raw is None:
            raise BadRow(f"no column {self.prompt!r}{_has(row)}")
        prompt, spoken = (raw, None) if isinstance(raw, str) else _conversation(raw, self.prompt)
        if isinstance(prompt, str) and not prompt.strip():
            raise BadRow(f"column {self.prompt!r} is empty")
        if self.prompt == "prompt" and spoken is not None:  # a response that the model is to go on with (TRL)
            prompt, spoken = (*prompt, {"role": "assistant", "content": spoken}), None
        completion = spoken if self.completion is None else _completion(_at(row, self.completion), self.completion)
        answer = None if self.answer is None else _at(row, self.answer)
        if self.answer is not None and answer is None:
            raise BadRow(f"no column {self.answer!r}{_has(row)}")
        if self.answer is None and completion is not None:
            answer = completion
        named = {"prompt": prompt, "answer": answer} | ({} if completion is None else {"completion": completion})
        example = Example(prompt, answer, completion, {**row, **named})
        _encodable(example)
        return example


def find_columns(settings: ColumnsConfig, rows: Sequence[Mapping[str, Any]]) -> Columns:
    """The columns of a file: what the settings name, else what most of its first rows have.

    Raises:
        BadRow: there is no prompt.
    """

    def common(*names: str) -> str | None:
        counts = {name: sum(_at(row, name) is not None for row in rows) for name in names}
        best = max(counts, key=lambda name: counts[name])
        return best if counts[best] else None

    prompt = settings.prompt or common("prompt", "messages")
    if prompt is None:
        text = "; for a file of plain text set algorithm.data.source=jsonl instead" if "text" in rows[0] else ""
        raise BadRow(f"no column 'prompt' or 'messages'{_has(rows[0])}: name yours with task.columns.prompt=NAME{text}")
    answer = settings.answer or common("answer", VERL_ANSWER)
    return Columns(prompt, answer, settings.completion or common("completion"))


def _at(row: Mapping[str, Any], name: str) -> Any:
    """A column by its name, or by a dotted path into columns that hold objects; None where there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _has(row: Mapping[str, Any]) -> str:
    names = sorted(map(str, row))
    return (
        f" (the row has {', '.join(names[:12])}{', ...' if len(names) > 12 else ''})"
        if names
        else " (the row is empty)"
    )


def _conversation(value: Any, column: str) -> tuple[tuple[Message, ...], str | None]:
    """Messages, and what the assistant says last, which is not among them then."""
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not value:
        raise BadRow(f"column {column!r} is {_described(value)}, neither text nor a list of chat messages")
    messages = tuple(_message(message, number, column) for number, message in enumerate(value))
    if messages[-1]["role"] != "assistant":
        return messages, None
    if len(messages) == 1:
        raise BadRow(f"column {column!r} has nothing but an assistant's message")
    return messages[:-1], messages[-1]["content"]


def _message(value: Any, number: int, column: str) -> Message:
    where = f"message {number} of column {column!r}"
    if not isinstance(value, Mapping):
        raise BadRow(f"{where} is {_described(value)}, not an object with role and content")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES_KEPT:
        raise BadRow(f"{where} has role {role!r}; known are {', '.join(ROLES_KEPT)}")
    # Parquet gives every message the columns of all: those without a value are not there.
    return {**{key: item for key, item in value.items() if item is not None}, "content": _text(content, where)}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        parts = [part for part in content if isinstance(part, Mapping)]
        other = [
            part.get("type") for part in parts if part.get("type") != "text" or not isinstance(part.get("text"), str)
        ]
        if parts and len(parts) == len(content) and not other:
            return "".join(part["text"] for part in parts)
        if other:
            raise BadRow(f"{where} has content of type {other[0]!r}; only text can be used")
    raise BadRow(f"{where} has content that is {_described(content)}, not text")


def _completion(value: Any, column: str) -> str | None:
    if value is None:
        raise BadRow(f"no column {column!r}")
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes) and len(value) == 1:
        message = _message(value[0], 0, column)
        if message["role"] == "assistant":
            content: str = message["content"]
            return content
    raise BadRow(f"column {column!r} is {_described(value)}, neither text nor one message of the assistant")


def _described(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _encodable(example: Example) -> None:
    """JSON can spell half a surrogate pair, which is no text."""
    for text in (*example.texts(), example.completion, example.answer):
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise BadRow(f"half a surrogate pair ({error.object[error.start]!r}) that no text can hold") from None

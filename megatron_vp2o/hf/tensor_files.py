"""Folders of safetensors files, read and written piece by piece.

The format (github.com/huggingface/safetensors): 8 bytes little-endian N, N bytes of JSON {name: {dtype, shape,
data_offsets}, "__metadata__": {...}}, then the data, without holes. Files are read with `pread`, not mapped: mapped pages
count as this process's memory, and a checkpoint is larger than what a conversion may use.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vp2o.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_HEADER = 100_000_000  # what safetensors itself accepts


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file. `start` is the byte in the file where it begins."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension; of the whole tensor if it has none."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Length of the first dimension."""
        return self.shape[0] if self.shape else 1

    @property
    def size(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class TensorFiles:
    """The safetensors files of a checkpoint: their tensors by name and their headers as they are on disk."""

    folder: Path
    entries: dict[str, Entry]
    headers: dict[str, bytes]
    """File name -> all that comes before the data."""
    indexed: bool
    """Whether an index file names the files."""
    ignored_index: bool = False
    """Whether there is an index file that is not read, as transformers does not read it beside a single file."""

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in self.entries.values())

    def read(self, entry: Entry, first: int, count: int) -> Tensor:
        """Rows `first` to `first + count` of a tensor, [count, ...]. Raises CheckpointError for a file that ends early."""
        shape = (count, *entry.shape[1:])
        data = torch.empty(count * entry.row_bytes, dtype=torch.uint8)
        path = self.folder / entry.file
        descriptor = os.open(path, os.O_RDONLY)
        try:
            read_into(descriptor, data, entry.start + first * entry.row_bytes, path)
        finally:
            os.close(descriptor)
        return data.view(entry.dtype).view(shape)


def read_into(descriptor: int, data: Tensor, offset: int, path: Path) -> None:
    """Fill a uint8 tensor from a file. Raises CheckpointError where it ends early."""
    view = raw(data)
    done = 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], offset + done)
        if got == 0:
            raise CheckpointError(f"{path} ends at byte {offset + done}, in the middle of a tensor: copy it again")
        done += got


def write_from(descriptor: int, tensor: Tensor, offset: int) -> None:
    """Write a contiguous tensor's bytes at an offset of a file."""
    view = raw(tensor)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, as uint8 and without a copy."""
    return tensor.reshape(-1).view(torch.uint8)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor; writing to them writes to it."""
    array: Any = bytes_of(tensor).numpy()
    return memoryview(array)


# --- reading a folder -------------------------------------------------------------------------------------------------


def open_folder(folder: Path) -> TensorFiles:
    """Read the headers of a checkpoint and check the files against them and against the index.

    Raises:
        CheckpointError: no safetensors there; or everything that is wrong with them: files missing, cut short or
            malformed, tensors missing, in two files, or not where the index says, dtypes unknown.
    """
    names, weight_map = _file_names(folder)
    problems: list[str] = []
    entries: dict[str, Entry] = {}
    headers: dict[str, bytes] = {}
    files: dict[str, list[str]] = {}  # of the tensors that are in several
    for name in names:
        try:
            headers[name], found = read_header(folder / name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for entry in found:
            if entry.name in entries:
                files.setdefault(entry.name, [entries[entry.name].file]).append(name)
            elif weight_map is not None and entry.name not in weight_map:
                problems.append(f"{entry.name} of {name} is not in {INDEX}")
            entries[entry.name] = entry
    problems += [f"{tensor} is in {', '.join(where)}" for tensor, where in files.items()]
    for tensor, file in (weight_map or {}).items():
        where = files.get(tensor) or ([entries[tensor].file] if tensor in entries else [])
        if file in headers and file not in where:
            problems.append(f"{tensor} is not in {file}, where {INDEX} has it")
    if problems:
        raise CheckpointError(listed(f"{folder} is not a whole checkpoint; copy or download it again", problems))
    ignored = weight_map is None and (folder / INDEX).is_file()
    return TensorFiles(folder, entries, headers, weight_map is not None, ignored)


def _file_names(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: name one with a Hugging Face checkpoint in it")
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} has an {ADAPTER}: its weights are those of a base model and an adapter together. Merge them first "
            "(peft's merge_and_unload, then save_pretrained), or remove the adapter's files to convert what is without it"
        )
    if (folder / SINGLE).is_file():  # before the index, as transformers has it
        return [SINGLE], None
    if (folder / INDEX).is_file():
        try:
            weight_map = parse_json((folder / INDEX).read_bytes())["weight_map"]
            names = sorted(set(weight_map.values()))
            outside = [name for name in names if Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"{folder / INDEX} cannot be read ({error}): copy it again") from error
        if outside or not names:
            what = f"names {outside[0]!r}, which is outside its folder" if outside else "names no files"
            raise CheckpointError(f"{folder / INDEX} {what}: copy it again from a source that you trust")
        return names, weight_map
    other = sorted(path.name for path in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.safetensors"))
    there = f"; it has {', '.join(other[:3])}, which no index names" if other else ""
    raise CheckpointError(
        f"{folder} has neither {INDEX} nor {SINGLE}{there}: save the model with save_pretrained(folder)"
    )


def read_header(path: Path) -> tuple[bytes, list[Entry]]:
    """Everything before the data, and the tensors in the order of the data.

    Raises:
        CheckpointError: the file is missing, malformed, or not as long as its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MOST_HEADER, size - 8):
                raise CheckpointError(f"{path} is cut short, or no safetensors file: {size} bytes")
            text = stream.read(length)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        header = parse_json(text)
        entries = parse_header(header, path.name, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a malformed header: {_short(error)}") from error
    end = 8 + length + sum(entry.size for entry in entries)
    if size != end:
        raise CheckpointError(f"{path} has {size} bytes, and its header describes {end}")
    return length.to_bytes(8, "little") + text, entries


def parse_header(header: Mapping[str, Any], file: str, start: int) -> list[Entry]:
    """Tensors in the order of the data. Raises ValueError where the data would overlap or have holes."""
    ranges = []
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # shared: experts are many and alike
    for name, value in header.items():
        if name == "__metadata__":
            continue
        if value["dtype"] not in DTYPES:
            raise ValueError(f"{name} has dtype {value['dtype']}")
        first, last = value["data_offsets"]
        shape = tuple(value["shape"])
        if any(type(number) is not int for number in (first, last, *shape)):
            raise ValueError(f"{name} has shape {value['shape']} and data_offsets {value['data_offsets']}")
        shape = shapes.setdefault(shape, shape)
        entry = Entry(sys.intern(name), file, DTYPES[value["dtype"]], shape, start + first)
        ranges.append((first, last, entry))
    ranges.sort(key=lambda item: item[:2])
    end = 0
    for first, last, entry in ranges:
        if first != end or last - first != entry.size or min(entry.shape, default=0) < 0:
            raise ValueError(
                f"{entry.name} is at bytes {first} to {last}, where {end} to {end + entry.size} is its place"
            )
        end = last
    return [entry for _, _, entry in ranges]


def parse_json(text: bytes) -> Any:
    """JSON in UTF-8. Raises ValueError, also for a name that is given twice and for nesting that no file needs."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _short(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= 300 else text[:300] + "..."


def config_of(folder: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError where it is missing or not a JSON object."""
    path = folder / "config.json"
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({_short(error)}): a checkpoint needs its config.json") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object: copy it again")
    return config


# --- laying out new files ---------------------------------------------------------------------------------------------


def render_header(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    """The header that safetensors writes for these tensors: wide dtypes first, then by name, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in sorted(tensors, key=lambda item: (-item[1].itemsize, item[0])):
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], most: int) -> dict[str, bytes]:
    """File names and headers for tensors in this order, each file at most `most` bytes of data (or one tensor)."""
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        if filled and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled += size
    if len(shards) == 1:
        return {SINGLE: render_header(shards[0])}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": render_header(part) for i, part in enumerate(shards)}


def entries_of(headers: Mapping[str, bytes]) -> dict[str, Entry]:
    """Tensors by name, of headers that were read or rendered here."""
    found = {}
    for file, header in headers.items():
        for entry in parse_header(json.loads(header[8:]), file, len(header)):
            found[entry.name] = entry
    return found


def render_index(entries: Mapping[str, Entry]) -> str:
    """The index file as transformers 5 writes it."""
    total = sum(entry.size for entry in entries.values())
    parameters = sum(math.prod(entry.shape) for entry in entries.values())
    index = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": {name: entries[name].file for name in sorted(entries)},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def listed(what: str, problems: Sequence[str], most: int = 40) -> str:
    """One message of a heading and indented lines."""
    more = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return "\n  ".join([what + ":", *problems[:most], *more])

"""Megatron's distributed checkpoints (format torch_dist), read and written tensor by tensor without a model.

On disk (torch.distributed.checkpoint.filesystem; megatron/core/dist_checkpointing):

    metadata.json     which format
    common.pt         what is not a tensor
    .metadata         a pickle: for each name the whole shape and its chunks, for each chunk the file and bytes
    __0_0.distcp ...  chunks one after another, each as torch.save writes it

Megatron stacks layers and experts: `decoder.layers.mlp.experts.experts.linear_fc1.weight` is [layers, experts, 2F, D].
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.tensor_files import listed, raw, read_into

METADATA = ".metadata"
_WHOLE = 16 * 2**20  # chunks up to this size are read whole, whatever part of them is wanted


@dataclass(frozen=True, slots=True)
class Region:
    """A box in a stored tensor."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def overlap(self, offsets: Sequence[int], sizes: Sequence[int]) -> Region | None:
        first = tuple(map(max, self.offsets, offsets))
        last = tuple(min(o + s, p + t) for o, s, p, t in zip(self.offsets, self.sizes, offsets, sizes, strict=True))
        if any(a >= b for a, b in zip(first, last, strict=True)):
            return None
        return Region(self.key, first, tuple(b - a for a, b in zip(first, last, strict=True)))

    def inside(self, offsets: Sequence[int]) -> tuple[slice, ...]:
        """This box as an index of a tensor that begins at `offsets`."""
        return tuple(slice(a - b, a - b + s) for a, b, s in zip(self.offsets, offsets, self.sizes, strict=True))


@dataclass(frozen=True, slots=True)
class Item:
    """A chunk and where it is."""

    region: Region
    dtype: torch.dtype
    file: str
    start: int
    length: int


# --- writing ----------------------------------------------------------------------------------------------------------


def write_item(stream: BinaryIO, tensor: Tensor, region: Region, file: str) -> tuple[Item, int]:
    """Append a chunk to an open file. Returns it, and the CRC-32 of its bytes."""
    start = stream.tell()
    tensor = tensor.reshape(region.sizes)
    if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.itemsize:
        tensor = tensor.clone(memory_format=torch.contiguous_format)  # torch.save writes the whole storage of a view
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    view = buffer.getbuffer()
    stream.write(view)
    return Item(region, tensor.dtype, file, start, len(view)), zlib.crc32(view)


def reads_back(path: Path, written: Iterable[tuple[Item, int]]) -> Iterator[Item]:
    """The chunks of a file whose bytes are not those that were written."""
    with path.open("rb", buffering=0) as stream:
        for item, checksum in written:
            data = torch.empty(item.length, dtype=torch.uint8)
            read_into(stream.fileno(), data, item.start, path)
            if zlib.crc32(raw(data)) != checksum:
                yield item


def write_rest(
    folder: Path,
    items: Iterable[Item],
    shapes: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, str],
    nothings: Sequence[str],
) -> None:
    """Write all but the chunks.

    Args:
        shapes: of the whole tensors, by key.
        aliases: further name -> key; both are the same bytes.
        nothings: names that hold None, as Megatron's layers without extra state do.
    """
    by_key = grouped(items)
    wrong = [key for key in shapes if not tiled(by_key.get(key, []), shapes[key])]
    if wrong or by_key.keys() != shapes.keys():
        raise CheckpointError(listed("not written exactly once", [*wrong, *(by_key.keys() - shapes.keys())]))
    described: dict[str, Any] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    names = {key: [key] for key in by_key}
    for alias, key in aliases.items():
        names[key].append(alias)
    sizes: dict[tuple[int, ...], torch.Size] = {}  # shared: experts are many and alike
    for key in list(by_key):
        items_of_key = sorted(by_key.pop(key), key=lambda item: item.region.offsets)
        chunks = [
            ChunkStorageMetadata(
                torch.Size(item.region.offsets), sizes.setdefault(item.region.sizes, torch.Size(item.region.sizes))
            )
            for item in items_of_key
        ]
        whole = TensorStorageMetadata(TensorProperties(dtype=items_of_key[0].dtype), torch.Size(shapes[key]), chunks)
        for name in names[key]:
            described[name] = whole
            for i, (item, chunk) in enumerate(zip(items_of_key, chunks, strict=True)):
                stored[MetadataIndex(name, chunk.offsets, i)] = _StorageInfo(item.file, item.start, item.length)
    if nothings:
        blob, file = io.BytesIO(), "__nothing_0.distcp"
        torch.save([None], blob)  # a list of the objects under one name
        _write(folder / file, blob.getvalue())
        for name in nothings:
            described[name] = BytesStorageMetadata()
            stored[MetadataIndex(name)] = _StorageInfo(file, 0, len(blob.getvalue()))
    with (folder / METADATA).open("wb") as stream:
        _MetadataPickler(stream).dump(Metadata(state_dict_metadata=described, storage_data=stored))
        stream.flush()
        os.fsync(stream.fileno())
    common = io.BytesIO()
    torch.save({}, common)
    _write(folder / "common.pt", common.getvalue())
    # The fields of megatron.core's CheckpointingConfig.
    config = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    _write(folder / "metadata.json", json.dumps(config).encode())


class _MetadataPickler(pickle.Pickler):
    """Writes the many small records as calls of their classes: with a dictionary for each, as pickle would, reading them
    takes twice the memory."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is ChunkStorageMetadata:
            return ChunkStorageMetadata, (value.offsets, value.sizes)
        if type(value) is MetadataIndex:
            return MetadataIndex, (value.fqn, value.offset, value.index)
        if type(value) is _StorageInfo:
            return _StorageInfo, (value.relative_path, value.offset, value.length)
        return NotImplemented


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def grouped(items: Iterable[Item]) -> dict[str, list[Item]]:
    """By key."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.region.key, []).append(item)
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


class StoredTensors:
    """The tensors of a distributed checkpoint, whatever layout wrote it.

    Raises:
        CheckpointError: there is none, it is not of this format, or its files are missing or cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._chunks: dict[str, Chunks] = {}
        metadata = _load_metadata(folder)
        for key, value in metadata.state_dict_metadata.items():
            if isinstance(value, TensorStorageMetadata):
                self.shapes[key], self.dtypes[key] = tuple(value.size), value.properties.dtype
        ends: dict[str, int] = {}
        for _, info in (metadata.storage_data or {}).items():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        _check_lengths(folder, ends)
        files = {name: number for number, name in enumerate(ends)}
        for key, value in metadata.state_dict_metadata.items():
            if isinstance(value, TensorStorageMetadata):
                self._chunks[key] = self._found(key, value, metadata, files)

    def _found(self, key: str, value: TensorStorageMetadata, metadata: Metadata, files: dict[str, int]) -> Chunks:
        boxes, places = [], []
        for chunk in value.chunks:
            info = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
            if info is None or getattr(info, "transform_descriptors", None):
                raise CheckpointError(
                    f"{self.folder}: a chunk of {key} is not stored as plain bytes; save it without transforms"
                )
            boxes.append((*chunk.offsets, *chunk.sizes))
            places.append((files[info.relative_path], info.offset, info.length))
        table = numpy.array(boxes, dtype=numpy.int64).reshape(len(boxes), 2 * len(value.size))
        return Chunks(key, self.dtypes[key], tuple(files), table, numpy.array(places))

    def items(self, key: str) -> list[Item]:
        return self._chunks[key].items()

    def untiled(self, key: str) -> bool:
        """Whether the chunks of a tensor don't cover it exactly once."""
        return not tiled(self._chunks[key].items(), self.shapes[key])

    def read(self, region: Region) -> Tensor:
        """A box of a tensor. Raises CheckpointError where the file holds something else or parts of it are missing."""
        return read_region(self.folder, self._chunks[region.key], region)


def tiled(items: Sequence[Item], shape: Sequence[int]) -> bool:
    """Whether chunks cover a tensor exactly once: they lie inside, begin at different places, and fill it."""
    inside = all(
        o + s <= n for item in items for o, s, n in zip(item.region.offsets, item.region.sizes, shape, strict=True)
    )
    disjoint = len({item.region.offsets for item in items}) == len(items)
    return inside and disjoint and sum(math.prod(item.region.sizes) for item in items) == math.prod(shape)


class Chunks:
    """The chunks of one tensor. Kept as tables of numbers: as objects they would be most of a conversion's memory."""

    def __init__(self, key: str, dtype: torch.dtype, files: tuple[str, ...], boxes: Any, places: Any) -> None:
        """Args:
        boxes: int64 [chunks, 2 * dimensions], offsets and sizes.
        places: int64 [chunks, 3], the number of the file, and first byte and length there.
        """
        self.dtype = dtype
        self._key, self._files, self._places = key, files, places
        self._offsets, self._sizes = numpy.split(boxes, 2, axis=1)
        single = (self._sizes == 1).all(axis=0)[:2].tolist()  # dimensions that only stack others: layers, experts
        self._stacked = [*single, False].index(False)
        self._span = int(self._offsets[:, 1].max(initial=0)) + 1 if self._stacked == 2 else 1
        self._place = self._number(self._offsets.T) if self._stacked else None

    def _number(self, offsets: Any) -> Any:
        """One for each place in the stacking dimensions."""
        return offsets[0] if self._stacked == 1 else offsets[0] * self._span + offsets[1]

    def _item(self, chunk: int) -> Item:
        file, start, length = self._places[chunk].tolist()
        region = Region(self._key, tuple(self._offsets[chunk].tolist()), tuple(self._sizes[chunk].tolist()))
        return Item(region, self.dtype, self._files[file], start, length)

    def items(self) -> list[Item]:
        return [self._item(chunk) for chunk in range(len(self._places))]

    def near(self, region: Region) -> list[Item]:
        """Those that may overlap a box."""
        if self._place is None or any(size != 1 for size in region.sizes[: self._stacked]):
            return self.items()
        found = numpy.flatnonzero(self._place == self._number(region.offsets))
        return [self._item(chunk) for chunk in found.tolist()]


def read_region(folder: Path, chunks: Chunks, region: Region) -> Tensor:
    """A box of a tensor that has these chunks. Raises CheckpointError as `StoredTensors.read`."""
    found = torch.empty(region.sizes, dtype=chunks.dtype)
    elements = 0
    for item in chunks.near(region):
        part = region.overlap(item.region.offsets, item.region.sizes)
        if part is not None:
            found[part.inside(region.offsets)] = _read_item(folder / item.file, item, part)
            elements += math.prod(part.sizes)
    if elements != found.numel():
        raise CheckpointError(f"{folder} holds {elements} of {found.numel()} numbers of {region.key}")
    return found


def _read_item(path: Path, item: Item, part: Region) -> Tensor:
    with path.open("rb", buffering=0) as stream:
        window = _Window(stream, item.start, item.length)
        try:
            if item.length > _WHOLE and part.sizes != item.region.sizes:
                rows = _read_rows(window, stream.fileno(), item, part, path)
                if rows is not None:
                    return rows
                window.seek(0)
            tensor = torch.load(cast(IO[bytes], window), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged at {item.region.key}: {error}") from error
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != item.region.sizes or tensor.dtype != item.dtype:
        raise CheckpointError(f"{path} has another tensor than {item.region.key} where that should be")
    return tensor[part.inside(item.region.offsets)]


def _read_rows(window: _Window, descriptor: int, item: Item, part: Region, path: Path) -> Tensor | None:
    """The box `part` of a chunk, if it is one range of bytes; else None."""
    wanted, sizes = part.inside(item.region.offsets), item.region.sizes
    axis = next(i for i, (a, b) in enumerate(zip(part.sizes, sizes, strict=True)) if a != b)
    if math.prod(sizes[:axis]) != 1 or part.sizes[axis + 1 :] != sizes[axis + 1 :]:
        return None
    with FakeTensorMode():  # reads the description only, and notes where the data begins
        fake = torch.load(cast(IO[bytes], window), map_location="cpu", weights_only=True)
    begin = getattr(fake.untyped_storage(), "_checkpoint_offset", None)
    if begin is None or not fake.is_contiguous() or fake.storage_offset() or tuple(fake.shape) != sizes:
        return None
    row = math.prod(sizes[axis + 1 :]) * item.dtype.itemsize
    data = torch.empty(part.sizes[axis] * row, dtype=torch.uint8)
    read_into(descriptor, data, item.start + begin + wanted[axis].start * row, path)
    return data.view(item.dtype).view(part.sizes)


class _Window(io.RawIOBase):
    """A range of bytes of a file, as a file."""

    def __init__(self, stream: Any, start: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._start, self._length, self._at = stream.fileno(), start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        got = os.preadv(self._descriptor, [view], self._start + self._at) if len(view) else 0
        self._at += got
        return got


def _check_lengths(folder: Path, ends: Mapping[str, int]) -> None:
    for name, end in sorted(ends.items()):
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise CheckpointError(f"{path} is missing: copy the checkpoint again")
        if path.stat().st_size < end:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes of {end}: copy the checkpoint again")


_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "Path"},  # from Python 3.13 on
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the classes that torch and Megatron put into .metadata, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong there")
        return super().find_class(module, name)


def _load_metadata(folder: Path) -> Metadata:
    path = folder / METADATA
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {METADATA}: name the folder of one Megatron distributed checkpoint (format torch_dist)"
        )
    try:
        with path.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): copy the checkpoint again") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} holds a {type(metadata).__name__}: it is no checkpoint's")
    return metadata

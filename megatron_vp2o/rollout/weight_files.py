"""A set of weights as files: how it travels to servers, and what one that was restarted starts from.

A folder holds what a Hugging Face model is: config.json, a tokenizer, and safetensors files of about one bucket each. It appears
whole or not at all, and its manifest says how many tensors and bytes it has, with digests of the files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_vp2o.errors import SyncError


@dataclass(frozen=True)
class WeightFile:
    """One file of a set."""

    name: str
    tensors: int
    bytes: int  # of the tensors
    digest: str  # blake2b of the whole file, 8 bytes in hexadecimal


@dataclass(frozen=True)
class WeightSet:
    """A whole set of weights on disk."""

    folder: Path
    files: tuple[WeightFile, ...]

    @property
    def tensors(self) -> int:
        return sum(file.tensors for file in self.files)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def digest(self) -> str:
        """Hash of the files' digests in order. Equal weights give equal digests."""
        return hashlib.blake2b(b"".join(bytes.fromhex(file.digest) for file in self.files), digest_size=8).hexdigest()

    def remove(self) -> None:
        """Delete the folder; servers that loaded from it hold copies."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_weights(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    describe: Callable[[Path], object],
    bucket_bytes: int,
) -> WeightSet:
    """Write a set to `folder`. Takes all tensors to the end of the stream, even after one that is wrong.

    Args:
        shapes: names and shapes of the whole set.
        describe: writes config.json and the tokenizer into a folder.
        bucket_bytes: of tensors in one file (at least one is); bounds the memory that this takes.

    Raises:
        SyncError: the stream is not that set, or a file cannot be written. Nothing is left in `folder` then.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    writer = _Writer(partial, bucket_bytes)

    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    problems = take_all(weights, shapes, begin, writer.add, lambda: _finish(writer, describe, folder))
    if problems:
        shutil.rmtree(partial, ignore_errors=True)
        raise SyncError(f"the weights for the servers could not be written to {folder}: {problems}")
    return WeightSet(folder, tuple(writer.files))


def take_all(
    weights: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    begin: Callable[[], object],
    add: Callable[[str, Tensor], object],
    finish: Callable[[], object],
) -> str:
    """Take all tensors of a stream to its end, because other ranks may be sending them, and add those of a set that is right.

    Returns:
        What is wrong with the set, or kept this machine from taking it; empty: nothing, and it is finished.
    """
    left = dict(shapes)
    problems = _attempt(begin)
    for name, tensor in weights:
        wanted = left.pop(name, None)
        if wanted != tuple(tensor.shape):
            of = "unknown, or there twice" if wanted is None else f"not {list(wanted)}"
            problems.append(f"{name} {list(tensor.shape)} is {of}")
        if not problems:
            problems += _attempt(lambda n=name, t=tensor: add(n, t))  # type: ignore[misc]
    problems += [f"{name} is missing" for name in left]
    if not problems:
        problems += _attempt(finish)
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return f"{'; '.join(problems[:3])}{more}"


def _finish(writer: _Writer, describe: Callable[[Path], object], folder: Path) -> None:
    writer.flush()
    describe(writer.folder)
    writer.folder.rename(folder)


def _attempt(action: Callable[[], object]) -> list[str]:
    try:
        action()
    except OSError as error:
        return [str(error)]
    return []


class _Writer:
    """Collects tensors until they fill a file."""

    def __init__(self, folder: Path, bucket_bytes: int) -> None:
        self.folder, self.bucket_bytes = folder, bucket_bytes
        self.files: list[WeightFile] = []
        self._bucket: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self._bucket[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes >= self.bucket_bytes:
            self.flush()

    def flush(self) -> None:
        if not self._bucket:
            return
        name = f"model-{len(self.files) + 1:05d}.safetensors"
        save_file(self._bucket, self.folder / name, metadata={"format": "pt"})
        digest = hashlib.blake2b(digest_size=8)
        with (self.folder / name).open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        self.files.append(WeightFile(name, len(self._bucket), self._bytes, digest.hexdigest()))
        self._bucket, self._bytes = {}, 0


def default_folder(run_dir: Path) -> Path:
    """Where sets of weights go if the settings do not say: shared memory where there is some, else the run folder."""
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK):
        return shared / f"megatron_vp2o-{os.getuid()}" / f"{run_dir.resolve().name}-{os.getpid()}"
    return run_dir / "weights"


def random_probe_tokens(vocabulary: int, *, sequences: int = 8, length: int = 24, seed: int = 0) -> list[list[int]]:
    """Token ids for a probe: no text, so that every part of the vocabulary has its say."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (sequences, length), generator=generator).tolist()

"""How a set of weights gets from the first rank to servers. Everything else of an update is the same (`api.Server.load`).

    FileTransfer        writes files that servers read: in shared memory, or on a file system that both see
    BroadcastTransfer   keeps buffers in the first rank's memory, and broadcasts them to each server's workers in a process group
                        of its own (`server_side/vp2o_broadcast.py`): gloo on CPUs, nccl on GPUs

Either announces each part with what is in it, and ends with what all of it comes to; the server compares. The set is kept until
the next one is proven: whatever server is restarted meanwhile gets it again.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.errors import SyncError
from megatron_vp2o.rollout.answers import BadAnswer
from megatron_vp2o.rollout.api import Server
from megatron_vp2o.rollout.server_side.vp2o_broadcast import (
    Entry,
    Group,
    Meeting,
    address_towards,
    checksum,
    pack,
    whole_checksum,
)
from megatron_vp2o.rollout.weight_files import WeightSet, take_all, write_weights

BUCKET_BYTES = 256 * 2**20
MEET_S = 60.0
"""How long a server's workers may take to come to a group's meeting."""
LAST_WORDS_S = 2.0
"""How long a server may take to say why it left a broadcast."""


class Weights(Protocol):
    """A whole set of weights, as a transfer keeps it."""

    @property
    def folder(self) -> Path:
        """What a server is started with."""
        ...

    @property
    def tensors(self) -> int: ...

    @property
    def bytes(self) -> int: ...

    @property
    def digest(self) -> str:
        """64 bits in hexadecimal; equal weights give equal ones."""
        ...

    def remove(self) -> None:
        """Delete what is on disk; servers that loaded it hold copies."""


class Transfer(Protocol):
    """One way for weights."""

    def take(
        self,
        folder: Path,
        weights: Iterable[tuple[str, Tensor]],
        shapes: Mapping[str, tuple[int, ...]],
        describe: Callable[[Path], object],
    ) -> Any:
        """A stream as a set that `send` takes; see `weight_files.write_weights`. Raises SyncError."""
        ...

    async def prepare(self, server: Server, timeout: float) -> None:
        """Before the first update of a server, and again after it was started anew. Raises httpx.HTTPError or BadAnswer."""
        ...

    async def send(self, server: Server, weights: Any, timeout: float) -> None:
        """Between start and finish of an update. Raises httpx.HTTPError or BadAnswer."""
        ...

    def forget(self, url: str) -> None:
        """Whatever connects to a server is not to be used any more."""

    async def close(self) -> None:
        """Leave all servers."""


class FileTransfer:
    """Implements `Transfer` with files."""

    def take(
        self,
        folder: Path,
        weights: Iterable[tuple[str, Tensor]],
        shapes: Mapping[str, tuple[int, ...]],
        describe: Callable[[Path], object],
    ) -> WeightSet:
        """See `Transfer.take`."""
        return write_weights(folder, weights, shapes, describe=describe, bucket_bytes=BUCKET_BYTES)

    async def prepare(self, server: Server, timeout: float) -> None:
        """See `Transfer.prepare`."""
        await server.join({}, timeout)

    async def send(self, server: Server, weights: WeightSet, timeout: float) -> None:
        """See `Transfer.send`."""
        folder = str(weights.folder)
        for file in weights.files:
            part = {"file": file.name, "tensors": file.tensors, "bytes": file.bytes, "digest": file.digest}
            await server.update({"folder": folder, **part}, timeout)
        total = {"file": "", "tensors": weights.tensors, "bytes": weights.bytes, "digest": weights.digest}
        await server.update({"folder": folder, **total}, timeout)

    def forget(self, url: str) -> None:
        """Nothing connects to a server."""

    async def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Bucket:
    """Some tensors of a set, in the first rank's memory."""

    entries: tuple[Entry, ...]
    buffer: Tensor  # uint8, on the host
    checksum: int


@dataclass(frozen=True)
class HeldWeights:
    """Implements `Weights` with buffers. Its folder has config.json and the tokenizer."""

    folder: Path
    buckets: tuple[Bucket, ...]
    tensors: int
    bytes: int

    @property
    def digest(self) -> str:
        """See `Weights.digest`."""
        return f"{whole_checksum([bucket.checksum for bucket in self.buckets]):016x}"

    def remove(self) -> None:
        """See `Weights.remove`. Buffers go with the last reference."""
        shutil.rmtree(self.folder, ignore_errors=True)


class BroadcastTransfer:
    """Implements `Transfer` with a process group for each server: this process and the server's workers.

    Groups of their own, because a server that dies breaks its group, and the others are not to start anew for that. A group lives
    until a sync fails, or the server is started anew.

    Args:
        device: buffers are sent from it; a CUDA device means nccl.
        address: at which servers reach this process; None: that of the interface which leads to the server.
        timeout_s: of each broadcast.
        bucket_bytes: of tensors in one broadcast (at least one is); bounds the memory that it takes beside the set.
    """

    def __init__(
        self,
        device: torch.device,
        address: str | None = None,
        *,
        timeout_s: float = 300.0,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.device, self.address, self.timeout_s, self.bucket_bytes = device, address, timeout_s, bucket_bytes
        self._groups: dict[str, Group] = {}

    def take(
        self,
        folder: Path,
        weights: Iterable[tuple[str, Tensor]],
        shapes: Mapping[str, tuple[int, ...]],
        describe: Callable[[Path], object],
    ) -> HeldWeights:
        """See `Transfer.take`."""
        packer = _Packer(self.bucket_bytes)

        def begin() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

        def finish() -> None:
            packer.flush()
            describe(folder)

        if problems := take_all(weights, shapes, begin, packer.add, finish):
            shutil.rmtree(folder, ignore_errors=True)
            raise SyncError(f"the weights for the servers could not be taken: {problems}")
        return HeldWeights(folder, tuple(packer.buckets), packer.tensors, packer.bytes)

    async def prepare(self, server: Server, timeout: float) -> None:
        """See `Transfer.prepare`. Makes the group of the server."""
        self.forget(server.url)
        workers = await server.workers()
        host = urlsplit(server.url).hostname or ""
        stop = threading.Event()
        try:
            found = str(self.address or await asyncio.to_thread(address_towards, host))
            timeout = min(timeout, MEET_S)
            limit = timedelta(seconds=timeout)
            store = dist.TCPStore("localhost", 0, workers + 1, True, limit, wait_for_workers=False)
        except (OSError, RuntimeError, dist.DistError) as error:
            raise BadAnswer(
                f"no address of this machine that servers could connect to: {error}. Name one (rollout.server.trainer_address)"
            ) from error
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        meeting = Meeting(found, store.port, uuid.uuid4().hex, workers + 1, backend, timeout, self.timeout_s)

        def join() -> Group:
            return Group(meeting, 0, self.device, store=store, stopped=stop.is_set)

        joined = server.join(meeting.as_json(), timeout + LAST_WORDS_S)
        self._groups[server.url] = await _both(joined, join, stop)

    async def send(self, server: Server, weights: HeldWeights, timeout: float) -> None:
        """See `Transfer.send`."""
        if server.url not in self._groups:
            await self.prepare(server, timeout)
        group, stop = self._groups[server.url], threading.Event()
        group.stopped = stop.is_set
        try:
            for bucket in weights.buckets:
                part = {"entries": bucket.entries, "digest": f"{bucket.checksum:016x}"}
                told = server.update(part, timeout + LAST_WORDS_S)
                await _both(told, partial(self._broadcast, group, bucket), stop)
            total = {"tensors": weights.tensors, "bytes": weights.bytes, "digest": weights.digest}
            await server.update({"entries": [], **total}, timeout)
        except BaseException:
            self.forget(server.url)
            raise

    def _broadcast(self, group: Group, bucket: Bucket) -> None:
        group.broadcast(bucket.buffer.to(self.device))

    def forget(self, url: str) -> None:
        """See `Transfer.forget`."""
        if (group := self._groups.pop(url, None)) is not None:
            group.close()

    async def close(self) -> None:
        """See `Transfer.close`."""
        for url in list(self._groups):
            self.forget(url)


async def _both(told: Any, work: Callable[[], Any], stop: threading.Event) -> Any:
    """What a server is told, and this side's part of the same thing in a thread. Returns what the thread does.

    Raises:
        httpx.HTTPError or BadAnswer: either failed. The other was given up, and nothing of it goes on.
    """
    request = asyncio.ensure_future(told)
    own = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.wait({request, own}, return_when=asyncio.FIRST_EXCEPTION)
        if own.done() and (error := own.exception()) is not None:
            await asyncio.wait({request}, timeout=LAST_WORDS_S)  # the server may know better why
            if not isinstance(error, RuntimeError | OSError):
                raise error
            if not request.done() or isinstance(request.exception(), httpx.HTTPError | None):
                raise BadAnswer(f"the broadcast to it failed: {' '.join(str(error).split())[:300]}") from error
        request.result()
        return own.result()
    finally:
        stop.set()
        request.cancel()
        await asyncio.gather(request, own, return_exceptions=True)
        stop.clear()


class _Packer:
    """Collects tensors until they fill a bucket."""

    def __init__(self, bucket_bytes: int) -> None:
        self.bucket_bytes = bucket_bytes
        self.buckets: list[Bucket] = []
        self.tensors = self.bytes = 0
        self._tensors: list[tuple[str, Tensor]] = []
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self._tensors.append((name, tensor.detach().clone()))
        size = tensor.numel() * tensor.element_size()
        self._bytes += size
        self.bytes += size
        self.tensors += 1
        if self._bytes >= self.bucket_bytes:
            self.flush()

    def flush(self) -> None:
        """Where the tensors are, their checksum is made."""
        if not self._tensors:
            return
        entries, buffer = pack(self._tensors)
        self.buckets.append(Bucket(tuple(entries), buffer.cpu(), checksum(buffer)))
        self._tensors, self._bytes = [], 0

"""A broadcast of weights from the trainer to the workers of a server: what both sides share, and what the receiving side does.

    Meeting   where and under which name a group of processes is made for the purpose; the trainer names it
    Group     that process group: rank 0 is the trainer, the others are the workers of one server
    pack      tensors as one flat buffer of bytes, and a manifest of what lies in it
    Received  counts what arrives, and compares it with what was sent

It is torch and nothing else, so that the same code runs in the trainer, in vLLM's workers (`vp2o_vllm.py`, whose environment has
none of megatron_vp2o) and in tests. The backend is gloo on CPUs and nccl on GPUs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ALIGN = 16
"""Where a tensor begins in a buffer is a multiple of this, bytes: any data type can be seen in it, and words of checksums."""
Entry = tuple[str, str, Sequence[int]]
"""Of a tensor in a buffer: its name, its data type as in `torch.float32` without the package, its shape."""

_HANDSHAKE = 8  # bytes of the first broadcast
_CHUNK = 2**16
"""Words of a checksum that are weighted at once: 512 KiB, which stays in a cache."""
_STEP = 0x7A3D70A3D70A3D71


# What lies in a buffer


def pack(tensors: Sequence[tuple[str, Tensor]]) -> tuple[list[Entry], Tensor]:
    """Tensors as one buffer on their device, uint8 [bytes], and what lies in it, in order."""
    entries: list[Entry] = [
        (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors
    ]
    ends, device = _ends(entries), tensors[0][1].device
    buffer = torch.zeros(ends[-1], dtype=torch.uint8, device=device)
    for begin, (_, tensor) in zip([0, *ends], tensors, strict=False):
        flat = tensor.detach().to(device).contiguous().view(-1).view(torch.uint8)
        buffer[begin : begin + len(flat)] = flat
    return entries, buffer


def unpack(entries: Sequence[Entry], buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a buffer, as views into it."""
    for begin, (name, kind, shape) in zip([0, *_ends(entries)], entries, strict=False):
        dtype = getattr(torch, kind)
        size = torch.Size(shape).numel() * dtype.itemsize
        yield name, buffer[begin : begin + size].view(dtype).view(tuple(shape))


def buffer_bytes(entries: Sequence[Entry]) -> int:
    """How long the buffer of these tensors is."""
    return _ends(entries)[-1]


def _ends(entries: Sequence[Entry]) -> list[int]:
    """Where each tensor ends in a buffer, with what it takes to the next place where one may begin."""
    ends, end = [], 0
    for _, kind, shape in entries:
        size = torch.Size(shape).numel() * getattr(torch, kind).itemsize
        end += -(-size // ALIGN) * ALIGN
        ends.append(end)
    return ends


@torch.no_grad()
def checksum(buffer: Tensor) -> int:
    """64 bits that depend on every byte of a buffer (uint8, its length a multiple of 8) and on where it is; made on its device.

    Words of 8 bytes are weighted by different odd numbers and added up, modulo 2^64. An odd number has an inverse, so that another
    value of one word always changes the result; several that change together escape it by a coincidence of one in 2^64.
    """
    words = buffer.view(torch.int64)
    index = torch.arange(1, min(_CHUNK, len(words)) + 1, dtype=torch.int64, device=buffer.device)
    mixed = index * 0x1E3779B97F4A7C15
    odd = (mixed ^ ((mixed >> 29) * index)) | 1
    total = torch.zeros((), dtype=torch.int64, device=buffer.device)
    for part in words.split(_CHUNK):
        total = total * _STEP + (part * odd[: len(part)]).sum()
    return int(total.item()) & (2**64 - 1)


def whole_checksum(parts: Sequence[int]) -> int:
    """Of the checksums of all buffers of a set, in order."""
    total = len(parts)
    for part in parts:
        total = (total * _STEP + 2 * part + 1) % 2**64
    return total


class Received:
    """What of a set has arrived, against what was sent."""

    def __init__(self) -> None:
        self.tensors = self.bytes = 0
        self.parts: list[int] = []
        self.whole = False

    def tensors_of(self, entries: Sequence[Entry], buffer: Tensor, wanted: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a buffer that arrived, counted as they are taken. `wanted`: its checksum where it was sent, as text.

        Raises:
            ValueError: it is not what was sent.
        """
        found = checksum(buffer)
        if f"{found:016x}" != wanted:
            raise ValueError(f"a buffer of {len(entries)} tensors has the checksum {found:016x}, and {wanted} was sent")
        self.parts.append(found)
        return self._counted(unpack(entries, buffer))

    def _counted(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            self.tensors += 1
            self.bytes += tensor.numel() * tensor.element_size()
            yield name, tensor

    def compare(self, tensors: int, size: int, wanted: str) -> None:
        """Whether all of the set has arrived. Raises ValueError."""
        found = self.tensors, self.bytes, f"{whole_checksum(self.parts):016x}"
        if found != (tensors, size, wanted) or not self.tensors:
            raise ValueError(
                f"the update is not whole: {found[0]} tensors of {found[1]} bytes (checksum {found[2]}) arrived of {tensors} of "
                f"{size} ({wanted})"
            )
        self.whole = True


# The group of processes


@dataclass(frozen=True)
class Meeting:
    """Where the trainer and the workers of one server meet."""

    address: str  # of the trainer
    port: int
    name: str  # of this group; another attempt has another
    size: int  # workers and the trainer
    backend: str  # gloo or nccl
    meet_s: float  # until all are there
    timeout_s: float  # of each broadcast

    def as_json(self) -> dict[str, Any]:
        """What `Meeting(**...)` takes elsewhere."""
        return asdict(self)


class Stopped(RuntimeError):
    """Whoever waits for a broadcast has given it up."""


class Group:
    """A process group made for one server's weights. One thread at a time uses it.

    Args:
        rank: 0 is the trainer, which holds the `store`; workers connect to it.
        device: where buffers are.
        stopped: asked while this waits; when it says yes, what is under way is given up.

    Raises:
        RuntimeError: not all have come in time, or they were given another name.
    """

    def __init__(
        self,
        meeting: Meeting,
        rank: int,
        device: torch.device,
        *,
        store: dist.Store | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.meeting, self.rank, self.device, self.stopped = meeting, rank, device, stopped
        self._work: Any = None
        self._group: Any = None
        limit = timedelta(seconds=meeting.meet_s)
        if store is None:
            try:
                store = dist.TCPStore(meeting.address, meeting.port, meeting.size, False, limit)
            except (RuntimeError, dist.DistError) as error:
                raise RuntimeError(
                    f"the trainer cannot be reached at {meeting.address}:{meeting.port}, where it said it would be: {error}"
                ) from error
        store = dist.PrefixStore(meeting.name, store)
        self._gather(store)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._group = _process_group(store, meeting, rank, address_towards(meeting.address))
        try:
            self._shake_hands()
        except BaseException:
            self.close()
            raise

    def _gather(self, store: dist.Store) -> None:
        """Wait for the others here, where waiting can be given up: making a process group cannot."""
        store.set(f"here/{self.rank}", "1")
        keys = [f"here/{rank}" for rank in range(self.meeting.size)]
        deadline = time.monotonic() + self.meeting.meet_s
        while not store.check(keys):
            self._look(deadline, f"the others have not come within {self.meeting.meet_s:g} s")
            time.sleep(0.01)

    def _look(self, deadline: float, what: str) -> None:
        if self.stopped():
            raise Stopped("nobody waits for it any more")
        if time.monotonic() > deadline:
            raise RuntimeError(what)

    def _shake_hands(self) -> None:
        """The first broadcast: it makes the connections, and shows that they are those of this meeting."""
        told = sum(self.meeting.name.encode()) % 251
        hand = torch.full((_HANDSHAKE,), told if self.rank == 0 else 255, dtype=torch.uint8, device=self.device)
        self.broadcast(hand)
        if hand.tolist() != [told] * _HANDSHAKE:
            raise RuntimeError(f"the first broadcast of {self.meeting.name} was not the trainer's")

    def broadcast(self, buffer: Tensor) -> None:
        """From the trainer's buffer to the workers', of the same length. After an error the group is of no use: `close` it.

        Raises:
            RuntimeError: somebody is gone, or has not taken part in time. Stopped: it was given up.
        """
        deadline = time.monotonic() + self.meeting.timeout_s
        self._work = work = self._group.broadcast(buffer, 0, timedelta(seconds=self.meeting.timeout_s))
        pause = 1e-4
        while not work.is_completed():
            self._look(deadline, f"a broadcast of {len(buffer)} bytes was not over within {self.meeting.timeout_s:g} s")
            time.sleep(pause)
            pause = min(2 * pause, 5e-3)
        work.wait()
        self._work = None

    def receive(self, size: int) -> Tensor:
        """For a worker: the buffer that the trainer broadcasts now."""
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.broadcast(buffer)
        return buffer

    def close(self) -> None:
        """Leave: the others' broadcasts end with an error. Returns at once, whatever is under way."""
        group, work = self._group, self._work
        self._group = self._work = None
        if group is None:
            return
        with contextlib.suppress(RuntimeError):
            group.abort()
        if work is not None:
            # A group with a broadcast under way that is let go holds up its whole process until that has run out of time.
            threading.Thread(target=_outlive, args=(group, work), name="left-broadcast", daemon=True).start()


def _outlive(group: Any, work: Any) -> None:
    """Hold a process group until nothing is under way in it."""
    while not work.is_completed():
        time.sleep(0.05)
    del work, group


def _process_group(store: dist.Store, meeting: Meeting, rank: int, address: str) -> Any:
    """A group beside torch's own one of this process, if it has one."""
    limit = timedelta(seconds=meeting.meet_s)  # until all are connected
    if meeting.backend == "gloo":
        gloo: Any = dist.ProcessGroupGloo  # torch's types lack the options
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=address)]
        options._timeout, options._threads = limit, 1
        return gloo(store, rank, meeting.size, options)
    options = dist.ProcessGroupNCCL.Options()
    # `Group.broadcast` looks at the time. NCCL's watchdog would end the process, of the trainer too, where a server has died.
    options._timeout = timedelta(seconds=10 * meeting.timeout_s)
    with _variable("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"):
        return dist.ProcessGroupNCCL(store, rank, meeting.size, options)


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def address_towards(host: str) -> str:
    """The address of this machine that a host sees, by the interface that leads to it. Raises OSError where there is none."""
    family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        return str(probe.getsockname()[0])

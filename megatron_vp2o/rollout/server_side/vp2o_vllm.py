"""Loaded by a vLLM server (`--worker-extension-cls vp2o_vllm.Extension`): weights that arrive as files, or by broadcast.

It runs in the server's environment and imports nothing of megatron_vp2o; its folder is put on the server's PYTHONPATH. Two backends
of vLLM's own weight-transfer protocol (`--weight-transfer-config '{"backend": "vp2o_file"}'`, or `vp2o_broadcast`): between
/start_weight_update and /finish_weight_update the trainer posts one /update_weights for each file or broadcast, and a last one with
what all of them come to. A part whose bytes are not those that were sent, and an update that is not whole, raise: vLLM itself
accepts an update without a single tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vp2o_broadcast import Group, Meeting, Received, buffer_bytes

FILES, BROADCAST = "vp2o_file", "vp2o_broadcast"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One file, or with `file` empty the sums over all files of the update."""

    folder: str = ""
    file: str = ""
    tensors: int = -1
    bytes: int = -1
    digest: str = ""  # blake2b of the file; of all files' digests in order


class Engine(WeightTransferEngine):
    """Reloads a model layer by layer, and finishes only what was found to be whole."""

    def start_weight_update(self) -> None:
        self._whole = False
        initialize_layerwise_reload(self.model)
        if self.device.type == "cpu":
            self._pack_experts_again()

    def _pack_experts_again(self) -> None:
        """On CPUs vLLM packs experts' weights only where it believes that they are loaded for the first time; a reload
        without that computes with the weights of before (unquantized_fused_moe_method.py, `_setup_kernel`)."""
        for module in self.model.modules():
            if type(module).__name__ == "RoutedExperts":
                module.quant_method.moe_kernel = None

    def finish_weight_update(self) -> None:
        if not self._whole:
            raise ValueError("the update cannot be finished: nobody said what all of it comes to, or it was not that")
        finalize_layerwise_reload(self.model, self.model_config)


class FileEngine(Engine):
    """Loads files as they come, and insists on all of them."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        self._tensors = self._bytes = 0
        self._digest = hashlib.blake2b(digest_size=8)
        super().start_weight_update()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.file:
            self._take(Path(update_info.folder) / update_info.file, update_info)
        else:
            self._compare_sums(update_info)

    def _take(self, path: Path, wanted: UpdateInfo) -> None:
        digest = hashlib.blake2b(path.read_bytes(), digest_size=8).digest()
        if digest.hex() != wanted.digest:
            raise ValueError(f"{path} is not the file that was sent: its digest is {digest.hex()}, not {wanted.digest}")
        tensors, size = self._tensors, self._bytes
        self.model.load_weights(self._read(path))
        found = self._tensors - tensors, self._bytes - size
        if found != (wanted.tensors, wanted.bytes):
            raise ValueError(
                f"of {path} {found[0]} tensors of {found[1]} bytes were loaded, and {wanted.tensors} of {wanted.bytes} were sent"
            )
        self._digest.update(digest)

    def _read(self, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                tensor = file.get_tensor(name)
                self._tensors += 1
                self._bytes += tensor.numel() * tensor.element_size()
                yield name, tensor

    def _compare_sums(self, wanted: UpdateInfo) -> None:
        found = (self._tensors, self._bytes, self._digest.hexdigest())
        if found != (wanted.tensors, wanted.bytes, wanted.digest) or not self._tensors:
            raise ValueError(
                f"the update is not whole: {found[0]} tensors of {found[1]} bytes (digest {found[2]}) arrived of "
                f"{wanted.tensors} of {wanted.bytes} ({wanted.digest})"
            )
        self._whole = True

    def shutdown(self) -> None:
        """Nothing is held."""


@dataclass
class MeetingInfo(WeightTransferInitInfo):
    """Where the trainer waits for the server's workers; see `vp2o_broadcast.Meeting`."""

    address: str
    port: int
    name: str
    size: int
    backend: str
    meet_s: float
    timeout_s: float


@dataclass
class BroadcastInfo(WeightTransferUpdateInfo):
    """What lies in the buffer that is broadcast now, or with no `entries` the sums over all buffers of the update."""

    entries: list[Any] = field(default_factory=list)  # of each tensor: name, data type, shape
    tensors: int = -1
    bytes: int = -1
    digest: str = ""  # checksum of the buffer; of all buffers' checksums in order


class BroadcastEngine(Engine):
    """Loads buffers as they come, and insists on all of them. Every worker of a server gets all tensors and takes its part."""

    init_info_cls = MeetingInfo
    update_info_cls = BroadcastInfo
    _group: Group | None = None

    def init_transfer_engine(self, init_info: MeetingInfo) -> None:
        self.shutdown()
        own, meeting = self.parallel_config, Meeting(**vars(init_info))
        rank = 1 + own.data_parallel_index * own.world_size + own.rank
        on = self.device if meeting.backend == "nccl" else torch.device("cpu")
        self._group = Group(meeting, rank, on)

    def start_weight_update(self) -> None:
        self._received = Received()
        super().start_weight_update()

    def receive_weights(self, update_info: BroadcastInfo) -> None:
        entries = update_info.entries
        try:
            if not entries:
                self._received.compare(update_info.tensors, update_info.bytes, update_info.digest)
                self._whole = True
                return
            if self._group is None:
                raise ValueError("no trainer has made a group with this server's workers")
            buffer = self._group.receive(buffer_bytes(entries))
            self.model.load_weights(self._received.tensors_of(entries, buffer, update_info.digest))
        except BaseException:
            self.shutdown()  # whoever takes part in a broadcast learns of it
            raise

    def shutdown(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()


for _name, _engine in ((FILES, FileEngine), (BROADCAST, BroadcastEngine)):
    if _name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_name, _engine)


class Extension:
    """Mixed into vLLM's worker. Importing it registers the backends; it adds one question."""

    def vp2o_backends(self) -> list[str]:
        """Who takes weights here: for a person who finds a server by its URL."""
        return [FILES, BROADCAST]

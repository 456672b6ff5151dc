"""Loaded by a vLLM server (`--worker-extension-cls vp2o_vllm.Extension`): weights that arrive as files.

It runs in the server's environment and imports nothing of megatron_vp2o; its folder is put on the server's PYTHONPATH. A backend
of vLLM's own weight-transfer protocol (`--weight-transfer-config '{"backend": "vp2o_file"}'`): between /start_weight_update and
/finish_weight_update the trainer posts one /update_weights for each file, and a last one with what all of them come to. A file
whose bytes are not those that were sent, and an update that is not whole, raise: vLLM itself accepts an update without a single
tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
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

BACKEND = "vp2o_file"


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


class FileEngine(WeightTransferEngine):
    """Loads files as they come, and insists on all of them."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        self._tensors = self._bytes = 0
        self._digest = hashlib.blake2b(digest_size=8)
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

    def finish_weight_update(self) -> None:
        if not self._whole:
            raise ValueError("the update cannot be finished: nobody said what all of it comes to, or it was not that")
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileEngine)


class Extension:
    """Mixed into vLLM's worker. Importing it registers the backend; it adds one question."""

    def vp2o_backend(self) -> dict[str, Any]:
        """Who takes weights here: for a trainer that finds a server by its URL."""
        return {"backend": BACKEND}

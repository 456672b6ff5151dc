"""Points megatron.core, and the library, at the pretended device instead of the CPU. Import it before anything of Megatron's.

The CPU stand-in (`megatron/platform/cpu.py`) gives Megatron's modules a torch whose CUDA is the CPU; here it is the pretended
device.
The library learns its device where it learns it on a GPU: from `world.own_device`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from megatron_vp2o.megatron.platform import cpu
from tests.pretend.device import DEVICE, NAME, WAITS, PretendTensor


def become() -> None:
    """Make this process one that computes on the pretended device. Once; it cannot be undone."""
    cpu.CPU = DEVICE  # what "cuda" means to megatron.core
    cpu._CPU_TYPE_NAMES = {
        f"torch.cuda.{kind}Tensor": f"torch.{NAME}.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")
    }
    own = {
        "tensor-cuda-method": lambda: cpu._rewrite_functions(cpu._CALL_TENSOR_CUDA, names={"cuda": NAME}),
        "all-to-all-split-sizes": lambda: cpu._replace_function(cpu._MOVE, _to_cpu),
    }
    cpu.PATCHES = tuple(
        dataclasses.replace(patch, apply=own[patch.name]) if patch.name in own else patch for patch in cpu.PATCHES
    )
    for waiting in (cpu.Stream, cpu.Event):
        waiting.synchronize = _synchronize  # type: ignore[assignment, method-assign]
    cpu.TORCH.cuda.synchronize = lambda *_: _synchronize(None)
    cpu.enable_cpu()
    torch.distributed.Backend.backend_capability["gloo"].append(NAME)  # gloo gets the tensors that are held

    from megatron_vp2o.megatron.platform import world

    world.own_device = lambda: DEVICE  # before anybody imports it by name


def _synchronize(_: Any) -> None:
    WAITS.add("a stream or event is waited for")


def _to_cpu(original: Any) -> Any:
    """Megatron's own, for tensors of the pretended device instead of CUDA's."""

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if not isinstance(tensor, torch.Tensor) or not isinstance(tensor, PretendTensor):
            return tensor
        there = tensor.to(torch.device("cpu"), non_blocking=True)
        return there.numpy() if as_numpy else there

    return move

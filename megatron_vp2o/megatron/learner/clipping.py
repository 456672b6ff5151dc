"""The norm of gradients and clipping by it, as Megatron's optimizers do both, with the norm left on the device.

Megatron reads the norm to decide what to scale by; here the host reads it together with what else it wants to know of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from torch import Tensor


def squared_norms(optimizer: Any, device: torch.device) -> Tensor:
    """Squared norms of the gradients of all ranks, float32 [n], whose sum is the whole's: one where all of Megatron's optimizers
    sum over the same ranks, else one an optimizer. Collective, as `optimizer.get_grad_norm`."""
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(optimizers) > 1 and optimizer.grads_states_parallel_group_is_shared():
        gradients = [gradient for one in optimizers for gradient in _gradients(one)]
        parts = [(gradients, optimizer.get_grad_stats_parallel_group())]
    else:
        parts = [(_gradients(one), one.get_grad_stats_parallel_group()) for one in optimizers]
    squares = []
    for gradients, group in parts:
        square = torch.zeros(1, dtype=torch.float32, device=device)
        if gradients:
            overflow = torch.zeros(1, dtype=torch.int32, device=device)
            norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [gradients], False)
            square = norm**2.0
        dist.all_reduce(square, group=group)
        squares.append(square.view(1))
    return torch.cat(squares)


def _gradients(optimizer: Any) -> list[Tensor]:
    of_norm = getattr(optimizer, "get_grads_for_grad_norm", None) or optimizer.get_main_grads_for_grad_norm
    gradients: list[Tensor] = of_norm()
    return gradients


def total_norm(squares: list[float]) -> float:
    """The norm from `squared_norms`, in the host's double precision."""
    norms = [square**0.5 for square in squares]
    return norms[0] if len(norms) == 1 else math.sqrt(sum(norm**2 for norm in norms))


def clip_by(squares: Tensor, most: float, parameters: Iterable[Tensor]) -> None:
    """Scale the parameters' gradients so that the norm is at most `most`, without asking the device what it is.

    Args:
        squares: from `squared_norms`.
    """
    norms = squares.double().sqrt().unbind()
    norm = norms[0]
    if len(norms) > 1:
        square = norms[0].square()
        for other in norms[1:]:
            square = square + other.square()
        norm = square.sqrt()
    factor = (most / (norm + 1.0e-6)).clamp(max=1.0).float()
    gradients = [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)

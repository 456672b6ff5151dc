"""RMSNorm for the local specs.

Shape legend: any leading dimensions "...", D normalised width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RMSNorm(torch.autograd.Function):
    """One autograd node instead of six: torch has no fused RMSNorm for the CPU."""

    @staticmethod
    def forward(ctx: Any, x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        scale = _scale(x_D, eps)
        unit_D = x_D * scale
        ctx.save_for_backward(unit_D, scale, weight_D)
        return unit_D * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_D: Tensor) -> tuple[Tensor, Tensor, None]:
        unit_D, scale, weight_D = ctx.saved_tensors
        product_D = grad_D * unit_D
        dweight_D = product_D.flatten(0, -2).sum(dim=0)
        along = (product_D @ weight_D)[..., None] / weight_D.shape[0]
        dx_D = (grad_D * weight_D).sub_(unit_D * along).mul_(scale)
        return dx_D, dweight_D, None


def _scale(x_D: Tensor, eps: float) -> Tensor:
    """1 / rms(x), [..., 1]."""
    norm = torch.linalg.vector_norm(x_D, dim=-1, keepdim=True)
    return norm.square_().div_(x_D.shape[-1]).add_(eps).rsqrt_()


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight. Built by Megatron's specs (`config`, `hidden_size`, `eps`).

    Megatron's WrappedTorchNorm refuses sequence parallelism; this one marks its weight instead, so that
    finalize_model_grads reduces its gradient over the tensor-parallel group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_D: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if x_D.device.type == "cpu" and x_D.dtype is torch.float32:
            if not torch.is_grad_enabled():
                return (x_D * _scale(x_D, self.eps)).mul_(self.weight)
            return _RMSNorm.apply(x_D, self.weight, self.eps)
        return F.rms_norm(x_D, self.weight.shape, self.weight, self.eps)


class FusedRMSNorm(RMSNorm):
    """By torch's own operation on every device."""

    def forward(self, x_D: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.rms_norm(x_D, self.weight.shape, self.weight, self.eps)

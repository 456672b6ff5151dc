"""Routed experts for the local specs: the parameters of Megatron's SequentialMLP, computed without its overhead.

On CUDA the products of all experts are one grouped call. On the CPU one autograd node walks over the experts, which is one
operation a layer for autograd; while all experts' activations fit the cache, they go through each operation together. torch's
grouped product takes about as long there, weights stacked for it (`python -m tools.bench experts`, 2 cores, 2026-11-21).

Shape legend: T tokens dispatched to this rank, sorted by expert; t tokens of one expert; E local experts; D hidden size;
F expert intermediate size (this rank's shard).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable

_IN_CACHE = 2**20
"""Bytes of inner activations up to which all experts go through each operation together: when decoding, the calls of one
expert at a time cost more than the arithmetic. The numbers are the same to the bit."""


class _SwiGLUExperts(torch.autograd.Function):
    """y = (silu(x W_gate^T) * (x W_up^T) * p) W_down^T for each expert's slice of tokens."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, probs_T: Tensor, sizes_E: Sequence[int], *weights: Tensor) -> Tensor:
        out_TD, inner_T2F = _swiglu_experts(x_TD, probs_T, sizes_E, weights)
        ctx.sizes_E = sizes_E
        ctx.save_for_backward(x_TD, probs_T, inner_T2F, *weights)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
        x_TD, probs_T, inner_T2F, *weights = ctx.saved_tensors
        sizes_E, experts = ctx.sizes_E, len(ctx.sizes_E)
        fc1, fc2 = weights[:experts], weights[experts:]
        dx_TD, dprobs_T = torch.empty_like(x_TD), torch.empty_like(probs_T)
        dfc1, dfc2 = [], []
        slices = zip(
            *(tensor.split(sizes_E) for tensor in (x_TD, probs_T, inner_T2F, grad_TD, dx_TD, dprobs_T)), strict=True
        )
        for e, (x_tD, probs_t, inner_t2F, grad_tD, dx_tD, dprobs_t) in enumerate(slices):
            gate_tF, up_tF = inner_t2F.chunk(2, dim=-1)
            sigmoid_tF = gate_tF.sigmoid()
            silu_tF = gate_tF * sigmoid_tF
            act_tF = silu_tF * up_tF
            dact_tF = grad_tD @ fc2[e]
            torch.sum(dact_tF * act_tF, dim=-1, out=dprobs_t)
            dfc2.append(grad_tD.t() @ act_tF.mul_(probs_t[:, None]))
            dact_tF.mul_(probs_t[:, None])
            dinner_t2F = torch.empty_like(inner_t2F)
            dgate_tF, dup_tF = dinner_t2F.chunk(2, dim=-1)
            torch.mul(dact_tF, silu_tF, out=dup_tF)
            # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
            torch.mul(dact_tF.mul_(up_tF), sigmoid_tF + silu_tF * (1.0 - sigmoid_tF), out=dgate_tF)
            dfc1.append(dinner_t2F.t() @ x_tD)
            torch.mm(dinner_t2F, fc1[e], out=dx_tD)
        return dx_TD, dprobs_T, None, *dfc1, *dfc2


def _swiglu_experts(
    x_TD: Tensor, probs_T: Tensor, sizes_E: Sequence[int], weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Their outputs, [T, D], and gate and up before the activation, [T, 2F]."""
    fc1, fc2 = weights[: len(sizes_E)], weights[len(sizes_E) :]
    inner_T2F = x_TD.new_empty(x_TD.shape[0], fc1[0].shape[0])
    out_TD = torch.empty_like(x_TD)
    if inner_T2F.nbytes <= _IN_CACHE:
        for x_tD, inner_t2F, weight_2FD in zip(x_TD.split(sizes_E), inner_T2F.split(sizes_E), fc1, strict=True):
            torch.mm(x_tD, weight_2FD.t(), out=inner_t2F)
        gate_TF, up_TF = inner_T2F.chunk(2, dim=-1)
        act_TF = F.silu(gate_TF).mul_(up_TF).mul_(probs_T[:, None])
        for act_tF, out_tD, weight_DF in zip(act_TF.split(sizes_E), out_TD.split(sizes_E), fc2, strict=True):
            torch.mm(act_tF, weight_DF.t(), out=out_tD)
        return out_TD, inner_T2F
    slices = zip(*(tensor.split(sizes_E) for tensor in (x_TD, inner_T2F, out_TD, probs_T)), fc1, fc2, strict=True)
    for x_tD, inner_t2F, out_tD, probs_t, weight_2FD, weight_DF in slices:
        torch.mm(x_tD, weight_2FD.t(), out=inner_t2F)
        gate_tF, up_tF = inner_t2F.chunk(2, dim=-1)
        act_tF = F.silu(gate_tF).mul_(up_tF).mul_(probs_t[:, None])
        torch.mm(act_tF, weight_DF.t(), out=out_tD)
    return out_TD, inner_T2F


class GroupedSequentialMLP(SequentialMLP):
    """SequentialMLP (same parameters, names and checkpoints) without one module call an expert. SwiGLU without bias only."""

    def __init__(self, num_local_experts: int, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_local_experts, config, *args, **kwargs)
        if config.add_bias_linear or not config.gated_linear_unit or config.activation_func is not F.silu:
            raise ValueError("GroupedSequentialMLP computes SwiGLU without bias; use SequentialMLP for other experts.")

    def forward(
        self, hidden_TD: Tensor, tokens_per_expert_E: Tensor, probs_T: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens sorted by expert, [T, D], and their gates, [T] -> (expert outputs times gates [T, D], None)."""
        linears = [expert.linear_fc1 for expert in self.local_experts]
        linears += [expert.linear_fc2 for expert in self.local_experts]
        for linear in linears:
            for hook in linear._forward_pre_hooks.values():  # the modules are not called: waits for their parameters
                hook(linear, ())
        weights = [linear.weight for linear in linears]
        if not hidden_TD.is_cuda:
            inputs = hidden_TD, probs_T.to(hidden_TD.dtype), tokens_per_expert_E.tolist()
            if not torch.is_grad_enabled():
                return _swiglu_experts(*inputs, weights)[0], None
            return _SwiGLUExperts.apply(*inputs, *weights), None
        fc1, fc2 = weights[: len(linears) // 2], weights[len(linears) // 2 :]
        ends_E = tokens_per_expert_E.to(hidden_TD.device, non_blocking=True).cumsum(0).to(torch.int32)
        inner_T2F = F.grouped_mm(hidden_TD, torch.stack(fc1).transpose(1, 2), offs=ends_E)
        gate_TF, up_TF = inner_T2F.chunk(2, dim=-1)
        act_TF = (F.silu(gate_TF) * up_TF * probs_T[:, None]).to(hidden_TD.dtype)
        return F.grouped_mm(act_TF, torch.stack(fc2).transpose(1, 2), offs=ends_E), None

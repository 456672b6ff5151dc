"""Routed experts for the local specs: the parameters of Megatron's SequentialMLP, computed without its overhead.

On CUDA the products of all experts are one grouped call over stacked weights (`stack_weights` makes each expert's parameter a
view of them), and gradients are added to Megatron's buffer in one operation. On the CPU one autograd node walks over the
experts, which is one operation a layer for autograd; while all experts' activations fit the cache, they go through each
operation together. torch's grouped product takes about as long there, weights stacked for it (`python -m tools.bench experts`,
2 cores, 2026-11-21).

Shape legend: T tokens dispatched to this rank, sorted by expert; t tokens of one expert; E local experts; D hidden size;
F expert intermediate size (this rank's shard).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vp2o.parallel.strided import matrix_of

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
            silu_tF = F.silu(gate_tF)
            act_tF = silu_tF * up_tF
            dact_tF = grad_tD @ fc2[e]
            torch.sum(dact_tF * act_tF, dim=-1, out=dprobs_t)
            dfc2.append(grad_tD.t() @ act_tF.mul_(probs_t[:, None]))
            dact_tF.mul_(probs_t[:, None])
            dinner_t2F = torch.empty_like(inner_t2F)
            dgate_tF, dup_tF = dinner_t2F.chunk(2, dim=-1)
            torch.mul(dact_tF, silu_tF, out=dup_tF)
            torch.ops.aten.silu_backward.grad_input(dact_tF.mul_(up_tF), gate_tF, grad_input=dgate_tF)
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


class _GroupedSwiGLUExperts(torch.autograd.Function):
    """The same as `_SwiGLUExperts`, all experts in one product (torch.nn.functional.grouped_mm)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        probs_T: Tensor,
        ends_E: Tensor,
        fc1_E2FD: Tensor,
        fc2_EDF: Tensor,
        accumulate: Callable[[Tensor, Tensor], None] | None,
        *weights: Tensor,
    ) -> Tensor:
        out_TD, inner_T2F = _grouped_swiglu_experts(x_TD, probs_T, ends_E, fc1_E2FD, fc2_EDF)
        ctx.accumulate, ctx.experts = accumulate, len(weights) // 2
        ctx.save_for_backward(x_TD, probs_T, ends_E, inner_T2F, fc1_E2FD, fc2_EDF)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
        x_TD, probs_T, ends_E, inner_T2F, fc1_E2FD, fc2_EDF = ctx.saved_tensors
        gate_TF, up_TF = inner_T2F.chunk(2, dim=-1)
        silu_TF = F.silu(gate_TF)
        act_TF = silu_TF * up_TF
        grad_TD = grad_TD.contiguous()
        dact_TF = F.grouped_mm(grad_TD, fc2_EDF, offs=ends_E)
        dprobs_T = (dact_TF * act_TF).sum(dim=-1, dtype=torch.float32).to(probs_T.dtype)
        probs_T1 = probs_T[:, None]
        dfc2_EDF = F.grouped_mm(grad_TD.t(), (act_TF * probs_T1).to(x_TD.dtype), offs=ends_E)
        dact_TF = (dact_TF * probs_T1).to(x_TD.dtype)
        dinner_T2F = torch.empty_like(inner_T2F)
        dgate_TF, dup_TF = dinner_T2F.chunk(2, dim=-1)
        torch.mul(dact_TF, silu_TF, out=dup_TF)
        dgate_TF.copy_(torch.ops.aten.silu_backward(dact_TF.mul_(up_TF), gate_TF))
        dfc1_E2FD = F.grouped_mm(dinner_T2F.t(), x_TD, offs=ends_E)
        dx_TD = F.grouped_mm(dinner_T2F, fc1_E2FD, offs=ends_E)
        head = (dx_TD, dprobs_T, None, None, None, None)
        if ctx.accumulate is None:
            return *head, *dfc1_E2FD.unbind(0), *dfc2_EDF.unbind(0)
        ctx.accumulate(dfc1_E2FD, dfc2_EDF)
        return *head, *[None] * (2 * ctx.experts)


def _grouped_swiglu_experts(
    x_TD: Tensor, probs_T: Tensor, ends_E: Tensor, fc1_E2FD: Tensor, fc2_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs, [T, D], and gate and up before the activation, [T, 2F]. `ends_E`: where each expert's tokens end, int32."""
    inner_T2F = F.grouped_mm(x_TD, fc1_E2FD.transpose(1, 2), offs=ends_E)
    gate_TF, up_TF = inner_T2F.chunk(2, dim=-1)
    act_TF = (F.silu(gate_TF) * up_TF * probs_T[:, None]).to(x_TD.dtype)
    return F.grouped_mm(act_TF, fc2_EDF.transpose(1, 2), offs=ends_E), inner_T2F


class GroupedSequentialMLP(SequentialMLP):
    """SequentialMLP (same parameters, names and checkpoints) without one module call an expert. SwiGLU without bias only.

    Attributes:
        add_to_main_grad: the backward pass of the grouped products adds weight gradients to `parameter.main_grad` itself, and
            autograd sees none: one operation in place of two an expert. Only where nothing waits for the hooks of
            parameters, as overlapping gradient reduction does; `MegatronPolicy` sets it.
        grouped: use grouped products; None: on CUDA.
    """

    add_to_main_grad = False
    grouped: bool | None = None
    _stacked: tuple[Tensor, Tensor] | None = None
    _main_grads: tuple[tuple[int, ...], list[tuple[Tensor, bool] | None]] | None = None

    def __init__(self, num_local_experts: int, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_local_experts, config, *args, **kwargs)
        if config.add_bias_linear or not config.gated_linear_unit or config.activation_func is not F.silu:
            raise ValueError("GroupedSequentialMLP computes SwiGLU without bias; use SequentialMLP for other experts.")

    def uses_grouped_products(self, device: torch.device) -> bool:
        """Whether a forward pass on this device takes all experts in one product."""
        return device.type not in ("cpu", "meta") if self.grouped is None else self.grouped

    @torch.no_grad()
    def stack_weights(self) -> None:
        """Lay the weights of all experts side by side, so that grouped products need no copy; the parameters become views."""
        stacks = []
        for name in ("linear_fc1", "linear_fc2"):
            weights = [getattr(expert, name).weight for expert in self.local_experts]
            stack = torch.stack([weight.detach() for weight in weights])
            for weight, row in zip(weights, stack, strict=True):
                weight.data = row
            stacks.append(stack)
        self._stacked = stacks[0], stacks[1]

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
        if not self.uses_grouped_products(hidden_TD.device):
            inputs = hidden_TD, probs_T.to(hidden_TD.dtype), tokens_per_expert_E.tolist()
            if not torch.is_grad_enabled():
                return _swiglu_experts(*inputs, weights)[0], None
            return _SwiGLUExperts.apply(*inputs, *weights), None
        ends_E = tokens_per_expert_E.to(hidden_TD.device, non_blocking=True).cumsum(0).to(torch.int32)
        stacks = self._stacks(weights)
        if not torch.is_grad_enabled():
            return _grouped_swiglu_experts(hidden_TD, probs_T, ends_E, *stacks)[0], None
        accumulate = self._accumulate if self.add_to_main_grad else None
        return _GroupedSwiGLUExperts.apply(hidden_TD, probs_T, ends_E, *stacks, accumulate, *weights), None

    @torch.no_grad()
    def _stacks(self, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """[E, 2F, D] and [E, D, F]: the tensors of which the weights are views, or copies where the weights have been moved."""
        experts = len(weights) // 2
        parts = weights[:experts], weights[experts:]
        if self._stacked is not None and all(
            part[0].data_ptr() == stack.data_ptr() and part[-1].data_ptr() == stack[-1].data_ptr()
            for part, stack in zip(parts, self._stacked, strict=True)
        ):
            return self._stacked
        return torch.stack([w.detach() for w in parts[0]]), torch.stack([w.detach() for w in parts[1]])

    @torch.no_grad()
    def _accumulate(self, *gradients_EXY: Tensor) -> None:
        """Add the gradients of fc1 and fc2, stacked, to the parameters' main_grad."""
        parts = [
            [getattr(e, name).weight.main_grad for e in self.local_experts] for name in ("linear_fc1", "linear_fc2")
        ]
        where = tuple(grad.data_ptr() for part in parts for grad in (part[0], part[-1]))
        if self._main_grads is None or self._main_grads[0] != where:
            self._main_grads = where, [matrix_of([grad.view(-1) for grad in part]) for part in parts]
        for part, found, gradient_EXY in zip(parts, self._main_grads[1], gradients_EXY, strict=True):
            if found is None:
                torch._foreach_add_(part, list(gradient_EXY.to(part[0].dtype).unbind(0)))
                continue
            matrix_EP, reverse = found
            matrix_EP.add_((gradient_EXY.flip(0) if reverse else gradient_EXY).flatten(1))


class GroupedProductMLP(GroupedSequentialMLP):
    """By grouped products on every device that has them, CPUs among them."""

    grouped = True

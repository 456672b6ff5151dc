"""Log-probabilities and entropy straight from hidden states: the output layer, softmax and their gradients in chunks of tokens.

The logits of a micro-batch take T * V numbers; at 16,384 tokens and 151,936 ids they are the largest tensor of a training
step. Here one chunk of them is alive at a time: the forward pass keeps three numbers a token (log-normaliser, entropy, chosen
logit), and the backward pass computes each chunk's logits again. That is one matrix product more than the plain path
(`parallel.logprobs`) needs.

Where CUDA and Triton are there, one kernel a chunk reads the logits once (`triton_logits`); elsewhere torch does it.

Shape legend: T tokens, c tokens of a chunk, D hidden size, V this rank's part of the vocabulary.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_USE_TRITON: bool | None = None
"""None: where the hidden states are on CUDA and Triton is installed. Tests set it."""


@dataclass(frozen=True)
class _Softmax:
    """What is taken of the logits: softmax(logits / temperature) over ids start..valid of this rank's part."""

    temperature: float
    start: int
    valid: int
    """Ids of this rank's part from here on are padding and have probability zero."""


def output_log_probs_and_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float,
    valid_vocab: int,
    group: dist.ProcessGroup,
    chunk_tokens: int,
    weight_sum_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets` and entropy (nats) of softmax(hidden weight^T / temperature), both differentiable.

    Args:
        hidden_TD: the output layer's input, the same on all ranks of the group. Its gradient is this rank's share of the
            sum over the group: reduce it (Megatron's copy or gather regions do).
        weight_VD: this rank's rows of the output layer.
        targets_T: int64 ids in the whole vocabulary.
        temperature: positive.
        valid_vocab: ids from here on are padding and have probability zero.
        group: tensor-parallel group (its size may be 1).
        chunk_tokens: tokens whose logits are alive at a time.
        weight_sum_VD: where to add the weight's gradient (Megatron's main_grad); autograd then sees none for the weight.

    Returns:
        Two float32 tensors [T], equal on all ranks of the group.
    """
    start = group.rank() * weight_VD.shape[0]
    softmax = _Softmax(temperature, start, max(0, min(valid_vocab - start, weight_VD.shape[0])))
    logprob_T, entropy_T = _OutputLogProbs.apply(
        hidden_TD, weight_VD, targets_T, softmax, group, chunk_tokens, weight_sum_VD
    )
    return torch.where(targets_T < valid_vocab, logprob_T, float("-inf")), entropy_T


class _OutputLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        softmax: _Softmax,
        group: dist.ProcessGroup,
        chunk_tokens: int,
        weight_sum_VD: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        kernels = _kernels(hidden_TD)
        local_T = targets_T - softmax.start
        parts = [
            _statistics(kernels, hidden_cD @ weight_VD.t(), local_c, softmax)
            for hidden_cD, local_c in zip(hidden_TD.split(chunk_tokens), local_T.split(chunk_tokens), strict=True)
        ]
        empty = hidden_TD.new_zeros(0, dtype=torch.float32)
        peak_T, total_T, mean_T, chosen_T = (
            (torch.cat(part) for part in zip(*parts, strict=True)) if parts else [empty] * 4
        )
        if group.size() > 1:  # each rank's sums are relative to its own peak
            highest_T = peak_T.clone()
            dist.all_reduce(highest_T, op=dist.ReduceOp.MAX, group=group)
            shift_T = torch.where(peak_T > float("-inf"), peak_T - highest_T, 0.0)
            share_T = torch.where(peak_T > float("-inf"), shift_T.exp(), 0.0)
            sums = torch.stack((share_T * total_T, share_T * (mean_T + shift_T * total_T), chosen_T))
            dist.all_reduce(sums, group=group)
            (total_T, mean_T, chosen_T), peak_T = sums.unbind(), highest_T
        log_total_T = total_T.log()
        entropy_T = log_total_T - mean_T / total_T
        normaliser_T = peak_T + log_total_T
        ctx.save_for_backward(hidden_TD, weight_VD, local_T, normaliser_T, entropy_T)
        ctx.softmax, ctx.chunk_tokens, ctx.weight_sum_VD = softmax, chunk_tokens, weight_sum_VD
        ctx.set_materialize_grads(False)
        return chosen_T - normaliser_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob_T: Tensor | None, grad_entropy_T: Tensor | None) -> tuple[Any, ...]:
        hidden_TD, weight_VD, local_T, normaliser_T, entropy_T = ctx.saved_tensors
        if grad_logprob_T is None:
            grad_logprob_T = torch.zeros_like(entropy_T)
        kernels = _kernels(hidden_TD)
        dhidden_TD = torch.empty_like(hidden_TD)
        dweight_VD = ctx.weight_sum_VD
        if dweight_VD is None:
            dweight_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        for begin in range(0, hidden_TD.shape[0], ctx.chunk_tokens):
            chunk = slice(begin, begin + ctx.chunk_tokens)
            dlogits_cV = _logits_gradient(
                kernels,
                hidden_TD[chunk] @ weight_VD.t(),
                local_T[chunk],
                normaliser_T[chunk],
                entropy_T[chunk],
                grad_logprob_T[chunk],
                None if grad_entropy_T is None else grad_entropy_T[chunk],
                ctx.softmax,
            )
            torch.mm(dlogits_cV, weight_VD, out=dhidden_TD[chunk])
            if weight_VD.dtype is dweight_VD.dtype:
                dweight_VD.addmm_(dlogits_cV.t(), hidden_TD[chunk])
            else:
                dweight_VD += dlogits_cV.t() @ hidden_TD[chunk]
        own = dweight_VD.to(weight_VD.dtype) if ctx.weight_sum_VD is None else None
        return dhidden_TD, own, None, None, None, None, None


def _kernels(hidden_TD: Tensor) -> ModuleType | None:
    use = hidden_TD.is_cuda and importlib.util.find_spec("triton") is not None if _USE_TRITON is None else _USE_TRITON
    if not use:
        return None
    from megatron_vp2o.parallel import triton_logits

    return triton_logits


def _statistics(
    kernels: ModuleType | None, logits_cV: Tensor, local_c: Tensor, softmax: _Softmax
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(greatest z, sum of exp(z - greatest), that sum weighted by z - greatest, z of the target or 0), z = logits / temperature.

    Overwrites the logits, as `_logits_gradient` does: two float32 copies of a chunk are alive at a time, and bfloat16 logits.
    """
    if kernels is not None:
        return kernels.statistics(logits_cV, local_c, softmax.temperature, softmax.valid)  # type: ignore[no-any-return]
    if softmax.valid == 0:  # this rank's part of the vocabulary is padding
        zeros_c = local_c.new_zeros(local_c.shape, dtype=torch.float32)
        return torch.full_like(zeros_c, float("-inf")), zeros_c, zeros_c, zeros_c
    z_cV = logits_cV[:, : softmax.valid].float().div_(softmax.temperature)
    peak_c = z_cV.amax(dim=-1)
    chosen_c = torch.where(_here(local_c, softmax), z_cV.gather(-1, _inside(local_c, softmax)).squeeze(-1), 0.0)
    z_cV -= peak_c[:, None]
    p_cV = z_cV.exp()
    total_c = p_cV.sum(dim=-1)
    return peak_c, total_c, p_cV.mul_(z_cV).nan_to_num_(0.0).sum(dim=-1), chosen_c  # 0 * -inf adds nothing


def _logits_gradient(
    kernels: ModuleType | None,
    logits_cV: Tensor,
    local_c: Tensor,
    normaliser_c: Tensor,
    entropy_c: Tensor,
    grad_logprob_c: Tensor,
    grad_entropy_c: Tensor | None,
    softmax: _Softmax,
) -> Tensor:
    """The gradient with respect to the logits, in their dtype; may overwrite them."""
    if kernels is not None:
        return kernels.logits_gradient(  # type: ignore[no-any-return]
            logits_cV,
            local_c,
            normaliser_c,
            entropy_c,
            grad_logprob_c,
            grad_entropy_c,
            softmax.temperature,
            softmax.valid,
        )
    log_p_cV = logits_cV[:, : softmax.valid].float().div_(softmax.temperature).sub_(normaliser_c[:, None])
    if grad_entropy_c is None:
        grad_cV = log_p_cV.exp_().mul_(-grad_logprob_c[:, None])
    else:
        p_cV = log_p_cV.exp()
        grad_cV = p_cV * -grad_logprob_c[:, None]
        inner_cV = p_cV.mul_(log_p_cV.add_(entropy_c[:, None])).nan_to_num_(0.0)
        grad_cV.addcmul_(inner_cV, grad_entropy_c[:, None], value=-1)
    if softmax.valid > 0:
        grad_cV.scatter_add_(
            -1, _inside(local_c, softmax), (grad_logprob_c * _here(local_c, softmax)).to(grad_cV.dtype)[:, None]
        )
    grad_cV.div_(softmax.temperature)
    if grad_cV.shape == logits_cV.shape:
        return grad_cV.to(logits_cV.dtype)
    out_cV = torch.zeros_like(logits_cV)
    out_cV[:, : softmax.valid] = grad_cV
    return out_cV


def _here(local_c: Tensor, softmax: _Softmax) -> Tensor:
    return (local_c >= 0) & (local_c < softmax.valid)


def _inside(local_c: Tensor, softmax: _Softmax) -> Tensor:
    return local_c.clamp(0, max(softmax.valid - 1, 0))[:, None]

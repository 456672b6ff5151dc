"""Log-probabilities and entropy of a softmax whose vocabulary is split over the tensor-parallel group.

The single-process twin is `core/logprobs.py`. Shape legend: any leading dimensions "...", V this rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _LogProbsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_V: Tensor, targets: Tensor, temperature: float, valid_vocab: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        sharded = group.size() > 1
        width = logits_V.shape[-1]
        start = group.rank() * width if sharded else 0
        z_V = logits_V.float() / temperature  # a new tensor, also at temperature 1: it is shifted in place
        if valid_vocab < start + width:
            z_V[..., max(valid_vocab - start, 0) :] = float("-inf")  # vocabulary padding has probability zero
        peak = z_V.amax(dim=-1)
        if sharded:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        z_V -= peak[..., None]
        local = targets - start
        here = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1)[..., None]
        chosen = torch.where(here, z_V.gather(-1, local).squeeze(-1), 0.0)
        p_V = z_V.exp()
        total = p_V.sum(dim=-1)
        # 0 * -inf is 0 here: an impossible token adds nothing to the mean
        mean = torch.where(p_V > 0, p_V * z_V, 0.0).sum(dim=-1)
        if sharded:
            sums = torch.stack((chosen, total, mean))
            dist.all_reduce(sums, group=group)
            chosen, total, mean = sums.unbind()
        p_V /= total[..., None]
        log_total = total.log()
        entropy = log_total - mean / total
        ctx.save_for_backward(p_V, local, here, entropy)
        ctx.temperature, ctx.dtype = temperature, logits_V.dtype
        ctx.set_materialize_grads(False)
        return chosen - log_total, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        p_V, local, here, entropy = ctx.saved_tensors
        grad_V = torch.zeros_like(p_V)
        if grad_logprob is not None:
            grad_V -= p_V * grad_logprob[..., None]
            grad_V.scatter_add_(-1, local, (grad_logprob * here)[..., None])
        if grad_entropy is not None:
            log_p_V = torch.where(p_V > 0, p_V.log(), 0.0)
            grad_V -= p_V * (log_p_V + entropy[..., None]) * grad_entropy[..., None]
        return (grad_V / ctx.temperature).to(ctx.dtype), None, None, None, None


def log_probs_and_entropy(
    logits_V: Tensor, targets: Tensor, *, temperature: float, valid_vocab: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets` and entropy (nats) of softmax(logits / temperature), both differentiable.

    Args:
        logits_V: [..., V], this rank's contiguous part of the vocabulary, any float type; computed in float32.
        targets: [...], int64 ids in the whole vocabulary.
        temperature: positive.
        valid_vocab: ids from here on are padding and have probability zero.
        group: tensor-parallel group (its size may be 1).

    Returns:
        Two float32 tensors of shape [...], equal on all ranks of the group.
    """
    return _LogProbsAndEntropy.apply(logits_V, targets, temperature, valid_vocab, group)

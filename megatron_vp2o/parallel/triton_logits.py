"""Triton kernels over a chunk of logits: softmax statistics in one read, the gradient in one read and one write in place.

Meant for `parallel.output_logprobs`, which has the same arithmetic in torch. One program walks over one token's logits.

Shape legend: c tokens of a chunk, V this rank's part of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _statistics_kernel(
    logits, targets, peaks, totals, means, chosens, row_stride, scale, valid, BLOCK: tl.constexpr
):  # pragma: no cover
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    target = tl.load(targets + row)
    offsets = tl.arange(0, BLOCK)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    mean = tl.zeros((), tl.float32)
    for start in range(0, valid, BLOCK):
        inside = start + offsets < valid
        z = tl.load(base + start + offsets, mask=inside, other=float("-inf")).to(tl.float32) * scale
        highest = tl.maximum(peak, tl.max(z, axis=0))
        finite = highest > float("-inf")
        safe = tl.where(finite, highest, 0.0)
        p = tl.exp(z - safe)
        shift = tl.where(peak > float("-inf"), peak - safe, 0.0)
        share = tl.where(peak > float("-inf"), tl.exp(shift), 0.0)
        mean = share * (mean + shift * total) + tl.sum(tl.where(p > 0, p * (z - safe), 0.0), axis=0)
        total = share * total + tl.sum(p, axis=0)
        peak = highest
    here = (target >= 0) & (target < valid)
    chosen = tl.load(base + target, mask=here, other=0.0).to(tl.float32) * scale
    tl.store(peaks + row, peak)
    tl.store(totals + row, total)
    tl.store(means + row, mean)
    tl.store(chosens + row, tl.where(here, chosen, 0.0))


@triton.jit
def _gradient_kernel(
    logits,
    targets,
    normalisers,
    entropies,
    grad_logprobs,
    grad_entropies,
    row_stride,
    scale,
    valid,
    width,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # pragma: no cover
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    target = tl.load(targets + row)
    normaliser = tl.load(normalisers + row)
    grad_logprob = tl.load(grad_logprobs + row)
    offsets = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        column = start + offsets
        inside = column < valid
        z = tl.load(base + column, mask=inside, other=float("-inf")).to(tl.float32) * scale
        log_p = z - normaliser
        p = tl.exp(log_p)
        grad = grad_logprob * (tl.where((column == target) & inside, 1.0, 0.0) - p)
        if WITH_ENTROPY:
            entropy = tl.load(entropies + row)
            grad_entropy = tl.load(grad_entropies + row)
            grad -= grad_entropy * tl.where(p > 0, p * (log_p + entropy), 0.0)
        tl.store(base + column, (grad * scale).to(logits.dtype.element_ty), mask=column < width)


def statistics(
    logits_cV: Tensor, local_c: Tensor, temperature: float, valid: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `parallel.output_logprobs._statistics`."""
    rows = logits_cV.shape[0]
    out = [torch.empty(rows, dtype=torch.float32, device=logits_cV.device) for _ in range(4)]
    _statistics_kernel[(rows,)](
        logits_cV, local_c, *out, logits_cV.stride(0), 1.0 / temperature, valid, BLOCK=_BLOCK, num_warps=_WARPS
    )
    return out[0], out[1], out[2], out[3]


def logits_gradient(
    logits_cV: Tensor,
    local_c: Tensor,
    normaliser_c: Tensor,
    entropy_c: Tensor,
    grad_logprob_c: Tensor,
    grad_entropy_c: Tensor | None,
    temperature: float,
    valid: int,
) -> Tensor:
    """See `parallel.output_logprobs._logits_gradient`; overwrites the logits and returns them."""
    _gradient_kernel[(logits_cV.shape[0],)](
        logits_cV,
        local_c,
        normaliser_c,
        entropy_c,
        grad_logprob_c.contiguous(),
        grad_logprob_c if grad_entropy_c is None else grad_entropy_c.contiguous(),
        logits_cV.stride(0),
        1.0 / temperature,
        valid,
        logits_cV.shape[1],
        WITH_ENTROPY=grad_entropy_c is not None,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return logits_cV

"""A checksum of weights that costs one pass over them and one number to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_checksum(tensors: Sequence[Tensor]) -> int:
    """Of the bits of all tensors, 64 bits wide. Equal weights give equal sums; one other bit, or two tensors that changed
    places, another.

    The bits of each tensor are added up as integers, and the sums weighted by position, modulo 2^64.
    """
    sums = [
        tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()]).sum(dtype=torch.int64)
        for tensor in tensors
        if tensor.numel()
    ]
    if not sums:
        return 0
    sums_N = torch.stack(sums)
    # odd weights keep every bit of a sum: multiplication by them is invertible modulo 2^64
    odd_N = (torch.arange(len(sums), device=sums_N.device, dtype=torch.int64) * 0x9E3779B97F4A7C1 + 1) | 1
    return int((sums_N * odd_N).sum().item())

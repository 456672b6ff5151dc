"""A checksum of weights that costs one pass over them and one number to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vp2o.core.deferred import Deferred, known

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WIDTH = 2**12
"""Words in a row of the table that a tensor is laid out in."""
_ROWS = 2**8
"""Rows of that table that are weighted at once: bounds the workspace to 8 MiB."""


@torch.no_grad()
def weights_checksum(tensors: Sequence[Tensor]) -> Deferred[int]:
    """64 bits that depend on every bit of all tensors, and on where it is. Equal weights give equal checksums.

    Each word is weighted by an odd number that its place in its tensor gives, each tensor's sum by one that the tensor's place
    gives, modulo 2^64. Another value of one word always changes the result, because odd weights are invertible. So do words that
    change places, within a tensor (two experts in a stacked one) or between two, but for coincidences of one in 2^64.
    """
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return known(0)
    # The weights of a place are the same in all tensors: made once, for the longest.
    column_W = _odd(_WIDTH, tensors[0].device)
    rows = max(tensor.numel() // _WIDTH for tensor in tensors) + 1
    row_R = _odd(rows, tensors[0].device, 0x7A3D70A3D70A3D71)
    groups = _alike(tensors)
    parts = [
        _weighted_sums([tensors[place] for place in places], column_W, row_R)
        if len(places) > 1
        else _weighted_sum(tensors[places[0]], column_W, row_R)[None]
        for places in groups
    ]
    order_N = torch.tensor([place for places in groups for place in places])
    sums_N = torch.cat(parts)[order_N.argsort().to(parts[0].device, non_blocking=True)]
    total = (sums_N * _odd(len(sums_N), sums_N.device)).sum()
    return Deferred((total,), lambda on_host: int(on_host[0].item()))


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of tensors of as many words of one kind that are weighted together, no more of them than fit the workspace."""
    alike: dict[tuple[int, int], list[int]] = {}
    for place, tensor in enumerate(tensors):
        alike.setdefault((tensor.numel(), tensor.element_size()), []).append(place)
    parts = []
    for (words, _), places in alike.items():
        most = max(1, _WIDTH * _ROWS // words)
        parts += [places[first : first + most] for first in range(0, len(places), most)]
    return parts


def _weighted_sums(tensors: Sequence[Tensor], column_W: Tensor, row_R: Tensor) -> Tensor:
    """`_weighted_sum` of several small tensors of equal size: an expert's weights are too little for an operation of their own."""
    kind = _WORDS[tensors[0].element_size()]
    words_NX = torch.stack([tensor.detach().contiguous().view(-1).view(kind) for tensor in tensors]).to(torch.int64)
    rows = words_NX.shape[1] // _WIDTH
    whole_NRW, rest_NX = words_NX[:, : rows * _WIDTH].unflatten(1, (rows, _WIDTH)), words_NX[:, rows * _WIDTH :]
    last_N = (rest_NX * column_W[: rest_NX.shape[1]]).sum(1)
    sums_NR = torch.cat([(whole_NRW * column_W).sum(2), last_N[:, None]], dim=1)
    return (sums_NR * row_R[: rows + 1]).sum(1)


def _weighted_sum(tensor: Tensor, column_W: Tensor, row_R: Tensor) -> Tensor:
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    rows, rest = divmod(len(words), _WIDTH)
    parts = [
        (part.to(torch.int64) * column_W).sum(1) for part in words[: rows * _WIDTH].view(rows, _WIDTH).split(_ROWS)
    ]
    parts.append((words[rows * _WIDTH :].to(torch.int64) * column_W[:rest]).sum()[None])
    sums_R = torch.cat(parts)
    return (sums_R * row_R[: len(sums_R)]).sum()


def _odd(count: int, device: torch.device, step: int = 0x1E3779B97F4A7C15) -> Tensor:
    """Different odd numbers, without a pattern that words could share: the squares mix high bits into low differences."""
    index_N = torch.arange(1, count + 1, device=device, dtype=torch.int64)
    mixed_N = index_N * step
    return (mixed_N ^ ((mixed_N >> 29) * index_N)) | 1

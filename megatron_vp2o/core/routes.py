"""Which experts tokens were routed to, packed for keeping: one byte an expert where the ids fit.

A token that was never routed has the dtype's sentinel in the place of its ids: 255 in uint8, -1 in int16.

Shape legend: T tokens, L MoE layers, K experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

FREE = -1
"""In unpacked routes: the token was not routed, and whoever replays them lets it choose."""


def packed_dtype(experts: int) -> torch.dtype:
    """uint8 for at most 255 experts, because 255 is its sentinel, else int16.

    >>> packed_dtype(255), packed_dtype(256)
    (torch.uint8, torch.int16)
    """
    return torch.uint8 if experts <= 255 else torch.int16


def sentinel(dtype: torch.dtype) -> int:
    """What stands for a token without a route.

    >>> sentinel(torch.uint8), sentinel(torch.int16)
    (255, -1)
    """
    return 255 if dtype == torch.uint8 else FREE


def pack_routes(routes: Tensor, experts: int) -> Tensor:
    """Expert ids below `experts`, or FREE, in the smallest dtype.

    >>> pack_routes(torch.tensor([[0, 254], [FREE, FREE]]), 255)
    tensor([[  0, 254],
            [255, 255]], dtype=torch.uint8)
    """
    dtype = packed_dtype(experts)
    return torch.where(routes < 0, sentinel(dtype), routes).to(dtype)


def unpack_routes(packed: Tensor) -> Tensor:
    """The ids as int64, FREE where there is the sentinel.

    >>> unpack_routes(torch.tensor([[3, 255]], dtype=torch.uint8))
    tensor([[ 3, -1]])
    """
    routes = packed.long()
    return routes.masked_fill_(routes == sentinel(packed.dtype), FREE)


def same_experts(routes_TK: Tensor, others_TK: Tensor) -> Tensor:
    """How many of a token's experts are also among its others, whatever their order, int64 [T].

    >>> same_experts(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [3, 5]]))
    tensor([2, 1])
    """
    return (routes_TK[:, :, None] == others_TK[:, None, :]).any(dim=2).sum(dim=1)

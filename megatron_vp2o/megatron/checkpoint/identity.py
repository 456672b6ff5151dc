"""Which weights a model has, as a short text that is the same under every layout."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
from torch import Tensor

from megatron_vp2o.parallel.groups import Groups

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MASK = 2**64 - 1


@torch.no_grad()
def weights_identity(model: Any, groups: Groups, vocab_size: int) -> str:
    """A checksum of the bits of all weights, 16 hexadecimal digits. Collective.

    The bits of a tensor are mixed and added up, in whatever order the layout has them, and weighted by the tensor's name,
    layer and expert. Entries of one tensor that changed places are not seen.

    Args:
        model: a GPTModel, with all parameters gathered.
        vocab_size: rows of embedding and output beyond it are padding, which depends on the layout.
    """
    tree = model.sharded_state_dict()
    apply_factories(tree)
    total = torch.zeros((), dtype=torch.int64, device=groups.device)
    for part in nested_values(tree):
        if isinstance(part, ShardedTensor) and part.data is not None and is_main_replica(part.replica_id):
            place = part.global_offset[: part.prepend_axis_num]
            weight = 2 * zlib.crc32(f"{part.key} {place}".encode()) + 1
            total += weight * _mixed(_without_padding(part, vocab_size))
    dist.all_reduce(total, group=groups.world)
    return f"{int(total) & _MASK:016x}"


def _without_padding(part: ShardedTensor, vocab_size: int) -> Tensor:
    data = part.data
    assert data is not None
    if not part.allow_shape_mismatch:
        return data
    return data[: max(0, vocab_size - int(part.global_offset[part.prepend_axis_num]))]


def _mixed(tensor: Tensor) -> Tensor:
    """A sum over entries, modulo 2^64, that another bit anywhere changes."""
    bits = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()]).long()
    return (bits * (bits * 0x9E3779B97F4A7C1 + 0x632BE59BD9B4E01)).sum()

"""Prompts that context-parallel ranks deal to each other for generation, and their rollouts put together again.

Shape legend: N rows of all ranks of the group, n of this one, X bytes of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_vp2o.parallel.groups import Groups, gather_rows
from megatron_vp2o.rl.types import LoggedGates, Rollouts


def gather_rollouts(own: Rollouts, prompts: int, group_size: int, groups: Groups) -> Rollouts:
    """The rollouts of all context-parallel ranks in the prompts' order. A collective over these ranks.

    Args:
        own: of this rank, whose prompts are every CP-th one from its own number on; all ranks have the same width.
        prompts: of all ranks together.
        group_size: responses to each prompt.
    """
    group, ranks = groups.cp, groups.cp.size()
    most = -(-prompts // ranks) * group_size
    row_N = torch.arange(prompts * group_size)
    prompt_N, member_N = row_N // group_size, row_N % group_size
    place_N = (prompt_N % ranks * most + prompt_N // ranks * group_size + member_N).to(groups.device)

    def every(values: Tensor) -> Tensor:
        """Bytes travel, since gloo does not know every type of number."""
        bytes_nX = values.reshape(len(values), math.prod(values.shape[1:])).contiguous().view(torch.uint8)
        padded = torch.nn.functional.pad(bytes_nX, (0, 0, 0, most - len(values))).to(groups.device)
        bytes_NX = gather_rows(padded, group)[place_N].to(values.device)
        return bytes_NX.view(values.dtype).view(len(row_N), *values.shape[1:])

    gates = own.gates
    if gates is not None:
        gates_LMJE = every(gates.gates_LMJE.transpose(0, 1)).transpose(0, 1)
        gates = LoggedGates(gates_LMJE, row_N, gates.stride)
    return Rollouts(
        tokens_NS=every(own.tokens_NS),
        prompt_len_N=every(own.prompt_len_N),
        total_len_N=every(own.total_len_N),
        logprobs_NS=every(own.logprobs_NS),
        model_logprobs_NS=every(own.model_logprobs_NS),
        finished_N=every(own.finished_N),
        weight_version=own.weight_version,
        gates=gates,
        routes_NSLK=None if own.routes_NSLK is None else every(own.routes_NSLK),
    )

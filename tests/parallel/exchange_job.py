"""What the ranks of test_exchange.py do: mix rows whose every column is known, and count what they send.

A row that a rank does not own, or a column of it, is NaN there: reading it would show.

Shape legend: L layers, E experts, w columns of a unit.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.parallel.exchange import ExpertExchange, Interval, Members, Unit

EXPERTS, LAYERS = 8, 2
COLUMNS = (37, 50, 3)  # of the units of each layer; 3 is less than there are ranks and chunks
TIMES = 2


def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result a case, all in one process group."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return [_case(**case) for case in cases]
    finally:
        dist.destroy_process_group()


def _case(*, expert_ranks: int, dtype: str, chunk_bytes: int, transposed_order: bool = False) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    shards = group.size() // expert_ranks
    members = Members(
        group,
        # replicas of an expert may be next to each other in the group, or far apart
        [r % expert_ranks if transposed_order else r // shards for r in range(group.size())],
        [r // expert_ranks if transposed_order else r % shards for r in range(group.size())],
    )
    kind = getattr(torch, dtype)
    whole, weights_LEE = everything(kind)
    units, mine = [], (members.expert_rank[members.rank], members.shard[members.rank])
    for layer, tensors in enumerate(whole):
        for number, rows_Ew in enumerate(tensors):
            units.append(_unit(layer, rows_Ew, *mine, expert_ranks, shards, number))
    exchange = ExpertExchange(units, members, EXPERTS, chunk_bytes)
    sent: list[int] = []
    addresses = [row.data_ptr() for unit in units for row in unit.rows]
    with mock.patch.object(dist, "all_to_all_single", _counting(sent, members.rank)):
        for _ in range(TIMES):
            exchange.mix(weights_LEE)
    assert addresses == [row.data_ptr() for unit in units for row in unit.rows]
    first, second = exchange._buffers or (None, None)
    assert first is not None and second is not None
    exchange.release()
    return {
        "error": max(_error(unit, whole, weights_LEE, *mine, expert_ranks, index) for index, unit in enumerate(units)),
        "planned": exchange.bytes_sent,
        "sent": sum(sent) // TIMES,
        "collectives": len(sent) // TIMES,
        "chunks": len(exchange.chunks),
        "workspace": exchange.workspace_bytes,
        "allocated": first.nbytes + second.nbytes,
        "owned": sum(b - a for unit in units for row in unit.owned for a, b in [row[mine[1]]]),
        "zero_pieces": sum(a == b for unit in units for row in unit.owned for a, b in row),
        "empty_messages": sum(0 in chunk.send_splits for chunk in exchange.chunks),
    }


def everything(dtype: torch.dtype) -> tuple[list[list[Tensor]], Tensor]:
    """All experts' gradients, [L][unit] of [E, w], and the weights [L, E, E]; the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    whole = [[torch.randn(EXPERTS, w, generator=generator).to(dtype) for w in COLUMNS] for _ in range(LAYERS)]
    weights_LEE = torch.rand(LAYERS, EXPERTS, EXPERTS, generator=generator)
    return whole, weights_LEE / weights_LEE.sum(-1, keepdim=True)


def cuts(columns: int, shards: int, expert: int, number: int) -> list[Interval]:
    """Where a row is cut, different from row to row; some pieces are empty, as in buckets that begin inside of a row."""
    if shards == 1:
        return [(0, columns)]
    bounds = [0] + [min(columns, (i * columns) // shards + 11 * expert + 5 * number) for i in range(1, shards)]
    return list(zip(bounds, [*bounds[1:], columns], strict=True))


def _unit(layer: int, rows_Ew: Tensor, place: int, shard: int, expert_ranks: int, shards: int, number: int) -> Unit:
    local = EXPERTS // expert_ranks
    owned, rows = [], []
    for slot in range(local):
        expert = place * local + slot
        # the plan needs the cuts of all ranks' rows, and knows its own: the same for the same slot on every rank
        owned.append(cuts(rows_Ew.shape[1], shards, slot, number))
        start, stop = owned[-1][shard]
        row = torch.full_like(rows_Ew[0], float("nan"))
        row[start:stop] = rows_Ew[expert, start:stop]
        rows.append(row)
    return Unit(layer, rows, owned)


def _error(
    unit: Unit, whole: list[list[Tensor]], weights_LEE: Tensor, place: int, shard: int, expert_ranks: int, index: int
) -> float:
    """Largest difference from a plain product; columns of other replicas must still be NaN."""
    expected = whole[unit.layer][index % len(COLUMNS)]
    for _ in range(TIMES):
        expected = (weights_LEE[unit.layer] @ expected.float()).to(expected.dtype)
    worst = 0.0
    for slot, (row, pieces) in enumerate(zip(unit.rows, unit.owned, strict=True)):
        start, stop = pieces[shard]
        assert row[:start].isnan().all() and row[stop:].isnan().all()
        difference = row[start:stop] - expected[place * (EXPERTS // expert_ranks) + slot, start:stop]
        assert not difference.isnan().any()
        worst = max([worst, *difference.abs().tolist()])
    return worst


def _counting(sent: list[int], rank: int) -> Any:
    real = dist.all_to_all_single

    def counted(output: Tensor, given: Tensor, receives: list[int], sends: list[int], group: Any) -> Any:
        assert given.numel() == sum(sends) and output.numel() == sum(receives)
        sent.append((given.numel() - sends[rank]) * given.element_size())
        return real(output, given, receives, sends, group=group)

    return counted

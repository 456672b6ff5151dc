"""The expert exchange against a plain matrix product, and what it sends against what it plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vp2o.parallel.exchange import ExpertExchange, Members, Unit
from tests.distributed import run_distributed
from tests.parallel import exchange_job
from tests.parallel.exchange_job import COLUMNS, EXPERTS, LAYERS

ELEMENTS = EXPERTS * LAYERS * sum(COLUMNS)
CHUNKS = (700, 2000, 10**6)  # bytes: many rounds, a few, one


def cases(world_size: int) -> list[dict[str, Any]]:
    layouts = [{"expert_ranks": world_size}]
    if world_size > 1:
        layouts.append({"expert_ranks": 1})  # all rows cut, on all ranks
    if world_size > 2:
        layouts += [{"expert_ranks": 2}, {"expert_ranks": 2, "transposed_order": True}]
    return [
        {**layout, "chunk_bytes": chunk_bytes, "dtype": dtype}
        for layout in layouts
        for chunk_bytes in CHUNKS
        for dtype in ("float32", "bfloat16")
    ]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_a_plain_product(world_size: int) -> None:
    given = cases(world_size)
    by_rank = (
        run_distributed("tests.parallel.exchange_job:run", world_size, given, timeout=60)
        if world_size > 1
        else [exchange_job.run(given)]
    )
    for index, case in enumerate(given):
        ranks = [results[index] for results in by_rank]
        bytes_each = 4 if case["dtype"] == "float32" else 2
        for rank, found in enumerate(ranks):
            where = f"{case}, rank {rank} of {world_size}: {found}"
            assert found["error"] < (1e-6 if case["dtype"] == "float32" else 1e-2), where
            assert found["planned"] == found["sent"], where
            assert found["collectives"] == (2 * found["chunks"] if world_size > 1 else 0), where
            assert found["workspace"] <= case["chunk_bytes"] and found["allocated"] <= found["workspace"], where
            assert (found["chunks"] == 1) == (case["chunk_bytes"] == 10**6), where
            assert found["chunks"] == ranks[0]["chunks"], where
        # each element once there and once back, but for the columns that a rank keeps
        assert sum(found["owned"] for found in ranks) == ELEMENTS
        total = sum(found["planned"] for found in ranks)
        assert total <= 2 * ELEMENTS * bytes_each
        if case["expert_ranks"] == world_size:
            share = (world_size - 1) / world_size
            assert total == pytest.approx(2 * ELEMENTS * bytes_each * share, rel=0.1)
    if world_size > 1:
        assert any(found["zero_pieces"] for results in by_rank for found in results)
    if world_size == 4:
        assert any(found["empty_messages"] for results in by_rank for found in results)


@pytest.fixture(scope="module")
def alone() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield Members(dist.group.WORLD, [0], [0])
    dist.destroy_process_group()


def unit(columns: int = 5, experts: int = 4, dtype: torch.dtype = torch.float32) -> Unit:
    rows = torch.arange(experts * columns, dtype=dtype).view(experts, columns)
    return Unit(0, list(rows), [[(0, columns)]] * experts)


def test_identity_changes_no_bit_and_the_last_column_of_a_chunk_counts(alone: Members) -> None:
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    kept = rows.clone()
    exchange = ExpertExchange([Unit(0, list(rows), [[(0, 5)]] * 4)], alone, 4, 2 * 4 * 4)
    assert len(exchange.chunks) == 5 and exchange.workspace_bytes == 32 and exchange.bytes_sent == 0
    exchange.mix(torch.eye(4)[None])
    assert torch.equal(rows, kept)


def test_released_workspace_comes_back(alone: Members) -> None:
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    weights_LEE = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = weights_LEE[0] @ (weights_LEE[0] @ rows)
    exchange = ExpertExchange([Unit(0, list(rows), [[(0, 5)]] * 4)], alone, 4, 1000)
    for _ in range(2):
        exchange.mix(weights_LEE)
        exchange.release()
    torch.testing.assert_close(rows, expected)


def test_errors_say_what_is_wrong(alone: Members) -> None:
    with pytest.raises(ValueError, match="no expert parameters"):
        ExpertExchange([], alone, 4, 1000)
    with pytest.raises(ValueError, match=r"1 expert-parallel ranks with 4 experts each are not 8 experts"):
        ExpertExchange([unit()], alone, 8, 1000)
    with pytest.raises(ValueError, match=r"chunk_bytes=31 is less than one column of 4 experts \(32\)"):
        ExpertExchange([unit()], alone, 4, 31)
    with pytest.raises(ValueError, match=r"several dtypes \['torch.bfloat16', 'torch.float32'\]"):
        ExpertExchange([unit(), unit(dtype=torch.bfloat16)], alone, 4, 1000)
    with pytest.raises(ValueError, match="one equally long row for each local expert"):
        ExpertExchange([unit(), unit(experts=3)], alone, 4, 1000)
    uneven = Unit(0, [torch.zeros(5), torch.zeros(4), torch.zeros(5), torch.zeros(5)], [[(0, 5)]] * 4)
    with pytest.raises(ValueError, match="one equally long row for each local expert"):
        ExpertExchange([uneven], alone, 4, 1000)

"""Packed rows give what padded ones do: gradients, metrics and log-probabilities, in every layout.

VP2O_PACKED is the number of draws for each world (`VP2O_PACKED=30 pytest tests/megatron/test_packed.py`), VP2O_PACKED_SEED their
seed.
"""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest

from megatron_vp2o.data.row_slots import row_slots
from tests.distributed import run_distributed

JOB = "tests.megatron.packed_job:run"
NUMBER, SEED = int(os.environ.get("VP2O_PACKED", "0")), int(os.environ.get("VP2O_PACKED_SEED", "1"))
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}, {"distributed_optimizer": True}],
    2: [
        {"distributed_optimizer": True},
        {"expert_parallel": 2},
        {"expert_tensor_parallel": 2},
        {"tensor_parallel": 2},
        {"pipeline_parallel": 2},
        {"context_parallel": 2, "expert_parallel": 2},
    ],
    4: [
        {"pipeline_parallel": 2, "expert_parallel": 2},
        {"tensor_parallel": 2, "expert_parallel": 2, "distributed_optimizer": True},
        {"pipeline_parallel": 2, "tensor_parallel": 2},
        {"context_parallel": 2, "tensor_parallel": 2},
    ],
}
OVERLAP = "moe/output_overlap"


def case(chance: random.Random, layout: dict[str, Any]) -> dict[str, Any]:
    recompute = chance.random() < 0.3 and "pipeline_parallel" not in layout
    # from a row at a time to all in one; 20 is the longest row, which fills its budget exactly
    budgets = [chance.choice([1, 6, 20]), chance.choice([23, 40, 1000])]
    chunk_mib = chance.choice([256.0, 0.0005])  # the small one takes the output layer in chunks of a few tokens
    return {
        "layout": layout,
        "seed": chance.randrange(10**6),
        "budgets": budgets,
        "chunk_mib": chunk_mib,
        "recompute": recompute,
    }


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_packed_rows_give_what_padded_ones_do(ranks: int) -> None:
    chance = random.Random(SEED * 10 + ranks)
    cases = [case(chance, layout) for layout in LAYOUTS[ranks]]
    cases += [case(chance, chance.choice(LAYOUTS[ranks])) for _ in range(NUMBER)]
    cases += [{**case(chance, one), "implementation": "torch"} for one in LAYOUTS[ranks] if "context_parallel" in one]
    by_rank = run_distributed(JOB, ranks, cases, timeout=40 * len(cases) + 60)
    moved = 0
    for rank, results in enumerate(by_rank):
        for one, found in zip(cases, results, strict=True):
            where = f"{one}, rank {rank}: {found}"
            assert found["gradient"] < 2e-6, where
            assert found["log_prob"] < 2e-6, where
            assert max(value for name, value in found["metric"].items() if name != OVERLAP) < 2e-5, where
            assert found["tokens"] > 0, where
            first = by_rank[0][cases.index(one)]  # as many micro-batches on every rank, whatever it has
            assert [count for count, _ in found["parts"]] == [count for count, _ in first["parts"]], where
            moved += found["moved"]
    assert moved > 0 or ranks == 1


@pytest.mark.parametrize("seed", range(40))
def test_slots_keep_the_budget_and_balance(seed: int) -> None:
    chance = np.random.default_rng(seed)
    budget, ranks = int(chance.integers(1, 60)), int(chance.integers(1, 6))
    length_R = np.minimum(chance.geometric(0.1, size=int(chance.integers(0, 80))), 70)
    at_least = int(chance.integers(1, 4))
    slots = row_slots(length_R, budget=budget, ranks=ranks, quadratic=0.01, at_least=at_least)
    assert len(slots.rank_R) == len(slots.slot_R) == len(length_R) and slots.count >= at_least
    assert ((slots.rank_R >= 0) & (slots.rank_R < ranks) & (slots.slot_R >= 0) & (slots.slot_R < slots.count)).all()
    tokens, rows = np.zeros((ranks, slots.count)), np.zeros((ranks, slots.count))
    np.add.at(tokens, (slots.rank_R, slots.slot_R), length_R)
    np.add.at(rows, (slots.rank_R, slots.slot_R), 1)
    assert ((tokens <= budget) | (rows == 1)).all()  # a longer row is alone
    # no more micro-batches than twice what any packing needs, and as many as asked for
    needed = max(1, -(-int(np.minimum(length_R, budget).sum()) // (budget * ranks)))
    assert slots.count <= max(at_least, 2 * needed + 1)


def test_ranks_get_alike_costs() -> None:
    length_R = np.minimum(np.random.default_rng(0).lognormal(4.0, 1.0, size=512).astype(np.int64) + 1, 1024)
    slots = row_slots(length_R, budget=4096, ranks=8, quadratic=1e-3)
    cost = np.bincount(slots.rank_R, weights=length_R + 1e-3 * length_R**2.0, minlength=8)
    assert cost.max() / cost.mean() < 1.02
    dealt = np.bincount(np.arange(512) // 64, weights=length_R + 1e-3 * length_R**2.0)  # as prompts are
    assert dealt.max() / dealt.mean() > 1.1

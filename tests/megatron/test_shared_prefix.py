"""Rows that share their prompts give what padded ones do: gradients, metrics, statistics, contexts and log-probabilities, in
every layout.

VP2O_PREFIX is the number of further draws for each world (`VP2O_PREFIX=30 pytest tests/megatron/test_shared_prefix.py`),
VP2O_PREFIX_SEED their seed.
"""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest

from megatron_vp2o.data.prefix_slots import families, prefix_slots, shared_tokens
from tests.distributed import run_distributed
from tests.megatron.test_packed import LAYOUTS as ALL_LAYOUTS
from tests.megatron.test_packed import OVERLAP

JOB = "tests.megatron.shared_prefix_job:run"
# Prompts are not shared under context parallelism, which settings refuse together with it.
LAYOUTS = {ranks: [one for one in some if "context_parallel" not in one] for ranks, some in ALL_LAYOUTS.items()}
NUMBER, SEED = int(os.environ.get("VP2O_PREFIX", "0")), int(os.environ.get("VP2O_PREFIX_SEED", "1"))


def case(chance: random.Random, ranks: int, layout: dict[str, Any]) -> dict[str, Any]:
    one = {
        "layout": layout,
        "seed": chance.randrange(10**6),
        # from a row at a time to all in one; 25 is the longest row
        "budgets": [chance.choice([1, 9, 14]), chance.choice([24, 31, 1000])],
        "chunk_mib": chance.choice([256.0, 0.0005]),  # the small one takes the output layer in chunks of a few tokens
        "recompute": chance.random() < 0.4,
        "balancing": "seq_aux_loss",
        "expert_bias": chance.random() < 0.3,
        "routed": chance.random() < 0.4,
        "micro_batch_size": 3,
    }
    replicas = ranks // (layout.get("tensor_parallel", 1) * layout.get("pipeline_parallel", 1))
    if replicas == 1 and chance.random() < 0.5:  # these depend on what is in a micro-batch: all rows in one
        one |= {
            "balancing": chance.choice(["aux_loss", "global_aux_loss"]),
            "budgets": [1000],
            "micro_batch_size": 100,
        }
    return one


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.smoke), 4])
def test_shared_prompts_give_what_padded_rows_do(ranks: int) -> None:
    chance = random.Random(SEED * 10 + ranks)
    cases = [case(chance, ranks, layout) for layout in LAYOUTS[ranks]]
    cases += [case(chance, ranks, chance.choice(LAYOUTS[ranks])) for _ in range(NUMBER)]
    by_rank = run_distributed(JOB, ranks, cases, timeout=40 * len(cases) + 60)
    shared, split = 0.0, 0
    for rank, results in enumerate(by_rank):
        for one, found in zip(cases, results, strict=True):
            where = f"{one}, rank {rank}: {found}"
            assert found["gradient"] < 2e-6, where
            assert found["log_prob"] < 2e-6, where
            assert found["statistics"] < 2e-6, where
            assert found["contexts"] < 2e-6 and found["bias"] == 0, where
            assert max(value for name, value in found["metric"].items() if name != OVERLAP) < 2e-5, where
            first = by_rank[0][cases.index(one)]  # as many micro-batches on every rank, whatever it has
            assert found["parts"] == first["parts"], where
            shared, split = max(shared, found["shared"]), split + found["split"]
    assert shared > 0.1
    if ranks > 1 and SEED == 1:  # other seeds, and the few draws of one process, may have no group that is cut
        assert split > 0


@pytest.mark.parametrize("seed", range(40))
def test_slots_keep_the_budget_and_lose_no_row(seed: int) -> None:
    chance = np.random.default_rng(seed)
    budget, ranks = int(chance.integers(2, 80)), int(chance.integers(1, 6))
    rows_F = chance.integers(1, 9, size=int(chance.integers(0, 12)))
    prefix_F, key_F = chance.integers(1, 40, size=len(rows_F)), chance.integers(-(2**60), 2**60, size=len(rows_F))
    mixed = chance.permutation(int(rows_F.sum()))  # rows of a family need not be neighbours
    prefix_R, key_R = (column_F.repeat(rows_F)[mixed] for column_F in (prefix_F, key_F))
    length_R = prefix_R + np.minimum(chance.geometric(0.1, size=len(mixed)) - 1, 70)
    family_R = families(prefix_R, key_R)
    assert len(set(family_R.tolist())) == len(rows_F)
    slots = prefix_slots(length_R, prefix_R, family_R, budget=budget, ranks=ranks, quadratic=0.01)
    assert len(slots.rank_R) == len(slots.slot_R) == len(length_R)
    assert ((slots.rank_R >= 0) & (slots.rank_R < ranks) & (slots.slot_R >= 0) & (slots.slot_R < slots.count)).all()
    place_R = slots.rank_R * slots.count + slots.slot_R
    for place in set(place_R.tolist()):
        here = place_R == place
        tokens = shared_tokens(length_R[here], prefix_R[here], family_R[here])
        assert tokens <= budget or here.sum() == 1


def test_ranks_get_alike_costs_and_few_prompts_twice() -> None:
    """A group is cut where ranks would wait, and otherwise stays whole."""
    chance = np.random.default_rng(3)
    family_R = np.arange(64).repeat(8)
    prefix_R = np.minimum(chance.lognormal(5.0, 0.7, size=64).astype(np.int64) + 1, 2000)[family_R]
    length_R = prefix_R + np.minimum(chance.lognormal(4.0, 1.0, size=512).astype(np.int64) + 1, 1024)
    slots = prefix_slots(length_R, prefix_R, family_R, budget=8192, ranks=4, quadratic=1e-4)
    tokens = [
        shared_tokens(length_R[mine], prefix_R[mine], family_R[mine]) for mine in (slots.rank_R == r for r in range(4))
    ]
    assert max(tokens) / np.mean(tokens) < 1.15
    assert sum(tokens) < 1.1 * shared_tokens(length_R, prefix_R, family_R)
    one = prefix_slots(np.full(8, 60), np.full(8, 20), np.zeros(8, np.int64), budget=8192, ranks=4)
    assert sorted(np.bincount(one.rank_R, minlength=4).tolist()) == [2, 2, 2, 2]  # one group, and nobody waits

"""However prompts and rows are dealt to ranks (one may have none of them), padded or packed, with prompts shared or not, a step is
that of a single process with padded rows.

VP2O_UNEVEN is the number of draws for each world (`VP2O_UNEVEN=40 pytest tests/megatron/test_uneven_ranks.py`), VP2O_UNEVEN_SEED
their seed. The default seed draws rows to train on, and ranks without any, under tensor, expert, expert-tensor and pipeline
parallelism, and has both kinds of router replay, with and without recomputation.
"""

from __future__ import annotations

import os
import random
from dataclasses import asdict, replace
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.megatron.test_stein_layouts import close
from tests.megatron.uneven_job import GROUP, Draw

JOB = "tests.megatron.uneven_job:run"
NUMBER, SEED = int(os.environ.get("VP2O_UNEVEN", "3")), int(os.environ.get("VP2O_UNEVEN_SEED", "965"))
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [
        {},
        {"expert_parallel": 2},
        {"expert_tensor_parallel": 2},
        {"tensor_parallel": 2},
        {"tensor_parallel": 2, "expert_tensor_parallel": 2},
        {"pipeline_parallel": 2},
    ],
    4: [
        {},
        {"expert_parallel": 2},
        {"expert_parallel": 4},
        {"pipeline_parallel": 2, "expert_parallel": 2},
        {"tensor_parallel": 2, "expert_parallel": 2},
        {"tensor_parallel": 2, "expert_tensor_parallel": 2},
        {"expert_parallel": 2, "expert_tensor_parallel": 2},
        {"pipeline_parallel": 2, "tensor_parallel": 2},
    ],
}


CONTEXT: dict[int, list[dict[str, Any]]] = {
    2: [{"context_parallel": 2}, {"context_parallel": 2, "expert_parallel": 2}],
    4: [
        {"context_parallel": 2},
        {"context_parallel": 4},
        {"context_parallel": 2, "expert_parallel": 4},
        {"context_parallel": 2, "tensor_parallel": 2},
        {"context_parallel": 2, "pipeline_parallel": 2},
    ],
}
"""Layouts of a few more draws of each world: one for each three of the others."""


def deal(chance: random.Random, prompts: int, ranks: int) -> list[int]:
    """Whose prompt each is: all on one rank, or any way."""
    only = chance.randrange(ranks)
    return [only] * prompts if chance.random() < 0.4 else [chance.randrange(ranks) for _ in range(prompts)]


def draw(chance: random.Random, layouts: list[dict[str, Any]], ranks: int) -> Draw:
    prompts, steps = chance.randint(1, 5), chance.randint(1, 3)
    rows = prompts * GROUP
    kept = sorted(chance.sample(range(rows), chance.choice([0, 1, rows // 2, rows])))
    minibatches = [chance.randrange(steps) for _ in range(rows)]
    if chance.random() < 0.3:  # all in one optimizer step, none in the others
        minibatches = [chance.randrange(steps)] * rows
    # The variance loss is left out: it is the variance over a micro-batch, which depends on how data is dealt to ranks.
    drawn = chance.random()
    specialization: dict[str, Any] = {"orthogonality_coef": 0.05} if drawn < 0.5 else {}
    if drawn < 0.25:
        specialization = {"orthogonality_coef": 0.3, "orthogonality_scale": "relative"}
    return Draw(
        layout=chance.choice(layouts) | ({"distributed_optimizer": True} if chance.random() < 0.5 else {}),
        owner=deal(chance, prompts, ranks),
        kept=kept,
        minibatches=minibatches,
        steps=steps,
        micro_batch_size=chance.choice([1, 2, 3, 7]),
        delta=chance.choice([1e-9, 1.9, 1.9]),
        max_policy_drift=chance.choice([None, 1e-9, 900.0]),
        drift_share=chance.choice([0.1, 0.5, 1.0]),
        stein={"eta": chance.choice([0.0, 0.05])},
        specialization=specialization,
        problems=chance.randint(1, 4),
        seed=chance.randrange(10**6),
        recompute=chance.random() < 0.3,
    )


def shares(one: Draw) -> bool:
    """Whether prompts may be shared."""
    return one.micro_batch_tokens is not None and one.layout.get("context_parallel", 1) == 1


def compare(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    for row, response in found["responses"].items():
        assert response == expected["responses"][row], where
    assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-6), where
    assert found["mismatch"] < 1e-4, where
    assert [found["drift"], found["ess"]] == pytest.approx([expected["drift"], expected["ess"]], abs=1e-5), where
    for number, (ours, theirs) in enumerate(zip(found["updates"], expected["updates"], strict=True)):
        at = f"update {number}: {where}"
        assert ours["outcome"] == theirs["outcome"] and ours["tokens"] == theirs["tokens"], at
        # the sampled tokens of output overlap are those of a micro-batch, which depend on how data is dealt
        names = theirs["metrics"].keys() - {"moe/output_overlap"}
        assert ours["metrics"].keys() == theirs["metrics"].keys(), at
        left, right = ({name: update["metrics"][name] for name in names} for update in (ours, theirs))
        assert left == pytest.approx(right, rel=2e-3, abs=2e-5), at
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3, nan_ok=True), at
        assert (ours["coactivation"] is None) == (theirs["coactivation"] is None), at
        kinds = ["prototypes"] if ours["coactivation"] is None else ["prototypes", "coactivation"]
        for index, layer in enumerate(ours["layers"]):
            for kind in kinds:
                close(ours[kind][index], theirs[kind][layer - 1], f"{kind} {layer}: {at}", 1e-3)
    for kind, tolerance in (("gradients", 1e-3), ("parameters", 1e-4), ("routers", 1e-4)):
        for key, value in found[kind].items():
            reference = expected[kind][key]
            if kind != "gradients" or any(reference):
                close(value, reference, f"{kind} {key}: {where}", tolerance)
    close(found["final"], expected["final"], where, 1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_a_step_does_not_depend_on_who_has_which_rows(ranks: int) -> None:
    chance = random.Random(SEED * 10 + ranks)
    packed = random.Random(SEED + ranks)  # apart, so that a seed's other draws are what they were
    draws = [
        replace(
            draw(chance, LAYOUTS[ranks], ranks),
            replay=("R3", "R2", "off")[number % 3],
            micro_batch_tokens=packed.choice([None, 2, 12, 25, 300]),  # from a row at a time to all in one
        )
        for number in range(NUMBER)
    ]
    split, with_replay = random.Random(SEED + 7 * ranks), ("R3", "R2", "off")
    draws += [
        replace(
            draw(split, CONTEXT[ranks], ranks),
            replay=with_replay[(number + ranks) % 3],
            micro_batch_tokens=split.choice([None, 2, 12, 25, 300]),
        )
        for number in range(-(-NUMBER // 3))
    ]
    draws = [replace(one, prefix_sharing=packed.choice(["on", "on", "off"])) if shares(one) else one for one in draws]
    alone = [asdict(replace(one, layout={}, micro_batch_tokens=None, prefix_sharing="off")) for one in draws]
    references = run_distributed(JOB, 1, alone, timeout=30 * len(draws) + 60)[0]
    by_rank = run_distributed(JOB, ranks, [asdict(one) for one in draws], timeout=60 * len(draws) + 60)
    moved = empty = replayed = shared = 0
    for index, one in enumerate(draws):
        moved += any(update["tokens"] for update in references[index]["updates"])
        for rank, results in enumerate(by_rank):
            compare(results[index], references[index], f"{one}, rank {rank}")
            empty += any(not update["rows"] for update in results[index]["updates"])
            assert not results[index].get("gone astray"), f"{one}, rank {rank}"
            replayed += results[index].get("replayed", 0)
            shared += sum(update["shared"] for update in results[index]["updates"])
    assert moved and empty and replayed and shared  # else nothing was tried

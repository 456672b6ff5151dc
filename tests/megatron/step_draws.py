"""Cases of test_steps.py, drawn at random. Apart from the job, so that collecting the tests imports no megatron.core."""

from __future__ import annotations

import random
from typing import Any

EVENTS = ("taken", "rejected", "drifted", "skipped", "empty", "no rows")
"""rejected: barycenters moved too far; drifted: the policy did."""
REJECTED = ("rejected", "drifted")
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}, {"distributed_optimizer": True}],
    2: [
        {},
        {"distributed_optimizer": True},
        {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
        {"tensor_parallel": 2},
        {"expert_parallel": 2, "distributed_optimizer": True},
        {"pipeline_parallel": 2},
        {"expert_tensor_parallel": 2},
    ],
    4: [
        {"tensor_parallel": 2, "expert_parallel": 2},
        {"pipeline_parallel": 2, "expert_parallel": 2, "distributed_optimizer": True},
        {"tensor_parallel": 2, "pipeline_parallel": 2},
    ],
}


def draw(seed: int, world_size: int) -> dict[str, Any]:
    """Switches, a layout, and what becomes of each of six steps (at least two are taken, one is not)."""
    rng = random.Random(seed)
    region = rng.choice(["off", "monitor", "enforce", "enforce"])
    sigmoid = rng.random() < 0.5
    possible = [event for event in EVENTS if event not in REJECTED or region == "enforce"]
    events = ["taken", "taken", rng.choice(possible[1:]), *rng.choices(possible, k=3)]
    rng.shuffle(events)
    return {
        "seed": seed,
        "events": events,
        "region": region,
        "layout": LAYOUTS[world_size][seed % len(LAYOUTS[world_size])],
        "precision": rng.choice(["fp32", "fp32", "bf16"]),
        "on_host": rng.random() < 0.5,
        "counting": rng.random() < 0.5,
        "stein": rng.choice(["enabled", "monitor", "off"]),
        "prototype_interval": rng.choice([1, 3]),
        "power_iterations": rng.choice([1, 2]),
        "specialization": rng.choice(
            [
                {},
                {"orthogonality_coef": 0.1},
                {"orthogonality_coef": 0.3, "orthogonality_scale": "relative"},
                {"variance_coef": 0.1},
            ]
        ),
        "model": {
            "moe_router_score_function": "sigmoid" if sigmoid else "softmax",
            "moe_router_enable_expert_bias": sigmoid and rng.random() < 0.8,
            "moe_router_load_balancing_type": rng.choice(["aux_loss", "seq_aux_loss", "global_aux_loss", "none"]),
            "moe_aux_loss_coeff": rng.choice([0.0, 0.1]),
            "moe_z_loss_coeff": rng.choice([0.0, 0.1]),
            "recompute": rng.random() < 0.3,
        },
    }

"""Cases of test_router.py, drawn at random. Apart from the job, so that collecting the tests imports no megatron.core."""

from __future__ import annotations

import random
from typing import Any


def draw(seed: int) -> dict[str, Any]:
    """Settings, rows and a micro-batch size, at random."""
    rng = random.Random(seed)
    rows = rng.randint(4, 9)
    return {
        "seed": seed,
        "kind": rng.choice(["aux_loss", "seq_aux_loss", "global_aux_loss"]),
        "score": rng.choice(["softmax", "sigmoid"]),
        "topk": rng.choice([1, 2, 3]) if seed % 2 else 2,
        "aux": rng.choice([0.0, 0.01, 1.0]) if seed % 3 else 0.5,
        "z": rng.choice([0.0, 0.1]),
        "rows": rows,
        "micro_batch_size": rng.randint(1, rows),
        "loss_share": rng.choice([0.02, 0.3, 1.0]),
        "bias": seed % 4 < 2,  # where scores are sigmoids
    }

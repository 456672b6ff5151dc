"""The plan's memory of training against what torch's profiler sees on the CPU, at drawn shapes (VP2O_PEAKS=20: so many)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

DRAWN = """
import random, sys
from tools.bench.memory import Case
chance = random.Random(int(sys.argv[1]))
hidden, heads = 32 * chance.randint(2, 6), chance.choice([2, 4])
overrides = {
    "hidden_size": hidden,
    "num_attention_heads": heads,
    "num_query_groups": chance.choice([1, 2]),
    "kv_channels": chance.choice([16, 32, 64]),
    "qk_layernorm": str(chance.random() < 0.5).lower(),
    "num_layers": chance.randint(1, 5),
    "num_moe_experts": chance.choice([4, 16, 48]),
    "moe_router_topk": chance.randint(2, 4),
    "moe_ffn_hidden_size": 16 * chance.randint(2, 12),
    "vocab_size": chance.choice([128, 2000, 20000]),
    "recompute": str(chance.random() < 0.3).lower(),
    "logits_chunk_mib": chance.choice([2, 256]),
}
print(overrides)
case = Case(chance.randint(2, 12), 8 * chance.randint(4, 20), [f"model.{name}={value}" for name, value in overrides.items()])
print("bytes", *case.measured_and_planned())
"""


@pytest.mark.parametrize("seed", range(int(os.environ.get("VP2O_PEAKS", "2"))))
def test_the_peak_of_a_drawn_shape(seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRAWN, str(seed)], capture_output=True, text=True, timeout=240, check=True
    )
    drawn, found = done.stdout.strip().splitlines()[-2:]
    measured, planned = map(int, found.split()[1:])
    assert abs(planned / measured - 1) < 0.05, (seed, drawn, measured, planned)

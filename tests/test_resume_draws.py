"""Random recipes that are killed and resumed; see `resume_draws.py`. RESUME_SEEDS=FIRST:LAST tries other seeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.resume_draws import draw
from tests.resume_job import ROOT

# Chosen so that weights move in each, and that together they have every algorithm, single, DP2, EP2, PP2 and CP2, bf16, an
# expert bias, a budget, a trust region that accepts and rejects, packed rows, shared prompts, chunks of logits and
# implementation=torch. Tensor parallelism is in tests/megatron/test_checkpoint.py.
SEEDS = [0, 3, 5, 7, 9, 13, 78]
FEWER = [7, 9, 78]
"""Without VP2O_RESUME_DRAWS=1, which `make soak` sets: CI has a limit. What seed 5 draws, GRPO on two ranks that share the data, is
killed and resumed in test_resume.py, too, with the experts on both."""


@pytest.mark.slow
@pytest.mark.distributed
def test_random_recipes_resume_as_if_nothing_had_happened(tmp_path: Path) -> None:
    chosen = os.environ.get("RESUME_SEEDS")
    usual = SEEDS if os.environ.get("VP2O_RESUME_DRAWS") else FEWER
    seeds = usual if chosen is None else list(range(*map(int, chosen.split(":"))))
    done = subprocess.run(
        [sys.executable, "-m", "tests.resume_draws", str(tmp_path), *map(str, seeds)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150 * len(seeds),
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [result["seed"] for result in results] == seeds
    wrong = [result for result in results if result["wrong"]]
    assert not wrong, (wrong, [draw(result["seed"]).arguments for result in wrong])
    moved = [result["moved"] > 0 and result["taken"] > 0 for result in results]
    assert all(moved) if chosen is None else sum(moved) > 0.5 * len(moved), results
    assert sum(result["killed"] for result in results) >= (len(seeds) // 2 if chosen is None else 1), results

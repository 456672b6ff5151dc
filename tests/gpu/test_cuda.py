"""The same engine and learner on a CUDA device, with none of the CPU patches. Run by `make gpu-check`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu
from megatron_vp2o.tracking.record import read
from tests.distributed import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_no_cpu_patch_is_applied():
    assert enable_cpu() == []


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("bf16", 1.0)])
def test_generation_scoring_and_training(precision, bound):
    from megatron_vp2o.config.schema import Implementation, Precision
    from megatron_vp2o.megatron.platform import world
    from tests.megatron import policy_job

    config = policy_job.small_config()
    config.model.precision = Precision[precision]
    config.model.implementation = Implementation.local
    try:
        result = policy_job.train(config)
    finally:
        world.stop()
    assert max(result["mismatch"]) <= bound
    assert all(0 < norm < 1e3 for norm in result["grad_norm"])
    assert result["tokens"][0] != result["tokens"][-1]


def test_a_run_from_the_command_line(tmp_path: Path):
    run_dir = tmp_path / "run"
    settings = ["model=micro", "task.train_size=200", "task.test_size=8", "init_from=null"]
    short = [
        "algorithm.steps=3",
        "algorithm.filter_uniform_groups=false",
        "evaluation=quick",
        "logging.tensorboard=false",
    ]
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "megatron_vp2o.train",
                "--config-name",
                "countdown_tiny_grpo",
                f"run_dir={run_dir}",
            ),
            *settings,
            *short,
        ],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = read(run_dir)
    assert record["step"] == [0, 1, 2, 3]
    mismatches = [float(value) for value in record["policy/logprob_mismatch"] if value is not None]
    assert len(mismatches) == 3 and max(mismatches) <= 1e-3

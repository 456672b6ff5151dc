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


@pytest.mark.parametrize("implementation", ["local", "torch"])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("bf16", 1.0)])
def test_generation_scoring_and_training(precision, bound, implementation):
    from megatron_vp2o.config.schema import Implementation, Precision
    from megatron_vp2o.megatron.platform import world
    from tests.megatron import policy_job

    config = policy_job.small_config()
    config.model.precision = Precision[precision]
    config.model.implementation = Implementation[implementation]
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


@pytest.mark.parametrize("sizes", [[300, 0, 17, 195], [0, 0, 0, 512], [0, 0, 0, 0], [1, 509, 1, 1]])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_grouped_experts_equal_float64(sizes: list[int], dtype: torch.dtype, bound: float):
    """Experts without a token among them: their gradients are zeros, not what lay in memory."""
    from megatron_vp2o.megatron.model import experts

    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    x, probs = random(sum(sizes), 64), random(sum(sizes)).float()
    fc1, fc2 = random(4, 64, 64) / 8, random(4, 64, 32) / 8
    poison = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(8)]
    del poison  # what is not written shows
    leaves = [x.requires_grad_(), probs.requires_grad_(), *(w.detach().requires_grad_() for w in (*fc1, *fc2))]
    ends = torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)
    found = experts._GroupedSwiGLUExperts.apply(leaves[0], leaves[1], ends, fc1, fc2, None, *leaves[2:])
    seed = random(*found.shape)
    gradients = torch.autograd.grad(found, leaves, seed)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = experts._SwiGLUExperts.apply(exact[0], exact[1], sizes, *exact[2:])
    wanted = torch.autograd.grad(expected, exact, seed.double())
    for mine, theirs in zip([found, *gradients], [expected, *wanted], strict=True):
        scale = theirs.norm().clamp(min=1e-6)
        assert torch.isfinite(mine).all() and float((mine.double() - theirs).norm() / scale) <= bound


def test_chunked_log_probs_equal_the_plain_ones():
    """Triton's kernels against torch's, from the same bfloat16 logits."""
    import torch.distributed as dist

    from megatron_vp2o.parallel import output_logprobs
    from megatron_vp2o.parallel.output_logprobs import output_log_probs_and_entropy

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        generator = torch.Generator("cuda").manual_seed(0)
        hidden = torch.randn(300, 64, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
        weight = torch.randn(5000, 64, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
        targets = torch.randint(4900, (300,), generator=generator, device="cuda")
        seeds = torch.randn(2, 300, generator=generator, device="cuda")
        results = []
        for triton in (True, False):
            output_logprobs._USE_TRITON = triton
            values = output_log_probs_and_entropy(
                hidden,
                weight,
                targets,
                temperature=0.7,
                valid_vocab=4900,
                group=dist.group.WORLD,  # type: ignore[arg-type]
                chunk_tokens=64,
            )
            results.append([*values, *torch.autograd.grad(values, [hidden, weight], list(seeds))])
        for name, mine, theirs in zip(("logprob", "entropy", "dhidden", "dweight"), *results, strict=True):
            error = float((mine.float() - theirs.float()).norm() / theirs.float().norm())
            assert error < (1e-5 if name in ("logprob", "entropy") else 1e-2), (name, error)
    finally:
        output_logprobs._USE_TRITON = None
        dist.destroy_process_group()


def test_training_with_chunks_of_logits_equals_training_without():
    """Losses and gradient norms of the same batches in float32."""
    from megatron_vp2o.megatron.platform import world
    from tests.megatron import policy_job

    results = []
    for chunk in (256.0, 24 * 4 * 5 / 2**20):
        config = policy_job.small_config()
        config.model.logits_chunk_mib = chunk
        try:
            results.append(policy_job.train(config))
        finally:
            world.stop_model_parallel()
    world.stop()
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(torch.tensor(results[0][name]), torch.tensor(results[1][name]), rtol=1e-3, atol=1e-4)

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
@pytest.mark.parametrize(
    ("precision", "replay", "bound"), [("fp32", "off", 1e-3), ("bf16", "off", 1e9), ("bf16", "R3", 0.1)]
)
def test_generation_scoring_and_training(precision, replay, bound, implementation):
    """In bfloat16 decoding and scoring may choose other experts where two are nearly tied (a difference of a nat was seen), so
    that only replayed routes leave a difference that is rounding alone."""
    from megatron_vp2o.config.schema import Implementation, Precision, RouterReplay
    from megatron_vp2o.megatron.platform import world
    from tests.megatron import policy_job

    config = policy_job.small_config()
    config.model.precision = Precision[precision]
    config.model.implementation = Implementation[implementation]
    config.rollout.router_replay = RouterReplay[replay]
    try:
        result = policy_job.train(config)
    finally:
        world.stop()
    assert max(result["mismatch"]) <= bound
    assert all(0 < norm < 1e3 for norm in result["grad_norm"])
    assert result["tokens"][0] != result["tokens"][-1]


@pytest.mark.parametrize(
    ("recipe", "algorithm"), [("countdown_tiny_grpo", "grpo_answers"), ("countdown_tiny_vp2o", "vp2o_policy_drift")]
)
def test_a_run_from_the_command_line_and_on_from_its_checkpoint(tmp_path: Path, recipe: str, algorithm: str):
    run_dir = tmp_path / "run"
    settings = [
        *("model=micro", "task.train_size=200", "task.test_size=8", "init_from=null", f"algorithm={algorithm}"),
        *("algorithm.filter_uniform_groups=false", "evaluation=quick", "logging.tensorboard=false"),
        *("optimizer.lr_warmup_steps=0", "optimizer.lr=1e-3", "checkpoint.interval=1"),
    ]
    for steps in (2, 4):  # the second one goes on from the first's last checkpoint
        command = (sys.executable, "-m", "megatron_vp2o.train", "--config-name", recipe, f"run_dir={run_dir}")
        done = subprocess.run(
            [*command, *settings, f"algorithm.steps={steps}"],
            cwd=ROOT,
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = read(run_dir)
    assert record["step"] == [0, 1, 2, 3, 4]

    def values(name: str) -> list[float]:
        return [float(value) for value in record[name] if value is not None]

    assert len(values("policy/logprob_mismatch")) == 4 and max(values("policy/logprob_mismatch")) <= 1e-3
    assert all(0 < norm < 1e3 for norm in values("optimizer/grad_norm"))
    if algorithm == "grpo_answers":
        assert values("reward/shaped_mean") != values("reward/mean")
        return
    assert all(ratio > 0 for ratio in values("stein/repulsion_ratio")) and len(values("stein/repulsion_ratio")) == 4
    assert max(values("trust_region/distance")) > 0 and 0 < max(values("trust_region/policy_drift")) <= 0.15
    assert all(loss > 0 for loss in values("moe/orthogonality_loss"))


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


@pytest.mark.parametrize("beside", [True, False], ids=["side by side", "apart"])
@pytest.mark.parametrize(("tf32", "bound"), [(False, 1e-6), (True, 1e-3)])
def test_the_exchange_is_the_product(tf32: bool, bound: float, beside: bool):
    """Against float64. With TF32 it is as far off as 10 bits of mantissa say, less than the bfloat16 that gradients came from."""
    import torch.distributed as dist

    from megatron_vp2o.parallel.exchange import ExpertExchange, Members, Unit

    experts, columns = 128, 3000
    generator = torch.Generator("cuda").manual_seed(0)
    matrix = torch.randn(experts, columns, device="cuda", generator=generator)
    rows = list(matrix.unbind(0)) if beside else [row.clone() for row in matrix]
    weights_LEE = torch.rand(1, experts, experts, device="cuda", generator=generator)
    expected = weights_LEE[0].double() @ matrix.double()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None
        members = Members(group, [0], [0])
        unit = Unit(0, rows, [[(0, columns)]] * experts)
        ExpertExchange([unit], members, experts, 8 * experts * 700, tf32=tf32).mix(weights_LEE)
    finally:
        dist.destroy_process_group()
    error = ((torch.stack(rows).double() - expected).norm() / expected.norm()).item()
    assert error < bound
    assert tf32 == (error > 2e-6)  # the setting does what it says
    assert not torch.backends.cuda.matmul.allow_tf32

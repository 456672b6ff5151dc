"""Whole runs with shaped rewards, alone and in several layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vp2o.tracking.record import read
from tests.distributed import run_distributed

SETTINGS = [
    "algorithm=vp2o_answers",
    "model=micro",
    "init_from=null",
    "task.train_size=200",
    "task.validation_size=8",
    "task.test_size=8",
    "evaluation.interval=0",
    "evaluation.problems=8",
    "evaluation.samples=2",
    "evaluation.pass_at=[1]",
    "evaluation.final_split=false",
    "checkpoint.interval=0",
    "checkpoint.save_at_end=false",
    "logging.tensorboard=false",
    "optimizer.lr=3e-3",
    "optimizer.lr_warmup_steps=1",
    "algorithm.steps=4",
    "algorithm.minibatches=2",
    "algorithm.prompts_per_step=8",
    "algorithm.group_size=4",
    "algorithm.kl_coef=0.05",
    "algorithm.trust_region.mode=monitor",  # what is decided by a threshold may differ by rounding
    "algorithm.budget.mode=monitor",
    "algorithm.objective=grpo",
    "model.moe_aux_loss_coeff=0",  # a product of micro-batch means: it depends on how data is dealt to ranks
]
COMPARED = (
    "reward/mean",
    "reward/shaped_mean",
    "reward/shaped_std",
    "reward/log_ratio",
    "rollout/distinct",
    "rollout/groups_silent",
    "moe/orthogonality_loss",
    "policy/loss",
    "optimizer/grad_norm",
)


def run(folder: Path, *overrides: str, ranks: int = 1) -> dict[str, list[float]]:
    arguments = [f"run_dir={folder}", *SETTINGS, *overrides]
    results = run_distributed("tests.rl.shaping_job:train", ranks, "countdown_tiny_vp2o", arguments, timeout=240)
    assert results == [0] * ranks
    record = read(folder)
    return {key: [float(v) for v in record[key] if v is not None] for key in record}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return run(tmp_path_factory.mktemp("alone") / "run")


def test_repulsion_and_prior_act(alone):
    assert all(0.05 < value < 0.95 for value in alone["reward/mean"]), "the task must be solved now and then"
    assert alone["reward/log_ratio"][0] == pytest.approx(0.0, abs=1e-4), "the policy is its own reference at first"
    assert alone["reward/log_ratio"][-1] > 1e-2
    for task, shaped in zip(alone["reward/mean"], alone["reward/shaped_mean"], strict=True):
        assert shaped < task - 0.01
    assert alone["moe/orthogonality_loss"][-1] > 0


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ["parallel.expert_parallel=2"]),
        (2, ["parallel.pipeline_parallel=2"]),
        (4, ["parallel.tensor_parallel=2", "parallel.expert_parallel=2", "parallel.distributed_optimizer=true"]),
    ],
    ids=["expert2", "pipeline2", "tensor2_expert2_data2"],
)
def test_layouts_shape_the_same_rewards(alone, tmp_path, ranks, layout):
    other = run(tmp_path / "run", *layout, ranks=ranks)
    for key in COMPARED:
        assert other[key] == pytest.approx(alone[key], rel=2e-3, abs=2e-5), key


@pytest.mark.distributed
@pytest.mark.parametrize("objective", ["kl_cov", "clip_cov"])
def test_the_same_tokens_are_treated_apart_whoever_holds_them(objective):
    (alone,) = run_distributed("tests.rl.shaping_job:select", 1, objective, 7)
    two = run_distributed("tests.rl.shaping_job:select", 2, objective, 7)
    assert 8 < len(alone) < 24, "a tenth of some 150 tokens"
    assert sorted(two[0] + two[1]) == sorted(alone) and two[0] and two[1]
    (other,) = run_distributed("tests.rl.shaping_job:select", 1, objective, 8)
    assert other != alone

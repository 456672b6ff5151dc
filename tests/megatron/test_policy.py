"""Generation, scoring and training give the same numbers under every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.megatron import policy_job

ENDS = set(policy_job.ENDS)
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "TP=2": {"tensor_parallel": 2},
        "EP=2": {"expert_parallel": 2},
        "ETP=2": {"expert_tensor_parallel": 2},
        "PP=2": {"pipeline_parallel": 2},
        "DP=2": {},
        "DP=2, distributed optimizer": {"distributed_optimizer": True},
        "TP=2, EP=2 inside": {"tensor_parallel": 2, "expert_parallel": 2},
        "TP=2, ETP=2": {"tensor_parallel": 2, "expert_tensor_parallel": 2},
        "CP=2": {"context_parallel": 2},
        "CP=2, EP=2 inside": {"context_parallel": 2, "expert_parallel": 2, "distributed_optimizer": True},
    },
    4: {
        "TP=2 x EP=2": {"tensor_parallel": 2, "expert_parallel": 2},
        "PP=2 x EP=2": {"pipeline_parallel": 2, "expert_parallel": 2},
        "PP=2 x TP=2": {"pipeline_parallel": 2, "tensor_parallel": 2},
        "DP=2 x EP=2, distributed optimizer": {"expert_parallel": 2, "distributed_optimizer": True},
        "CP=2 x TP=2": {"context_parallel": 2, "tensor_parallel": 2},
        "PP=2 x CP=2": {"context_parallel": 2, "pipeline_parallel": 2},
    },
}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    (results,) = run_distributed("tests.megatron.policy_job:run", 1, [{}])
    return results[0]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_layouts_agree(reference, world_size):
    layouts = LAYOUTS[world_size]
    by_rank = run_distributed("tests.megatron.policy_job:run", world_size, list(layouts.values()), timeout=280)
    for index, name in enumerate(layouts):
        for rank, results in enumerate(by_rank):
            ours, where = results[index], f"{name}, rank {rank}"
            assert ours["tokens"] == reference["tokens"], where
            assert not any(ENDS & set(tokens[:-1]) for step in ours["responses"] for tokens in step), where
            for key in ("loss", "entropy", "grad_norm"):
                assert ours[key] == pytest.approx(reference[key], rel=1e-4, abs=1e-5), f"{key}: {where}"
            assert max(ours["mismatch"]) <= 1e-5, where
            difference = (torch.tensor(ours["final"]) - torch.tensor(reference["final"])).abs().max().item()
            assert difference <= 2e-4, where


def test_training_changed_something(reference):
    assert all(math.isfinite(x) and x > 0 for x in reference["grad_norm"])
    assert reference["tokens"][0] != reference["tokens"][-1]
    assert {
        tokens[-1] for step in reference["responses"] for tokens in step
    } >= ENDS  # each of them ended some response


@pytest.fixture(scope="module")
def policy():
    config = policy_job.small_config()
    groups = policy_job.world.start(config.parallel, config.seed)
    yield policy_job.MegatronPolicy(config, groups, vocab_size=policy_job.VOCAB, optimizer_steps=4)
    policy_job.world.stop()


def one_batch(advantage: float):
    fixed = policy_job.fixed_batch()
    return policy_job.policy_batch(fixed, torch.full((4,), advantage), torch.ones(4).bool(), 1.0)


OBJECTIVE = policy_job.OnRollouts(
    policy_job.GRPOObjective(clip_epsilon_low=0.2, clip_epsilon_high=0.2, kl_coef=0.0, entropy_coef=0.0)
)


@pytest.mark.parametrize("advantage", [float("nan"), float("inf")])
def test_a_non_finite_gradient_skips_the_step(policy, advantage):
    before = [p.detach().clone() for p in policy.model.parameters()]
    policy.forward_backward(one_batch(advantage), OBJECTIVE, 4)
    stats = policy.optimizer_step(1)
    assert stats.skipped and not math.isfinite(stats.grad_norm)
    assert all(torch.equal(p, old) for p, old in zip(policy.model.parameters(), before, strict=True))
    policy.forward_backward(one_batch(0.5), OBJECTIVE, 4)
    stats = policy.optimizer_step(1)
    assert not stats.skipped and math.isfinite(stats.grad_norm)
    assert all(p.isfinite().all() for p in policy.model.parameters())


def test_a_batch_without_loss_tokens_changes_nothing(policy):
    before = [p.detach().clone() for p in policy.model.parameters()]
    batch = policy_job.policy_batch(policy_job.fixed_batch(), torch.ones(4), torch.zeros(4).bool(), 1.0)
    metrics = policy.forward_backward(batch, OBJECTIVE, 4)
    assert metrics["tokens"] == 0 and policy.optimizer_step(0).skipped
    assert all(torch.equal(p, old) for p, old in zip(policy.model.parameters(), before, strict=True))


def test_micro_batches_do_not_matter(policy):
    gradients = []
    for size in (1, 3, 4):
        policy.forward_backward(one_batch(0.5), OBJECTIVE, size)
        gradients.append(torch.cat([p.main_grad.flatten() for p in policy.model.parameters()]).clone())
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)

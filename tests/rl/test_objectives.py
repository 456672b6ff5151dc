"""Objectives in the form that a policy takes."""

from __future__ import annotations

import pytest
import torch

from megatron_vp2o.core.objective import GRPOObjective, PolicyInputs
from megatron_vp2o.rl.interfaces import Objective
from megatron_vp2o.rl.objectives import OnRollouts, next_token
from megatron_vp2o.rl.types import TrainBatch


def make_batch(**tensors: torch.Tensor) -> TrainBatch:
    mask_NS = torch.tensor([[False, True, True], [False, True, False]])
    return TrainBatch(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([3, 2]), mask_NS, **tensors)  # type: ignore[arg-type]


def test_the_batch_reaches_the_objective():
    objective = GRPOObjective(clip_epsilon_low=0.2, clip_epsilon_high=0.2, kl_coef=0.1, entropy_coef=0.1)
    adapted: Objective = OnRollouts(objective)
    logprobs_NS, entropy_NS = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    behaviour_NS, reference_NS, advantages_N = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([1.0, -1.0])
    batch = make_batch(
        behaviour_logprobs_NS=behaviour_NS, advantages_N=advantages_N, reference_logprobs_NS=reference_NS
    )
    got, got_metrics = adapted(logprobs_NS, entropy_NS, batch)
    want, want_metrics = objective(
        PolicyInputs(logprobs_NS, behaviour_NS, advantages_N, batch.loss_mask_NS, reference_NS, entropy_NS)
    )
    assert torch.equal(got, want)
    assert got_metrics == want_metrics


def test_the_reference_is_optional_and_the_rest_is_not():
    adapted = OnRollouts(GRPOObjective(clip_epsilon_low=0.2, clip_epsilon_high=0.2, kl_coef=0.0, entropy_coef=0.0))
    values_NS = torch.zeros(2, 3)
    _, metrics = adapted(values_NS, values_NS, make_batch(behaviour_logprobs_NS=values_NS, advantages_N=torch.ones(2)))
    assert "kl_reference" not in metrics
    assert metrics["loss"] == -3
    with pytest.raises(ValueError, match="advantages_N"):
        adapted(values_NS, values_NS, make_batch(behaviour_logprobs_NS=values_NS))


def test_the_engine_is_compared_at_tokens_that_count():
    adapted = OnRollouts(GRPOObjective(clip_epsilon_low=0.2, clip_epsilon_high=0.2, kl_coef=0.0, entropy_coef=0.0))
    logprobs_NS = torch.zeros(2, 3)
    engine_NS = torch.tensor([[9.0, 0.25, -0.5], [float("nan"), 0.125, 7.0]])
    tensors = {"behaviour_logprobs_NS": logprobs_NS, "advantages_N": torch.ones(2)}
    _, metrics = adapted(logprobs_NS, logprobs_NS, make_batch(**tensors))
    assert "logprob_mismatch" not in metrics
    _, metrics = adapted(logprobs_NS, logprobs_NS, make_batch(**tensors, engine_logprobs_NS=engine_NS))
    assert metrics["logprob_mismatch"] == 0.5


def test_next_token():
    objective: Objective = next_token
    loss, metrics = objective(torch.full((2, 3), -0.5), torch.zeros(2, 3), make_batch())
    assert loss == metrics["loss"] == 1.5

"""Every reinforcing choice of the `algorithm` group: from verdicts to a gradient, with the settings that it stands for."""

from __future__ import annotations

import pytest
import torch

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.register import resource_dir
from megatron_vp2o.config.schema import GRPOConfig
from megatron_vp2o.config.validate import validate
from megatron_vp2o.rl.objectives import OnRollouts, policy_objective
from megatron_vp2o.rl.rewards import RewardShaping
from megatron_vp2o.rl.types import Rollouts, TrainBatch, Verdict
from megatron_vp2o.tasks.tokenizer import CharTokenizer

NAMES = ["grpo", "vp2o", *sorted(path.stem for path in (resource_dir("conf") / "algorithm").glob("*.yaml"))]
ANSWERS = ["a", "a", "b", None, None, None, None, None]


def gradient(settings: GRPOConfig) -> torch.Tensor:
    """Gradient of the objective at the tokens of one group of eight rollouts, by hand from the trainer's parts."""
    generator = torch.Generator().manual_seed(0)
    logprobs_NS = -torch.rand(8, 6, generator=generator) - 0.1
    lengths_N = torch.tensor([6, 5, 6, 4, 6, 3, 6, 6])
    rollouts = Rollouts(
        torch.full((8, 6), 20), torch.ones(8).long(), lengths_N, logprobs_NS, logprobs_NS, torch.ones(8).bool(), 0
    )
    verdicts = [[Verdict(answer is not None, answer, "") for answer in ANSWERS]]
    reference_NS = logprobs_NS - 0.3 * torch.rand(8, 6, generator=generator)
    earned = RewardShaping(settings, CharTokenizer())(verdicts, rollouts, reference_NS)
    mask_NS = rollouts.response_mask_NS()
    batch = TrainBatch(
        rollouts.tokens_NS,
        lengths_N,
        mask_NS,
        behaviour_logprobs_NS=logprobs_NS - 0.4 * torch.rand(8, 6, generator=generator),
        advantages_N=earned.advantages_PG.flatten(),
        reference_logprobs_NS=reference_NS,
        selected_NS=mask_NS & (torch.rand(8, 6, generator=generator) < 0.5),
    )
    learner_NS = logprobs_NS.clone().requires_grad_()
    entropy_NS = learner_NS.square()
    loss, _ = OnRollouts(policy_objective(settings))(learner_NS, entropy_NS, batch)
    (gradient_NS,) = torch.autograd.grad(loss, learner_NS)
    assert torch.isfinite(gradient_NS).all() and not gradient_NS[~mask_NS].any()
    return gradient_NS


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_is_valid_and_has_a_gradient(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = compose("addends_tiny_grpo", [f"algorithm={name}", "init_from=null", "algorithm.group_size=8"])
    validate(config)
    assert isinstance(config.algorithm, GRPOConfig)
    assert gradient(config.algorithm).any()


def test_each_baseline_differs_from_grpo():
    """A setting that reached nothing would leave GRPO's gradient."""
    other = [name for name in NAMES if name != "grpo" and not name.startswith("vp2o")]
    plain = gradient(GRPOConfig())
    same = [
        name
        for name in other
        if torch.equal(gradient(compose("addends_tiny_grpo", [f"algorithm={name}"]).algorithm), plain)  # type: ignore[arg-type]
    ]
    assert not same

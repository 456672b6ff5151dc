"""What the ranks of test_nucleus.py do: sample from a nucleus, train on it with the same weights, and say what was measured."""

from __future__ import annotations

from typing import Any

import torch

from megatron_vp2o.config.schema import BudgetConfig
from megatron_vp2o.core.objective import GRPOObjective
from megatron_vp2o.megatron.actor.generation import MegatronEngine
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.platform import world
from megatron_vp2o.rl.batching import policy_batch
from megatron_vp2o.rl.control import BudgetMeter
from megatron_vp2o.rl.objectives import OnRollouts
from megatron_vp2o.rl.types import SamplingParams
from tests.megatron.policy_job import PROMPTS, VOCAB, small_config


def run(layout: dict[str, Any]) -> list[dict[str, float]]:
    torch.set_num_threads(1)
    config = small_config(**layout)
    groups = world.start(config.parallel, config.seed)
    policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=1)
    engine = MegatronEngine(config, policy, eos_ids=[1], pad_id=0)
    engine.refresh(0)
    meter = BudgetMeter(BudgetConfig(), groups)
    objective = GRPOObjective(kl_coef=0.0, entropy_coef=0.0, clip_epsilon_low=0.2, clip_epsilon_high=0.2)
    results = []
    for top_p in (0.5, 0.9, 1.0):
        rollouts = engine.generate(PROMPTS, list(range(len(PROMPTS))), SamplingParams(0.7, top_p, 10, seed=3), 4)
        rows = len(rollouts.total_len_N)
        batch = policy_batch(rollouts, torch.linspace(-1, 1, rows), torch.ones(rows, dtype=torch.bool), 0.7)
        batch.engine_logprobs_NS = rollouts.model_logprobs_NS
        metrics = policy.forward_backward(batch, meter.watch(OnRollouts(objective)), micro_batch_size=6)
        results.append(
            {
                "top_p": top_p,
                "cut": (rollouts.logprobs_NS - rollouts.model_logprobs_NS).abs().max().item(),
                "drift": meter.spent().read().drift,
                "mismatch": metrics["logprob_mismatch"],
                **{key: metrics[key] for key in ("ratio", "ratio_max", "clip_fraction")},
            }
        )
    world.stop_model_parallel()
    world.stop()
    return results

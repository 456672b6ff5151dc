"""What the ranks of test_policy.py do: generate and train the same global batch under a layout, and say what came out."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Any

import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.config.schema import (  # noqa: E402
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RouterReplay,
    TrainConfig,
)
from megatron_vp2o.core.objective import GRPOObjective  # noqa: E402
from megatron_vp2o.megatron.actor.generation import MegatronEngine  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.parallel.groups import gather_rows  # noqa: E402
from megatron_vp2o.rl.batching import policy_batch  # noqa: E402
from megatron_vp2o.rl.objectives import OnRollouts  # noqa: E402
from megatron_vp2o.rl.types import Rollouts, SamplingParams  # noqa: E402

VOCAB, GROUP, STEPS = 24, 4, 4
ENDS = (1, 7, 13)  # any of these ends a response
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [5, 6, 7, 8], [20, 21], [9, 9, 9, 9, 9], [2, 3], [4, 4, 4]]
SAMPLING = SamplingParams(1.0, 1.0, 10, seed=5)


def small_config(**parallel: Any) -> TrainConfig:
    """Two layers, eight experts; wide initial weights, so that distributions are far from uniform."""
    return TrainConfig(
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=8,
            num_moe_experts=8,
            moe_router_topk=2,
            moe_ffn_hidden_size=16,
            moe_aux_loss_coeff=0.0,  # it is a product of micro-batch means, which depend on how data is dealt to ranks
            init_method_std=0.2,
        ),
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.5),
        parallel=ParallelConfig(**parallel),
    )


def run(layouts: list[dict[str, Any]], model: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """One result a layout; the world's size is the same for all. `model`: further settings of it, in words."""
    torch.set_num_threads(1)
    results = []
    for layout in layouts:
        config = small_config(**layout)
        for name, value in (model or {}).items():
            old = getattr(config.model, name)
            setattr(config.model, name, type(old)(value) if isinstance(old, Enum) else value)
        try:
            results.append(train(config))
        finally:
            world.stop_model_parallel()
    world.stop()
    return results


def train(config: TrainConfig) -> dict[str, Any]:
    groups = world.start(config.parallel, config.seed)
    policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=STEPS)
    engine = MegatronEngine(config, policy, eos_ids=ENDS, pad_id=0)
    if config.rollout.router_replay is RouterReplay.R3:
        engine.record_routes()  # scoring and training then replay what decoding chose
    share = len(PROMPTS) // groups.dp_size
    mine = range(groups.dp_rank * share, (groups.dp_rank + 1) * share)
    objective = OnRollouts(GRPOObjective(clip_epsilon_low=0.2, clip_epsilon_high=0.2, kl_coef=0.0, entropy_coef=0.01))
    result: dict[str, Any] = {"loss": [], "entropy": [], "grad_norm": [], "mismatch": [], "tokens": [], "responses": []}
    for step in range(STEPS):
        engine.refresh(step)
        sampling = replace(SAMPLING, seed=SAMPLING.seed + step)
        rollouts = engine.generate([PROMPTS[i] for i in mine], list(mine), sampling, GROUP)
        # any function of the response: here how many of its tokens are even
        rewards_N = ((rollouts.tokens_NS % 2 == 0) & rollouts.response_mask_NS()).sum(dim=1).float()
        result["responses"].append([rollouts.response(n) for n in range(len(rewards_N))])
        rewards_PG = rewards_N.view(-1, GROUP)
        advantages_N = (rewards_PG - rewards_PG.mean(dim=1, keepdim=True)).flatten()
        row_N = torch.arange(len(rewards_N)) + mine[0] * GROUP
        keep_N = row_N % 5 != 0 if step == 1 else row_N >= 0  # ranks may keep different numbers of rows
        batch = policy_batch(rollouts, advantages_N, keep_N, 1.0)
        metrics = policy.forward_backward(batch, objective, micro_batch_size=6)
        stats = policy.optimizer_step(1)
        scored_NS = engine.log_probs(rollouts, 1.0)
        result["loss"].append(metrics["loss"])
        result["entropy"].append(metrics["entropy"])
        result["grad_norm"].append(stats.grad_norm)
        result["mismatch"].append((scored_NS - rollouts.logprobs_NS).abs().max().item())
        result["tokens"].append(gather_rows(rollouts.tokens_NS, groups.dp).tolist())
    final = fixed_batch()
    result["final"] = policy.log_probs(policy_batch(final, torch.zeros(4), torch.ones(4).bool(), 1.0), 3).tolist()
    return result


def fixed_batch() -> Rollouts:
    """Sequences that every rank scores alike."""
    tokens_NS = torch.randint(2, VOCAB, (4, 9), generator=torch.Generator().manual_seed(0))
    length_N, zeros_NS = torch.tensor([9, 7, 5, 2]), torch.zeros(4, 9)
    return Rollouts(tokens_NS, torch.ones(4).long(), length_N, zeros_NS, zeros_NS, torch.ones(4).bool(), 0)

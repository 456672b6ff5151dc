"""What the ranks of test_packed.py do: the same rows padded and packed, forward, backward and scoring.

Shape legend: N rows of this data-parallel rank, S padded length.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.config.schema import (  # noqa: E402
    GRPOConfig,
    Implementation,
    KLEstimator,
    LoadBalancing,
    ModelConfig,
    ParallelConfig,
    SpecializationConfig,
    TrainConfig,
)
from megatron_vp2o.megatron.learner.micro_batches import PackedBatches, TokenBudget  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.parallel.groups import Groups, gather_objects  # noqa: E402
from megatron_vp2o.rl.objectives import OnRollouts, policy_objective  # noqa: E402
from megatron_vp2o.rl.types import TrainBatch  # noqa: E402

VOCAB, LONGEST = 24, 20


def small_config(chunk_mib: float, recompute: bool, **parallel: Any) -> TrainConfig:
    """Two layers, eight experts, and every loss that is a sum over tokens or rows."""
    return TrainConfig(
        algorithm=GRPOConfig(
            entropy_coef=0.01,
            kl_coef=0.05,
            kl_estimator=KLEstimator.k3,
            specialization=SpecializationConfig(orthogonality_coef=0.05),
        ),
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=8,
            num_moe_experts=8,
            moe_router_topk=3,
            moe_ffn_hidden_size=16,
            moe_router_load_balancing_type=LoadBalancing.seq_aux_loss,
            moe_aux_loss_coeff=0.05,
            moe_z_loss_coeff=0.01,
            init_method_std=0.2,
            logits_chunk_mib=chunk_mib,
            recompute=recompute,
        ),
        parallel=ParallelConfig(**parallel),
    )


def rows_of(chance: random.Random, rank: int, ranks: int) -> TrainBatch:
    """Rows of any lengths from 1 on; one rank may have none. Every rank draws for all, and keeps its own."""
    counts = [chance.randrange(8) for _ in range(ranks)]
    counts[chance.randrange(ranks)] = chance.choice([0, 5]) if ranks > 1 else 6
    counts[0] += not any(counts)
    lengths = [[chance.choice([1, 2, 3, 4, 5, 7, 11, LONGEST]) for _ in range(count)] for count in counts]
    generator = torch.Generator().manual_seed(chance.randrange(10**6) + rank)
    length_N = torch.tensor(lengths[rank], dtype=torch.int64)
    rows, width = len(length_N), max([LONGEST // 2, *lengths[rank]])  # ranks have different widths
    position_S = torch.arange(width)
    prompt_N = (torch.rand(rows, generator=generator) * length_N).long().clamp(min=1)
    mask_NS = (position_S >= prompt_N[:, None]) & (position_S < length_N[:, None])

    def drawn() -> torch.Tensor:
        return torch.randn(rows, width, generator=generator)

    return TrainBatch(
        tokens_NS=torch.randint(2, VOCAB, (rows, width), generator=generator),
        length_N=length_N,
        loss_mask_NS=mask_NS,
        temperature=0.9,
        behaviour_logprobs_NS=-3 + 0.3 * drawn(),
        advantages_N=torch.randn(rows, generator=generator),
        reference_logprobs_NS=-3 + 0.3 * drawn(),
        engine_logprobs_NS=-3 + 0.3 * drawn(),
        weight_NS=drawn().exp(),
    )


def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result a case; the world's size is the same for all."""
    return run_each(compare, cases)


def run_each(compare: Callable[..., dict[str, Any]], cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `compare` finds in each case, each with model-parallel groups of its own."""
    torch.set_num_threads(1)
    results = []
    for case in cases:
        try:
            results.append(compare(**case))
        finally:
            world.stop_model_parallel()
    world.stop()
    return results


def compare(
    layout: dict[str, Any],
    seed: int,
    budgets: list[int],
    chunk_mib: float,
    recompute: bool,
    draws: int = 2,
    implementation: str = "auto",
) -> dict[str, Any]:
    """Largest differences between padded and packed passes over several batches and budgets."""
    config = small_config(chunk_mib, recompute, **layout)
    config.model.implementation = Implementation(implementation)
    groups = world.start(config.parallel, config.seed)
    policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=4)
    objective = OnRollouts(policy_objective(config.algorithm))  # type: ignore[arg-type]  # it is a GRPOConfig
    chance = random.Random(seed)
    found: dict[str, Any] = {"gradient": 0.0, "log_prob": 0.0, "metric": {}, "parts": [], "moved": 0, "tokens": 0.0}
    for _ in range(draws):
        batch = rows_of(chance, groups.dp_rank, groups.dp_size)
        policy.token_budget = None
        expected = _pass(policy, batch, objective)
        for budget in budgets:
            policy.token_budget = TokenBudget(budget, 0.05)
            metrics, gradients, scored_NS = _pass(policy, batch, objective)
            found["gradient"] = max(found["gradient"], _apart(gradients, expected[1]))
            found["log_prob"] = max([found["log_prob"], *(scored_NS - expected[2]).abs().flatten().tolist()])
            assert metrics.keys() == expected[0].keys()
            for name, value in metrics.items():
                apart = abs(value - expected[0][name]) / max(abs(expected[0][name]), 1e-3)
                found["metric"][name] = max(found["metric"].get(name, 0.0), apart)
            found["tokens"] += metrics["tokens"]
            packed = PackedBatches(batch, policy.token_budget, groups, policy.length_multiple)
            found["parts"].append([len(packed.parts), sum(bool(len(part.index_N)) for part in packed.parts)])
            found["moved"] += _moved(batch, packed, groups)
    return found


def _pass(
    policy: MegatronPolicy, batch: TrainBatch, objective: Any, size: int = 3
) -> tuple[dict[str, float], list[Any], Any]:
    """Metrics, reduced gradients and log-probabilities."""
    metrics = policy.forward_backward(batch, objective, micro_batch_size=size)
    policy.optimizer.prepare_grads()
    gradients = [
        parameter.grad.detach().clone()
        for optimizer in policy.optimizers()
        for parameter in optimizer.get_parameters()  # with the distributed optimizer, this rank's share
        if parameter.grad is not None
    ]
    return metrics, gradients, policy.log_probs(batch, 3)


def _apart(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Norm of the difference of all gradients, as a share of their norm."""
    assert len(ours) == len(theirs) > 0
    difference = torch.stack([(a - b).norm() for a, b in zip(ours, theirs, strict=True)]).norm()
    return float(difference / torch.stack([b.norm() for b in theirs]).norm().clamp(min=1e-6))


def _moved(batch: TrainBatch, packed: PackedBatches, groups: Groups) -> int:
    """Rows that are not where they were; none may be lost or changed on the way."""

    def contents(part: TrainBatch) -> list[tuple[float, ...]]:
        width, assembled = part.tokens_NS.shape[1], []
        for n, length in enumerate(part.length_N.tolist()):
            tokens, weights = part.tokens_NS[n, :length].tolist(), part.weight_NS
            assert weights is not None and part.advantages_N is not None and length <= width
            assembled.append((*tokens, *weights[n, :length].tolist(), float(part.advantages_N[n])))
        return assembled

    before, after = contents(batch), contents(packed.batch)
    everywhere = [gather_objects(rows, groups.dp) for rows in (before, after)]
    assert sorted(itertools.chain(*everywhere[0])) == sorted(itertools.chain(*everywhere[1]))
    assert packed.back(packed.batch.tokens_NS)[:, : batch.tokens_NS.shape[1]].shape == batch.tokens_NS.shape
    return sum(row not in before for row in after)

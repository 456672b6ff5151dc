"""What the ranks of test_uneven_ranks.py do: one VP2O step after another, with prompts and rows dealt to ranks as told.

Everything that a step of the trainer calls is called: generation, anchor, forward and backward pass with specialisation losses,
Stein transform, optimizer step under the trust region, budget, scoring and evaluation. A rank may have nothing of any of it.

Shape legend: N rows of this data-parallel rank, R rows of all ranks, S padded length.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.config.schema import (  # noqa: E402
    BudgetConfig,
    ControlMode,
    CountdownTaskConfig,
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    PrefixSharing,
    SteinConfig,
    TrainConfig,
    TrustRegionConfig,
    VP2OConfig,
)
from megatron_vp2o.megatron.actor.generation import MegatronEngine  # noqa: E402
from megatron_vp2o.megatron.control.trust_region import TrustRegion  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes  # noqa: E402
from megatron_vp2o.megatron.stein.transform import SteinTransform  # noqa: E402
from megatron_vp2o.rl.batching import policy_batch  # noqa: E402
from megatron_vp2o.rl.control import BudgetMeter  # noqa: E402
from megatron_vp2o.rl.drift import SampledDrift  # noqa: E402
from megatron_vp2o.rl.evaluate import evaluate  # noqa: E402
from megatron_vp2o.rl.objectives import OnRollouts, policy_objective  # noqa: E402
from megatron_vp2o.rl.types import Rollouts, SamplingParams, Split, TrainBatch  # noqa: E402
from megatron_vp2o.tasks import make_task  # noqa: E402
from tests.megatron.policy_job import small_config  # noqa: E402
from tests.megatron.replay_watch import ReplayWatch  # noqa: E402
from tests.megatron.stein_job import specialization_config, whole_experts  # noqa: E402

GROUP, WIDTH = 4, 8
SYMBOLS = 15  # ids that every task's tokenizer has


@dataclass
class Draw:
    """One case.

    Attributes:
        layout: of the world; {} for the reference.
        owner: of each prompt, its data-parallel rank (modulo their number).
        kept: which rows carry a gradient, by number among the rows of all prompts.
        minibatches: of each row, the optimizer step that takes it.
        steps: optimizer steps.
        delta: of the trust region.
        max_policy_drift: of the trust region, too.
        drift_share: share of the rows that the policy's drift is measured on.
        stein: settings of the transform.
        problems: of the evaluation.
        replay: rollout.router_replay.
        recompute: model.recompute.
        micro_batch_tokens: rows are packed into micro-batches of so many; None: padded.
        prefix_sharing: and share their prompts; off without micro_batch_tokens.
    """

    layout: dict[str, Any]
    owner: list[int]
    kept: list[int]
    minibatches: list[int]
    steps: int
    micro_batch_size: int
    delta: float
    max_policy_drift: float | None
    drift_share: float
    stein: dict[str, Any] = field(default_factory=dict)
    specialization: dict[str, Any] = field(default_factory=dict)
    problems: int = 3
    seed: int = 1
    replay: str = "off"
    recompute: bool = False
    micro_batch_tokens: int | None = None
    prefix_sharing: str = "off"


def run(draws: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result a draw; the world's size is the same for all."""
    torch.set_num_threads(1)
    results = []
    for settings in draws:
        results.append(_steps(Draw(**settings)))
        world.stop_model_parallel()
    world.stop()
    return results


def config_of(draw: Draw) -> TrainConfig:
    return TrainConfig(
        algorithm=VP2OConfig(
            group_size=GROUP,
            micro_batch_size=draw.micro_batch_size,
            micro_batch_tokens=draw.micro_batch_tokens,
            prefix_sharing=PrefixSharing(draw.prefix_sharing),
            entropy_coef=0.01,
            stein=SteinConfig(**{"enabled": True, "neighbours": 2, "eta": 0.05, "chunk_mib": 0.02, **draw.stein}),
            specialization=specialization_config(draw.specialization),
            trust_region=TrustRegionConfig(
                mode=ControlMode.enforce,
                delta=draw.delta,
                delta_nats=0.05 if draw.seed % 2 else None,
                max_policy_drift=draw.max_policy_drift,
                drift_share=draw.drift_share,
                contexts_per_rank=10**5,
            ),
            budget=BudgetConfig(mode=ControlMode.monitor),
        ),
        model=replace(small_config().model, moe_router_topk=3, recompute=draw.recompute),
        # A large epsilon: without it Adam makes a step of full size out of a gradient that is all rounding.
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.5, adam_eps=1e-2),
        task=CountdownTaskConfig(train_size=20, validation_size=8, test_size=8),
        evaluation=EvaluationConfig(problems=draw.problems, samples=2, pass_at=[1, 2]),
        parallel=ParallelConfig(**draw.layout),
        seed=draw.seed,
    )


def _steps(draw: Draw) -> dict[str, Any]:
    config = config_of(draw)
    algorithm = config.algorithm
    assert isinstance(algorithm, VP2OConfig)
    task = make_task(config.task, progress=False)
    groups = world.start(config.parallel, config.seed)
    policy = MegatronPolicy(config, groups, vocab_size=task.tokenizer.vocab_size, optimizer_steps=10)
    transform = SteinTransform(ExpertPrototypes(policy.ddp, algorithm.stein, groups), optimizer=policy.optimizer)
    drift = SampledDrift(policy, groups, share=draw.drift_share, micro_batch_size=draw.micro_batch_size)
    region = TrustRegion(policy, transform.prototypes, algorithm.trust_region, transform, drift=drift)
    engine = MegatronEngine(config, policy, eos_ids=(1,), pad_id=0)
    engine.log_gates(10**5)
    if draw.replay == "R3":
        engine.record_routes()
    meter = BudgetMeter(algorithm.budget, groups)
    objective = meter.watch(OnRollouts(policy_objective(algorithm)))
    engine.refresh(0)
    region.set_anchor()
    mine = [p for p, owner in enumerate(draw.owner) if owner % groups.dp_size == groups.dp_rank]
    rollouts = engine.generate(
        [_prompt(p) for p in mine], mine, SamplingParams(1.0, 1.0, WIDTH, seed=draw.seed), algorithm.group_size
    )
    if draw.replay == "R2":
        rollouts.routes_NSLK = engine.log_probs_and_routes(rollouts, 1.0)[1]
    watch = None if draw.replay == "off" else ReplayWatch(policy)
    row_N = torch.tensor([p * GROUP + g for p in mine for g in range(GROUP)], dtype=torch.int64)
    region.observe_rollouts(rollouts)
    batch = _batch(rollouts, row_N)
    result: dict[str, Any] = {"rows": row_N.tolist(), "updates": [], "stage": groups.pp.rank()}
    for step in range(draw.steps):
        wanted = [n for n, row in enumerate(row_N.tolist()) if row in draw.kept and draw.minibatches[row] == step]
        part = batch.rows(torch.tensor(wanted, dtype=torch.int64))
        result["updates"].append(_update(part, draw, policy, transform, region, objective))
        if step == 0:
            result["gradients"] = whole_experts(transform, groups, transform.gradients.of, owned=True)
    if watch is not None:
        watch.stop()
        result["replayed"], result["gone astray"] = watch.compared, watch.wrong
    budget = meter.spent().read()
    result |= {"drift": budget.drift, "ess": budget.ess}
    result["responses"] = {str(row): rollouts.response(n) for n, row in enumerate(row_N.tolist())}
    scored = engine.log_probs(rollouts, 1.0) - rollouts.model_logprobs_NS
    result["mismatch"] = scored.abs().amax().item() if scored.numel() else 0.0
    policy.gather_parameters()
    result["parameters"] = whole_experts(transform, groups, lambda parameter: parameter.detach(), owned=False)
    result["routers"] = {str(layer.layer_number): layer.router.weight.tolist() for layer in transform.prototypes.layers}
    result["final"] = policy.log_probs(_fixed_batch(), 3).tolist()
    result["evaluation"], _ = evaluate(
        engine, task, Split.validation, config.evaluation, groups, max_new_tokens=5, seed=3, prefix="eval"
    )
    return result


def _update(
    part: TrainBatch, draw: Draw, policy: MegatronPolicy, transform: SteinTransform, region: TrustRegion, objective: Any
) -> dict[str, Any]:
    region.begin(part)
    measured = policy.accumulate_gradients(part, objective, draw.micro_batch_size)
    metrics = transform.apply()
    stats = region.step(measured)
    metrics = metrics | stats.metrics
    shared = metrics.pop("packing/tokens_shared", 0.0)
    assert transform.prototypes.state is not None
    coactivation_LEE = transform.coactivation_LEE  # None until a step had tokens
    return {
        "metrics": metrics,
        "shared": shared,
        "grad_norm": stats.grad_norm,
        "tokens": stats.tokens,
        "outcome": [stats.skipped, stats.rejected],
        "by_layer": getattr(region, "by_layer", []),
        "rows": len(part.length_N),
        "prototypes": transform.prototypes.values_LED.tolist(),
        "coactivation": None if coactivation_LEE is None else coactivation_LEE.tolist(),
        "layers": [weights.layer for weights in transform.prototypes.weights],
    }


def _prompt(p: int) -> list[int]:
    return [2 + (3 * p + i) % (SYMBOLS - 2) for i in range(1 + p % 4)]


def _batch(rollouts: Rollouts, row_N: torch.Tensor) -> TrainBatch:
    """All rows of this rank; advantages are any function of a row's number."""
    advantages_N = torch.sin(row_N.float() * 2.3)
    batch = policy_batch(rollouts, advantages_N, torch.ones(len(row_N)).bool(), 1.0)
    batch.row_N = row_N
    return batch


def _fixed_batch() -> TrainBatch:
    """Sequences that every rank scores alike."""
    tokens_NS = torch.randint(2, SYMBOLS, (4, 9), generator=torch.Generator().manual_seed(0))
    length_N = torch.tensor([9, 7, 5, 2])
    return TrainBatch(tokens_NS, length_N, torch.ones(4, 9).bool(), temperature=1.0)

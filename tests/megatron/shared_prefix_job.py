"""What the ranks of test_shared_prefix.py do: the same rows padded and with shared prompts, forward, backward and scoring.

Shape legend: N rows of this data-parallel rank, S padded length, E experts.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from tests.megatron.packed_job import LONGEST, VOCAB, _apart, _moved, _pass, run_each, small_config  # isort: skip  # sets up the CPU
from megatron_vp2o.config.schema import LoadBalancing, PrefixSharing, RouterScore, TrainConfig
from megatron_vp2o.core.routes import packed_dtype, sentinel
from megatron_vp2o.megatron.control.contexts import ContextSampler
from megatron_vp2o.megatron.learner.micro_batches import PackedBatches, TokenBudget
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.model.moe_layer import OVERLAP_TOKENS
from megatron_vp2o.megatron.model.routing_statistics import SUMS
from megatron_vp2o.megatron.platform import world
from megatron_vp2o.parallel.groups import Groups, gather_objects
from megatron_vp2o.rl.objectives import OnRollouts, policy_objective
from megatron_vp2o.rl.types import TrainBatch


def groups_of(chance: random.Random, rank: int, ranks: int, layers: int, routed: bool, topk: int) -> TrainBatch:
    """Rows of groups of any sizes, dealt to ranks in any way; one rank may have none. Every rank draws for all.

    Args:
        layers: MoE layers of the whole model.
        routed: rows have routes, which differ between rows of some groups.
    """
    rows: list[tuple[int, list[int], int, list[Any]]] = []  # rank, tokens, length of the prompt, routes
    alone = chance.randrange(ranks + 1)  # the rank that has none, if any
    takers = [r for r in range(ranks) if r != alone or ranks == 1]
    for _ in range(chance.randint(1, 5)):
        prompt = [chance.randrange(2, VOCAB) for _ in range(chance.choice([1, 2, 3, 7, 8, LONGEST - 1]))]
        home = chance.choice(takers)
        routes = _routes(chance, len(prompt), layers, topk)
        for _ in range(chance.choice([1, 2, 3, 5, 8])):
            # a response of no token is one that is masked; and some rows are longer than the model's others
            response = [chance.randrange(2, VOCAB) for _ in range(chance.choice([0, 1, 2, 3, 4, 9, LONGEST]))]
            response = response[: LONGEST - len(prompt) + 5]
            own = _routes(chance, len(prompt), layers, topk) if chance.random() < 0.2 else routes
            own = own + _routes(chance, len(response), layers, topk)
            place = home if chance.random() < 0.7 else chance.choice(takers)
            rows.append((place, prompt + response, len(prompt), own))
    chance.shuffle(rows)
    mine = [row[1:] for row in rows if row[0] == rank]
    generator = torch.Generator().manual_seed(chance.randrange(10**6) + rank)
    length_N = torch.tensor([len(tokens) for tokens, _, _ in mine], dtype=torch.int64)
    count, width = len(mine), max([3, *length_N.tolist()]) + rank  # ranks have different widths
    tokens_NS = torch.zeros(count, width, dtype=torch.int64)
    for row, (tokens, _, _) in enumerate(mine):
        tokens_NS[row, : len(tokens)] = torch.tensor(tokens)
    prompt_N = torch.tensor([prompt for _, prompt, _ in mine], dtype=torch.int64)
    position_S = torch.arange(width)
    mask_NS = (position_S >= prompt_N[:, None]) & (position_S < length_N[:, None])
    for row in range(count):  # some tokens of some responses count nowhere
        if chance.random() < 0.2:
            mask_NS[row] &= torch.rand(width, generator=generator) < 0.5

    def drawn() -> torch.Tensor:
        return torch.randn(count, width, generator=generator)

    dtype = packed_dtype(8)
    routes_NSLK = torch.full((count, width, layers, topk), sentinel(dtype), dtype=dtype)
    for row, (tokens, _, own) in enumerate(mine):
        routes_NSLK[row, : len(tokens) - 1] = torch.tensor(own[:-1], dtype=dtype).view(len(tokens) - 1, layers, topk)
    return TrainBatch(
        tokens_NS=tokens_NS,
        length_N=length_N,
        loss_mask_NS=mask_NS,
        temperature=0.9,
        behaviour_logprobs_NS=-3 + 0.3 * drawn(),
        advantages_N=torch.randn(count, generator=generator),
        reference_logprobs_NS=-3 + 0.3 * drawn(),
        engine_logprobs_NS=-3 + 0.3 * drawn(),
        weight_NS=drawn().exp(),
        routes_NSLK=routes_NSLK if routed else None,
    )


def _routes(chance: random.Random, tokens: int, layers: int, topk: int) -> list[Any]:
    return [[chance.sample(range(8), topk) for _ in range(layers)] for _ in range(tokens)]


def model_config(
    layout: dict[str, Any], chunk_mib: float, recompute: bool, balancing: str, expert_bias: bool
) -> TrainConfig:
    config = small_config(chunk_mib, recompute, **layout)
    model = replace(config.model, moe_router_load_balancing_type=LoadBalancing(balancing))
    if expert_bias:
        model = replace(model, moe_router_enable_expert_bias=True, moe_router_score_function=RouterScore.sigmoid)
    return replace(config, model=model)


def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result a case; the world's size is the same for all."""
    return run_each(compare, cases)


def compare(
    layout: dict[str, Any],
    seed: int,
    budgets: list[int],
    chunk_mib: float,
    recompute: bool,
    balancing: str,
    expert_bias: bool,
    routed: bool,
    micro_batch_size: int,
    draws: int = 1,
) -> dict[str, Any]:
    """Largest differences between padded passes and those with shared prompts, over several batches and budgets."""
    config = model_config(layout, chunk_mib, recompute, balancing, expert_bias)
    groups = world.start(config.parallel, config.seed)
    policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=4)
    for layer in policy._layers:
        layer.observe()
    policy.watcher = sampler = ContextSampler(policy._layers, 10**6, policy.share)
    objective = OnRollouts(policy_objective(config.algorithm))  # type: ignore[arg-type]  # it is a GRPOConfig
    chance = random.Random(seed)
    found: dict[str, Any] = {
        "gradient": 0.0,
        "log_prob": 0.0,
        "statistics": 0.0,
        "contexts": 0.0,
        "bias": 0,
        "metric": {},
        "parts": [],
        "moved": 0,
        "shared": 0.0,
        "split": 0,
    }
    layers, topk = config.model.num_layers, config.model.moe_router_topk
    for _ in range(draws):
        batch = groups_of(chance, groups.dp_rank, groups.dp_size, layers, routed, topk)
        if batch.routes_NSLK is not None:  # a stage has its own layers'
            numbers = [layer.layer_number - 1 for layer in policy._layers]
            batch.routes_NSLK = batch.routes_NSLK[:, :, numbers]
        sampled = sum(gather_objects(int(batch.length_N.sum()), groups.dp)) > OVERLAP_TOKENS
        policy.token_budget = None
        before = policy.save_state()  # reducing gradients moves expert biases
        expected, seen = _pass(policy, batch, objective, micro_batch_size), _observed(policy, sampler, groups, sampled)
        bias = [buffer.clone() for name, buffer in policy.model.named_buffers() if "expert_bias" in name]
        for budget in budgets:
            policy.token_budget = TokenBudget(budget, 0.05, PrefixSharing.on)
            policy.restore_state(before)
            metrics, gradients, scored_NS = _pass(policy, batch, objective)
            moved = [buffer for name, buffer in policy.model.named_buffers() if "expert_bias" in name]
            found["bias"] += sum(int((a != b).sum()) for a, b in zip(moved, bias, strict=True))
            counts, contexts = _observed(policy, sampler, groups, sampled)
            found["gradient"] = max(found["gradient"], _apart(gradients, expected[1]))
            found["log_prob"] = max([found["log_prob"], *(scored_NS - expected[2]).abs().flatten().tolist()])
            found["statistics"] = max(found["statistics"], _far(counts, seen[0]))
            found["contexts"] = max(found["contexts"], _far(contexts, seen[1]))
            found["shared"] = max(found["shared"], metrics.pop("packing/tokens_shared"))
            assert metrics.keys() == expected[0].keys()
            for name, value in metrics.items():
                apart = abs(value - expected[0][name]) / max(abs(expected[0][name]), 1e-3)
                found["metric"][name] = max(found["metric"].get(name, 0.0), apart)
            packed = PackedBatches(batch, policy.token_budget, groups, policy.length_multiple)
            for part in packed.parts:  # a budget is exceeded by a row alone, and by no others
                layout_of = part.layout(torch.device("cpu"))
                assert layout_of is not None
                tokens = len(layout_of.source_V)
                assert tokens <= budget or len(part.index_N) == 1, (tokens, budget, part.lengths, part.families)
            found["parts"].append(len(packed.parts))
            found["moved"] += _moved(batch, packed, groups)
            found["split"] += _split(packed, groups)
    return found


def _observed(
    policy: MegatronPolicy, sampler: ContextSampler, groups: Groups, sampled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all ranks: routing statistics of this stage's layers, and sorted sums of the routers' inputs at contexts.

    Args:
        sampled: so many tokens that the overlap of outputs is that of some of them, which depend on the micro-batch.
    """
    counts, sums = [], []
    for layer in policy._layers:
        assert layer.statistics is not None
        totals = layer.statistics.take(groups.device)
        if sampled:
            totals.sums[[SUMS.index("output_overlap"), SUMS.index("output_pairs")]] = 0.0
        counts.append(torch.cat([totals.counts_EE.flatten(), totals.sums]))
        # a number for each context; a rank has its own, and under sequence parallelism its share of the positions
        sums.append(layer.contexts().double().abs().sum(1))
    sampler.drop()
    together = gather_objects((torch.stack(counts), torch.stack(sums)), groups.world)
    stages = gather_objects(groups.pp.rank(), groups.world)
    mine = [pair for pair, stage in zip(together, stages, strict=True) if stage == groups.pp.rank()]
    return torch.stack([pair[0] for pair in mine]).sum(0), torch.cat([pair[1] for pair in mine], dim=1).sort(1).values


def _far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to what there is; infinite where there is another number of them."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1.0)).max()) if ours.numel() else 0.0


def _split(packed: PackedBatches, groups: Groups) -> int:
    """Prompts of several rows that are in more than one micro-batch, of any rank."""
    prompts: list[tuple[int, ...]] = []
    for part in packed.parts:
        row = 0
        for rows, prefix in part.families:
            if rows > 1:
                prompts.append(tuple(part.batch.tokens_NS[row, :prefix].tolist()))
            row += rows
    everywhere = [prompt for some in gather_objects(prompts, groups.dp) for prompt in some]
    return len(everywhere) - len(set(everywhere))

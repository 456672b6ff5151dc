"""What the ranks of test_router.py do: gradients of the router losses alone, beside a formula of the test's own.

The reference knows nothing of micro-batches, loss masks, ranks or Megatron's scales: one evaluation pass over all rows at once
gives the router's logits as functions of the parameters, the losses are written down from their definitions, and autograd does
the rest.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.config.model import LoadBalancing, RouterScore  # noqa: E402
from megatron_vp2o.config.schema import (  # noqa: E402
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SpecializationConfig,
    SteinConfig,
    SupervisedConfig,
    TrainConfig,
)
from megatron_vp2o.megatron.actor.generation import MegatronEngine  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes  # noqa: E402
from megatron_vp2o.megatron.stein.transform import SteinTransform  # noqa: E402
from megatron_vp2o.rl.objectives import next_token  # noqa: E402
from megatron_vp2o.rl.sync import verify_sync  # noqa: E402
from megatron_vp2o.rl.types import SamplingParams, TrainBatch  # noqa: E402
from tests.megatron.router_draws import draw  # noqa: E402

VOCAB, EXPERTS = 24, 4


def config_of(case: dict[str, Any], **parallel: Any) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=8,
            num_moe_experts=EXPERTS,
            moe_router_topk=case["topk"],
            moe_ffn_hidden_size=16,
            moe_router_score_function=RouterScore(case["score"]),
            moe_router_pre_softmax=case["topk"] == 1 and case["score"] == "softmax",
            moe_router_load_balancing_type=LoadBalancing(case["kind"]),
            moe_router_enable_expert_bias=case["bias"] and case["score"] == "sigmoid",
            moe_aux_loss_coeff=case["aux"],
            moe_z_loss_coeff=case["z"],
            init_method_std=0.3,
        ),
        algorithm=SupervisedConfig(
            specialization=SpecializationConfig(orthogonality_coef=case.get("orthogonality", 0.0))
        ),
        optimizer=OptimizerConfig(lr=1e-2),
        parallel=ParallelConfig(**parallel),
    )


def batch_of(case: dict[str, Any]) -> TrainBatch:
    """Rows of very different lengths, of which few tokens or all count in the loss (at least one)."""
    generator = torch.Generator().manual_seed(case["seed"])
    rows, width = case["rows"], 14
    tokens_NS = torch.randint(2, VOCAB, (rows, width), generator=generator)
    length_N = torch.randint(2, width + 1, (rows,), generator=generator)
    inside_NS = torch.arange(width) < length_N[:, None]
    mask_NS = inside_NS & (torch.rand(rows, width, generator=generator) < case["loss_share"])
    mask_NS[:, 0] = False
    mask_NS[0, 1] = True
    return TrainBatch(tokens_NS, length_N, mask_NS)


def no_objective(logprob_NS: Tensor, entropy_NS: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Zero, but a function of the parameters: what remains is the gradient of the router losses."""
    return 0.0 * logprob_NS.sum(), {}


def gradients(policy: MegatronPolicy) -> dict[str, Tensor]:
    return {name: parameter.main_grad.clone() for name, parameter in policy.model.named_parameters()}


def micro_batch_rows(case: dict[str, Any], length_N: Tensor) -> list[list[int]]:
    """The policy's micro-batches: rows from long to short, cut into equal parts."""
    order = sorted(range(len(length_N)), key=lambda row: -int(length_N[row]))
    size = case["micro_batch_size"]
    return [order[i : i + size] for i in range(0, len(order), size)]


def reference(
    policy: MegatronPolicy, case: dict[str, Any], batch: TrainBatch
) -> tuple[dict[str, Tensor], dict[str, float], list[list[float]]]:
    """Gradients of both losses with their coefficients; the losses without, mean over layers; tokens by layer and expert.

    Single process only, before any expert has a bias.
    """
    logits: list[Tensor] = []
    handles = [
        layer.router.register_forward_pre_hook(lambda router, args: logits.append(router.gating(args[0])))
        for layer in policy._layers
    ]
    policy.ddp.eval()
    width = batch.tokens_NS.shape[1]
    padding_NS = torch.arange(width) >= batch.length_N[:, None]
    policy.model(batch.tokens_NS, torch.arange(width).expand_as(batch.tokens_NS), None, padding_mask=padding_NS)
    policy.ddp.train()
    for handle in handles:
        handle.remove()
    balance = z = torch.zeros(())
    counts_LE = []
    for logits_SBE in logits:
        tokens_of = [logits_SBE[: int(batch.length_N[row]), row] for row in range(len(batch.length_N))]
        counts_LE.append(counts(case, tokens_of).tolist())
        layer_balance, layer_z = losses_of(case, tokens_of, micro_batch_rows(case, batch.length_N))
        balance, z = balance + layer_balance, z + layer_z
    total = case["aux"] * balance + case["z"] * z
    names, parameters = zip(*policy.model.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    by_name = {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }
    layers = len(logits)
    losses = {"moe/load_balancing_loss": balance.item() / layers, "moe/z_loss": z.item() / layers}
    return by_name, losses, counts_LE


def losses_of(case: dict[str, Any], rows: list[Tensor], micro_batches: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Both losses of one layer, from the logits [tokens, E] of each row."""
    k = case["topk"]

    def balance(chosen: list[Tensor], counted: list[Tensor]) -> Tensor:
        """E sum_i f_i P_i: P over the tokens `chosen`, f over those `counted`."""
        scores = torch.cat([normalised(case, logits) for logits in chosen])
        f = counts(case, counted) / (k * sum(len(x) for x in counted))
        return EXPERTS * (f * scores.mean(0)).sum()

    everything = sum(len(logits) for logits in rows)
    if case["kind"] == "seq_aux_loss":
        result = torch.stack([balance([logits], [logits]) for logits in rows]).mean()
    else:
        result, seen = torch.zeros(()), []
        for part in micro_batches:
            chosen = [rows[row] for row in part]
            seen += chosen
            counted = seen if case["kind"] == "global_aux_loss" else chosen
            result = result + balance(chosen, counted) * sum(len(logits) for logits in chosen) / everything
    z = torch.cat(rows).logsumexp(-1).square().mean()
    return result, z


def counts(case: dict[str, Any], rows: list[Tensor]) -> Tensor:
    """How many of the tokens each expert serves, [E]."""
    chosen = torch.cat([normalised(case, logits).topk(case["topk"]).indices for logits in rows])
    return torch.nn.functional.one_hot(chosen, EXPERTS).sum((0, 1)).float()


def normalised(case: dict[str, Any], logits: Tensor) -> Tensor:
    if case["score"] == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)


def compare(seeds: list[int]) -> list[dict[str, Any]]:
    """One process: each draw's gradients beside the reference's, largest relative difference by parameter kind."""
    torch.set_num_threads(1)
    results = []
    for seed in seeds:
        case = draw(seed)
        config = config_of(case)
        groups = world.start(config.parallel, config.seed)
        policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=4)
        batch = batch_of(case)
        expected, losses, counts_LE = reference(policy, case, batch)
        metrics = policy.forward_backward(batch, no_objective, case["micro_batch_size"])
        tokens = float(batch.loss_mask_NS.sum())
        rate = policy.model.config.moe_router_bias_update_rate
        biases = []
        for layer, counts_E in zip(policy._layers, torch.tensor(counts_LE), strict=True):
            if layer.router.expert_bias is not None:
                direction_E = (counts_E.mean() - counts_E).sign()
                biases.append([layer.router.expert_bias.tolist(), (rate * direction_E).tolist()])
        worst, largest = 0.0, 0.0
        for name, gradient in gradients(policy).items():
            worst = max(worst, float((gradient - expected[name]).abs().max()))
            largest = max(largest, float(expected[name].abs().max()))
        named = {name: (metrics.get(name), value) for name, value in losses.items()}
        results.append(
            {"case": case, "worst": worst, "largest": largest, "tokens": tokens, "losses": named, "biases": biases}
        )
        world.stop_model_parallel()
    world.stop()
    return results


def layout(cases: list[dict[str, Any]], parallel: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case under each layout: router gradients, losses and expert biases after two steps, and the owner's rows.

    Rows are dealt in unequal parts: the first data-parallel rank gets all but `case["last"]` rows.
    """
    torch.set_num_threads(1)
    results = []
    for case, settings in zip(cases, parallel, strict=True):
        config = config_of(case, **settings)
        groups = world.start(config.parallel, config.seed)
        policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=4)
        transform = SteinTransform(ExpertPrototypes(policy.ddp, SteinConfig(monitor=True, neighbours=2), groups))
        batch = batch_of(case)
        index = torch.arange(case["rows"])
        if groups.dp_size > 1:
            cut = case["rows"] - case["last"]
            index = (index[:cut], index[cut:])[groups.dp_rank]
        mine = batch.rows(index)
        metrics = policy.forward_backward(mine, no_objective, case["micro_batch_size"])
        norm = float(policy.optimizer.get_grad_norm()) if policy.optimizer.prepare_grads() is False else float("nan")
        routers = {
            str(layer.layer_number): layer.router.weight.main_grad.flatten().tolist() for layer in policy._layers
        }
        statistics = transform.apply()
        assert transform.prototypes.state is not None and transform.coactivation_LEE is not None
        stats = policy.optimizer_step(1)
        policy.forward_backward(mine, no_objective, case["micro_batch_size"])
        biases = {
            str(layer.layer_number): layer.router.expert_bias.tolist()
            for layer in policy._layers
            if layer.router.expert_bias is not None
        }
        results.append(
            {
                "losses": {name: value for name, value in metrics.items() if name.startswith("moe/")},
                "norm": norm,
                "routers": routers,
                "biases": biases,
                "skipped": stats.skipped,
                "statistics": statistics,
                "coactivation": {
                    str(layer.layer_number): C_EE.tolist()
                    for layer, C_EE in zip(transform.prototypes.layers, transform.coactivation_LEE, strict=True)
                },
            }
        )
        dist.barrier()
        world.stop_model_parallel()
    world.stop()
    return results


def actors(cases: list[dict[str, Any]], parallel: dict[str, Any]) -> list[dict[str, Any]]:
    """Actors refreshed from a learner whose expert biases have moved: how far the two models' log-probabilities are apart."""
    torch.set_num_threads(1)
    results = []
    for case in cases:
        config = config_of(case, **parallel)
        groups = world.start(config.parallel, config.seed)
        policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=4)
        policy.model.config.moe_router_bias_update_rate = 0.2  # so that biases change who is chosen
        engine = MegatronEngine(config, policy, eos_ids=[1], pad_id=0)
        for _ in range(3):  # an odd number: steps of one size cannot cancel
            policy.forward_backward(batch_of(case), next_token, case["micro_batch_size"])
            policy.optimizer_step(1)
        engine.refresh(2)
        verify_sync(policy, engine, 2, groups)
        rollouts = engine.generate([[5, 6, 7], [8, 9]], [0, 1], SamplingParams(1.0, 1.0, 8, seed=1), 4)
        mask_NS = rollouts.response_mask_NS()
        batch = TrainBatch(rollouts.tokens_NS, rollouts.total_len_N, mask_NS)
        difference_NS = (policy.log_probs(batch, 3) - rollouts.logprobs_NS) * mask_NS
        biases = [layer.router.expert_bias for layer in policy._layers if layer.router.expert_bias is not None]
        moved = max((bias.abs().max().item() for bias in biases), default=0.0)
        results.append({"mismatch": difference_NS.abs().max().item(), "moved": moved})
        world.stop_model_parallel()
    world.stop()
    return results

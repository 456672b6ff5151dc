"""What the ranks of test_stein_layouts.py do: train the same global batch with the Stein transform under a layout.

Gradients and parameters come back as whole experts, whatever rank held which part, so that layouts can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.config.schema import (  # noqa: E402
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SpecializationConfig,
    SteinConfig,
    SupervisedConfig,
    TrainConfig,
)
from megatron_vp2o.core.choices import Orthogonality, OrthogonalityScale, RepulsionScale  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes  # noqa: E402
from megatron_vp2o.megatron.stein.transform import SteinTransform  # noqa: E402
from megatron_vp2o.parallel.groups import Groups  # noqa: E402
from megatron_vp2o.rl.objectives import next_token  # noqa: E402
from megatron_vp2o.rl.types import TrainBatch  # noqa: E402

VOCAB, ROWS, WIDTH = 24, 16, 12


def specialization_config(given: dict[str, Any]) -> SpecializationConfig:
    """Settings with choices by name, as JSON has them."""
    kinds: dict[str, Any] = {"orthogonality": Orthogonality, "orthogonality_scale": OrthogonalityScale}
    return SpecializationConfig(**{key: kinds[key][value] if key in kinds else value for key, value in given.items()})


def small_config(
    *,
    stein: dict[str, Any] | None = None,
    specialization: dict[str, Any] | None = None,
    model: Any = None,
    **parallel: Any,
) -> TrainConfig:
    """Two layers, eight experts of which two or three serve a token."""
    stein = dict(stein or {})
    if "repulsion_scale" in stein:
        stein["repulsion_scale"] = RepulsionScale[stein["repulsion_scale"]]
    shape = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "num_moe_experts": 8,
        "moe_router_topk": 3,
        "moe_ffn_hidden_size": 16,
        "moe_aux_loss_coeff": 0.0,
        "init_method_std": 0.2,
    }
    return TrainConfig(
        algorithm=SupervisedConfig(
            stein=SteinConfig(**{"enabled": True, "neighbours": 2, "eta": 0.05, "chunk_mib": 0.02, **stein}),
            specialization=specialization_config(specialization or {}),
        ),
        model=ModelConfig(**{**shape, **(model or {})}),
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.5),
        parallel=ParallelConfig(**parallel),
    )


def global_batch(step: int, rows: range) -> TrainBatch:
    """Rows of different lengths; what lies beyond a length is padding."""
    generator = torch.Generator().manual_seed(step)
    tokens_NS = torch.randint(2, VOCAB, (ROWS, WIDTH), generator=generator)
    length_N = torch.randint(4, WIDTH + 1, (ROWS,), generator=generator)
    mask_NS = torch.arange(WIDTH) < length_N[:, None]
    mask_NS[:, :2] = False
    index = torch.arange(rows.start, rows.stop)
    return TrainBatch(tokens_NS[index], length_N[index], mask_NS[index], temperature=1.0)


def run(layouts: list[dict[str, Any]], steps: int = 5, transform: bool = True) -> list[dict[str, Any]]:
    """One result a layout; the world's size is the same for all."""
    torch.set_num_threads(1)
    results = []
    for layout in layouts:
        try:
            results.append(train(small_config(**layout), steps, transform))
        finally:
            world.stop_model_parallel()
    world.stop()
    return results


def train(config: TrainConfig, steps: int, with_transform: bool = True) -> dict[str, Any]:
    groups = world.start(config.parallel, config.seed)
    policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=steps)
    transform = (
        SteinTransform(ExpertPrototypes(policy.ddp, config.algorithm.stein, groups), optimizer=policy.optimizer)
        if with_transform
        else None
    )
    share = ROWS // groups.dp_size
    rows = range(groups.dp_rank * share, (groups.dp_rank + 1) * share)
    result: dict[str, Any] = {"loss": [], "grad_norm": [], "metrics": []}
    for step in range(steps):
        metrics = policy.forward_backward(global_batch(step, rows), next_token, micro_batch_size=3)
        if transform is not None:
            result["metrics"].append(transform.apply())
            if step == 0:
                result["gradients"] = whole_experts(transform, groups, transform.gradients.of, owned=True)
                assert transform.prototypes.state is not None and transform.coactivation_LEE is not None
                result["layers"] = [weights.layer for weights in transform.prototypes.weights]
                result["coactivation"] = transform.coactivation_LEE.tolist()
                result["prototypes"] = transform.prototypes.values_LED.tolist()
                result["bytes"] = transform.gradients.exchange.bytes_sent
                result["workspace"] = transform.gradients.exchange.workspace_bytes
                result["own_bytes"] = sum(
                    row.numel * 4
                    for weights in transform.prototypes.weights
                    for rows in weights.parts.values()
                    for row in rows
                )
        stats = policy.optimizer_step(1)
        result["loss"].append(metrics["loss"])
        result["grad_norm"].append(stats.grad_norm)
    policy.gather_parameters()
    if transform is not None:
        result["parameters"] = whole_experts(transform, groups, lambda parameter: parameter.detach(), owned=False)
    if policy.orthogonality is not None:
        result["first"] = policy.orthogonality.first
    scored = policy.log_probs(replace(global_batch(99, range(ROWS))), 5)
    result["final"] = scored.tolist()
    return result


def whole_experts(
    transform: SteinTransform, groups: Groups, values: Callable[[Any], torch.Tensor], *, owned: bool
) -> dict[str, list[float]]:
    """ "layer.expert.part" -> the whole tensor, flat, put together from the ranks of this pipeline stage."""
    shard = transform.gradients._members.shard[transform.gradients._members.rank]
    mine = list(_pieces(transform, groups, values, shard if owned else None))
    everyone: list[Any] = [None] * groups.stage.size()
    dist.all_gather_object(everyone, mine, group=groups.stage)
    shards: dict[str, dict[int, list[float]]] = {}
    for pieces in everyone:
        for name, part, start, size, numbers in pieces:
            row = shards.setdefault(name, {}).setdefault(part, [float("nan")] * size)
            row[start : start + len(numbers)] = numbers
    width = groups.etp.size()
    return {
        name: _join(name, [parts[i] for i in range(width)], transform.prototypes.weights[0].hidden)
        for name, parts in shards.items()
    }


def _pieces(
    transform: SteinTransform, groups: Groups, values: Callable[[Any], torch.Tensor], shard: int | None
) -> Iterator[tuple[str, int, int, int, list[float]]]:
    for weights in transform.prototypes.weights:
        for part, rows in weights.parts.items():
            for e, row in enumerate(rows):
                start, stop = (0, row.numel) if shard is None else transform.gradients._intervals(row)[shard]
                numbers = row.of(values(row.parameter))[start:stop].tolist()
                yield f"{weights.layer}.{weights.first + e}.{part}", groups.etp.rank(), start, row.numel, numbers


def _join(name: str, parts: list[list[float]], hidden: int) -> list[float]:
    tensors = [torch.tensor(part, dtype=torch.float64) for part in parts]
    if "fc2" in name:
        return torch.cat([tensor.view(hidden, -1) for tensor in tensors], dim=1).flatten().tolist()
    halves = [tensor.view(2, -1, hidden) for tensor in tensors]  # gate and up
    return torch.cat(halves, dim=1).flatten().tolist()

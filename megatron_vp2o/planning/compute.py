"""Floating-point operations, counted as torch.utils.flop_counter counts them: 2 m n k a matrix product, attention in full."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vp2o.config.schema import ModelConfig, TrainConfig
from megatron_vp2o.planning.hardware import Assumptions
from megatron_vp2o.planning.workload import Workload

RECOMPUTED_ATTENTION = 2.5
"""A fused attention's backward over its forward: five products against two."""


@dataclass(frozen=True)
class Flops:
    """Operations of one training step, all ranks together."""

    decoding: float
    scoring: float
    training: float
    recomputing: float
    stein: float

    @property
    def total(self) -> float:
        return self.decoding + self.scoring + self.training + self.recomputing + self.stein


def layers_flops(model: ModelConfig) -> float:
    """Products of one token's forward pass through all layers, attention's core apart."""
    width, kv = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    experts = model.moe_router_topk * model.moe_ffn_hidden_size + (model.moe_shared_expert_intermediate_size or 0)
    weights = model.hidden_size * (2 * width + 2 * kv + model.num_moe_experts + 3 * experts)
    return 2.0 * model.num_layers * weights


def output_flops(model: ModelConfig, vocab_size: int) -> float:
    """Products of one token's logits."""
    return 2.0 * model.hidden_size * vocab_size


def attention_flops(model: ModelConfig, queries: float, keys: float) -> float:
    """Scores and weighted sums of all heads and layers, every query with every key."""
    return 4.0 * model.num_layers * model.num_attention_heads * model.kv_channels * queries * keys


def forward_flops(model: ModelConfig, rows: float, tokens: float, vocab_size: int, pairs: float | None = None) -> float:
    """Operations of a forward pass over rows.

    Args:
        tokens: of a row.
        pairs: of a query and a key in a row; None: each token's with each.
    """
    products = rows * tokens * (layers_flops(model) + output_flops(model, vocab_size))
    return products + rows * _attention(model, tokens, pairs)


def training_flops(
    model: ModelConfig, rows: float, tokens: float, vocab_size: int, pairs: float | None = None
) -> float:
    """Operations of forward and backward, without recomputation. Arguments as those of `forward_flops`."""
    products = rows * tokens * (layers_flops(model) + output_flops(model, vocab_size))
    return 3.0 * products + (1.0 + RECOMPUTED_ATTENTION) * rows * _attention(model, tokens, pairs)


def recomputing_flops(model: ModelConfig, rows: float, tokens: float, pairs: float | None = None) -> float:
    """Operations of the second forward pass through the layers. Arguments as those of `forward_flops`."""
    if not model.recompute:
        return 0.0
    return rows * (tokens * layers_flops(model) + _attention(model, tokens, pairs))


def _attention(model: ModelConfig, tokens: float, pairs: float | None) -> float:
    return attention_flops(model, 1.0, tokens**2 if pairs is None else pairs)


def stein_flops(config: TrainConfig) -> float:
    """Operations of the Stein transform in an optimizer step, every expert counted once."""
    model, stein = config.model, config.algorithm.stein
    if not stein.enabled:
        return 0.0
    experts, layers = model.num_moe_experts, model.num_layers
    matrix = model.hidden_size * model.moe_ffn_hidden_size
    mixing = 2.0 * experts**2 * 3 * matrix if stein.attraction else 0.0
    iterations = 4.0 * stein.power_iterations * experts * matrix / stein.prototype_interval
    repulsion = 4.0 * (stein.power_iterations + 1) * experts * matrix if stein.eta else 0.0
    return layers * (mixing + iterations + repulsion)


def step_flops(config: TrainConfig, work: Workload, replicas: int, vocab_size: int) -> Flops:
    """Operations of a training step in which `replicas` data-parallel ranks do `work` each. Their context-parallel ranks generate
    other responses each, and score the same rows each."""
    model, rows, tokens = config.model, work.rows * replicas, work.tokens
    decoded = work.decoded * replicas * config.parallel.context_parallel
    once = rows / max(1, getattr(config.algorithm, "epochs", 1))
    return Flops(
        decoding=decoded * tokens * (layers_flops(model) + output_flops(model, vocab_size))
        + decoded * attention_flops(model, tokens, tokens) / 2,
        scoring=work.scored
        * config.parallel.context_parallel
        * forward_flops(model, once, work.computed, vocab_size, work.pairs),
        training=training_flops(model, rows, work.computed, vocab_size, work.pairs),
        recomputing=recomputing_flops(model, rows, work.computed, work.pairs),
        stein=work.updates * stein_flops(config),
    )


def mfu_flops(flops: Flops) -> float:
    """Operations of the passes whose speed `Assumptions.mfu` speaks of."""
    return flops.training + flops.recomputing + flops.scoring


def seconds_at(flops: float, gpus: int, tflops: float, assumed: Assumptions) -> float:
    """On all devices together."""
    return flops / (gpus * tflops * 1e12 * max(assumed.mfu, 1e-9))

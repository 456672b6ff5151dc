"""Ranges of single settings; `validate` checks them before it looks at combinations."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Allowed values of a number; a bound in `open_ends` ("low", "high") is itself excluded. None is always allowed."""

    low: float = -math.inf
    high: float = math.inf
    open_ends: tuple[str, ...] = ()

    def __contains__(self, value: float | None) -> bool:
        if value is None:
            return True
        above = value > self.low if "low" in self.open_ends else value >= self.low
        below = value < self.high if "high" in self.open_ends else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{'above' if 'low' in self.open_ends else 'at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f"{'below' if 'high' in self.open_ends else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return " and ".join(part for part in (low, high) if part)


_COUNT, _INDEX = Range(low=1), Range(low=0)
_POSITIVE, _NOT_NEGATIVE = Range(low=0, open_ends=("low",)), Range(low=0)
_PROBABILITY, _DECAY = Range(low=0, high=1, open_ends=("low",)), Range(low=0, high=1, open_ends=("high",))

RANGES: dict[str, Range] = {
    **{
        f"model.{name}": _COUNT
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "num_moe_experts",
            "moe_router_topk",
            "moe_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "vocab_size",
            "window_size",
            "yarn_original_max_position_embeddings",
        )
    },
    "model.max_sequence_length": Range(low=2),
    "model.rotary_base": _POSITIVE,
    "model.window_attn_skip_freq": Range(low=2),
    "model.yarn_rotary_scaling_factor": Range(low=1),
    "model.yarn_beta_fast": _POSITIVE,
    "model.yarn_beta_slow": _POSITIVE,
    "model.activation_func_clamp_value": _POSITIVE,
    "model.layernorm_epsilon": _POSITIVE,
    "model.init_method_std": _POSITIVE,
    "model.moe_aux_loss_coeff": _NOT_NEGATIVE,
    "model.moe_z_loss_coeff": _NOT_NEGATIVE,
    **{f"parallel.{name}_parallel": _COUNT for name in ("tensor", "pipeline", "context", "expert", "expert_tensor")},
    "parallel.timeout_minutes": _POSITIVE,
    "optimizer.lr": _POSITIVE,
    "optimizer.min_lr": _NOT_NEGATIVE,
    "optimizer.lr_warmup_steps": _INDEX,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.adam_beta1": _DECAY,
    "optimizer.adam_beta2": _DECAY,
    "optimizer.adam_eps": _POSITIVE,
    "optimizer.clip_grad": _NOT_NEGATIVE,
    "task.train_size": _COUNT,
    "task.validation_size": _COUNT,
    "task.test_size": _COUNT,
    "rollout.sampling.temperature": _NOT_NEGATIVE,
    "rollout.sampling.top_p": _PROBABILITY,
    "rollout.sampling.max_new_tokens": _COUNT,
    "rollout.max_batch_size": _COUNT,
    "rollout.refresh_interval": _COUNT,
    "algorithm.steps": _COUNT,
    "algorithm.micro_batch_size": _COUNT,
    "algorithm.global_batch_size": _COUNT,
    "algorithm.sequence_length": Range(low=2),
    "algorithm.prompts_per_step": _COUNT,
    "algorithm.group_size": _COUNT,
    "algorithm.minibatches": _COUNT,
    "algorithm.epochs": _COUNT,
    "algorithm.clip_epsilon_low": _PROBABILITY,
    "algorithm.clip_epsilon_high": _POSITIVE,
    "algorithm.advantage_epsilon": _POSITIVE,
    "algorithm.kl_coef": _NOT_NEGATIVE,
    "algorithm.entropy_coef": _NOT_NEGATIVE,
    "algorithm.stein.eta": _NOT_NEGATIVE,
    "algorithm.stein.neighbours": _COUNT,
    "algorithm.stein.coactivation_threshold": _PROBABILITY,
    "algorithm.stein.coactivation_ema": _DECAY,
    "algorithm.stein.tau": _POSITIVE,
    "algorithm.stein.power_iterations": _COUNT,
    "algorithm.stein.initial_power_iterations": _COUNT,
    "algorithm.stein.prototype_interval": _COUNT,
    "algorithm.stein.chunk_mib": _POSITIVE,
    "algorithm.trust_region.delta": _POSITIVE,
    "algorithm.trust_region.contexts_per_rank": _COUNT,
    "algorithm.trust_region.max_backtracks": _INDEX,
    "algorithm.trust_region.max_consecutive_rejections": _COUNT,
    "algorithm.budget.max_drift": _POSITIVE,
    "algorithm.budget.min_ess": _PROBABILITY,
    "algorithm.budget.temper": _POSITIVE,
    "algorithm.budget.max_age": _COUNT,
    "algorithm.specialization.orthogonality_coef": _NOT_NEGATIVE,
    "algorithm.specialization.orthogonality_token_fraction": _PROBABILITY,
    "algorithm.specialization.variance_coef": _NOT_NEGATIVE,
    "evaluation.interval": _INDEX,
    "evaluation.problems": _COUNT,
    "evaluation.samples": _COUNT,
    "evaluation.temperature": _POSITIVE,
    "evaluation.top_p": _PROBABILITY,
    "checkpoint.interval": _INDEX,
    "checkpoint.keep": _COUNT,
    "logging.console_interval": _COUNT,
    "seed": _INDEX,
    "threads": _COUNT,
}

"""VP2O's policy loss for verl: `actor_rollout_ref.actor.policy_loss.loss_mode=vp2o`.

Shape legend: N sequences of a micro-batch, S positions of the response.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss

from megatron_vp2o.core.objective import PolicyInputs, VP2OObjective
from megatron_vp2o.core.prior import MAX_LOG_RATIO, k3


def vp2o_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """`-r A`, unclipped (VP2O Eqs. 1 and 3), aggregated as verl aggregates its own losses.

    Args:
        old_log_prob: [N, S] of the actor that drew the tokens.
        log_prob: [N, S], with gradient.
        advantages: [N, S].
        response_mask: [N, S], tokens that count; what lies outside is ignored, NaN included.
        rollout_is_weights: verl's corrections for a rollout engine that differs from the actor.

    Returns:
        The loss, and metrics: largest ratio, and KL(old || new) of a token (k3 estimate).
    """
    mask_NS = response_mask.bool()
    log_ratio_NS = torch.where(mask_NS, log_prob.float() - old_log_prob.float(), 0.0)
    advantages_NS = torch.where(mask_NS, advantages.float(), 0.0)
    objective = VP2OObjective(kl_coef=0.0, entropy_coef=0.0)
    inputs = PolicyInputs(log_prob, old_log_prob, advantages_NS, mask_NS)
    surrogate_NS, _ = objective.surrogate(log_ratio_NS.clamp(max=MAX_LOG_RATIO), advantages_NS, inputs)
    if rollout_is_weights is not None:
        surrogate_NS = surrogate_NS * torch.where(mask_NS, rollout_is_weights, 0.0)
    batch_info = {} if config is None else config.global_batch_info
    loss = agg_loss(loss_mat=-surrogate_NS, loss_mask=mask_NS.float(), loss_agg_mode=loss_agg_mode, **batch_info)
    with torch.no_grad():
        ratio_NS = torch.where(mask_NS, log_ratio_NS.clamp(max=MAX_LOG_RATIO).exp(), 0.0)
        count = mask_NS.sum().clamp(min=1)
        metrics = {
            "actor/ratio_max": ratio_NS.max().item() if ratio_NS.numel() else 0.0,
            "actor/ppo_kl": (torch.where(mask_NS, k3(log_ratio_NS), 0.0).sum() / count).item(),
        }
    return loss, metrics

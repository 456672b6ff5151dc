"""This project's advantages for verl: `algorithm.adv_estimator=vp2o_...`, from a response's reward and its group.

What verl hands to a registered estimator are rewards, masks and the prompt's uid. Repulsion between answers needs the answers
and is not here.

Shape legend: N sequences, S positions of the response, P prompts, G responses of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_vp2o.core.advantages import (
    group_relative_advantages,
    maxrl_advantages,
    pass_at_k_advantages,
    w_reinforce_advantages,
)
from megatron_vp2o.errors import ConfigError

RIGHT_FROM = 1.0
"""Reward from which a response is right, for the estimators that ask (`algorithm.vp2o_right_from` overrides it)."""


def _group_relative(rewards_PG: Tensor, right_PG: Tensor, settings: Any) -> Tensor:
    normalise = bool(_setting(settings, "norm_adv_by_std_in_grpo", True))
    return group_relative_advantages(rewards_PG, normalise_by_std=normalise, epsilon=1e-6)


def _w_reinforce(rewards_PG: Tensor, right_PG: Tensor, settings: Any) -> Tensor:
    return w_reinforce_advantages(
        rewards_PG, right_PG, positive_weight=float(_setting(settings, "vp2o_positive_weight", 0.1))
    )


def _pass_at_k(rewards_PG: Tensor, right_PG: Tensor, settings: Any) -> Tensor:
    return pass_at_k_advantages(right_PG, k=int(_setting(settings, "vp2o_pass_k", 4)))


def _maxrl(rewards_PG: Tensor, right_PG: Tensor, settings: Any) -> Tensor:
    return maxrl_advantages(rewards_PG, epsilon=1e-6)


def _estimator(formula: Callable[[Tensor, Tensor, Any], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def estimate(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Sequence[Any] | None = None,
        config: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Returns advantages twice, [N, S], as verl's outcome estimators do."""
        with torch.no_grad():
            rewards_N = token_level_rewards.sum(dim=-1)
            order_PG = groups_of(index, len(rewards_N))
            rewards_PG = rewards_N[order_PG]
            right_PG = rewards_PG >= float(_setting(config, "vp2o_right_from", RIGHT_FROM))
            advantages_N = torch.zeros_like(rewards_N)
            advantages_N[order_PG.flatten()] = formula(rewards_PG, right_PG, config).flatten().to(rewards_N.dtype)
            advantages_NS = advantages_N[:, None] * response_mask
        return advantages_NS, advantages_NS

    return estimate


def groups_of(index: Sequence[Any] | None, count: int) -> Tensor:
    """Positions of each prompt's responses, [P, G], prompts in the order in which they begin.

    Raises:
        ConfigError: without uids, or where groups differ in size.
    """
    if index is None:
        raise ConfigError("verl's batch has no `uid`, so responses of one prompt cannot be told from those of another")
    found: dict[Any, list[int]] = {}
    for position, uid in enumerate(index):
        found.setdefault(uid, []).append(position)
    sizes = {len(positions) for positions in found.values()}
    if len(sizes) != 1 or sum(map(len, found.values())) != count:
        raise ConfigError(
            f"groups of {sorted(sizes)} responses in one batch: these estimators need the same number for every prompt "
            "(actor_rollout_ref.rollout.n)"
        )
    return torch.tensor(list(found.values()))


def _setting(config: Any, name: str, default: Any) -> Any:
    value = None if config is None else config.get(name, None)
    return default if value is None else value


ESTIMATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "vp2o_group_relative": _estimator(_group_relative),
    "vp2o_w_reinforce": _estimator(_w_reinforce),
    "vp2o_pass_at_k": _estimator(_pass_at_k),
    "vp2o_maxrl": _estimator(_maxrl),
}

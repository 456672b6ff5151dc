"""Rewards: what a response is worth. `make_reward` makes the one that a configuration names.

Importing this loads no torch: worker processes do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_vp2o.config.reward import RewardConfig
from megatron_vp2o.rewards.grade import Grade as Grade

if TYPE_CHECKING:
    from megatron_vp2o.rewards.composed import ComposedReward


def make_reward(config: RewardConfig) -> ComposedReward | None:
    """The reward that a configuration names, its worker processes started; None where it names none.

    Call early: what cannot work is found here, before anything is spent. Close it, or use it as a context.

    Raises:
        RewardError: something that a reward needs is missing, or the user's function cannot be imported.
    """
    from megatron_vp2o.rewards.composed import ComposedReward

    return ComposedReward(config) if config.active() else None


@contextlib.contextmanager
def open_reward(config: RewardConfig) -> Iterator[ComposedReward | None]:
    """`make_reward` as a context that is there for configurations without a reward, too."""
    reward = make_reward(config)
    try:
        yield reward
    finally:
        if reward is not None:
            reward.close()

"""Group-relative advantages.

Shape legend: P prompts, G rollouts of each prompt (the group).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _check_rewards(rewards_PG: Tensor) -> None:
    if rewards_PG.dim() != 2:
        raise ValueError(f"rewards must have shape [prompts, group], not {tuple(rewards_PG.shape)}")
    if rewards_PG.shape[1] < 2:
        raise ValueError(
            f"a group of {rewards_PG.shape[1]} has nothing to be compared with: group_size must be at least 2"
        )


def overlong_punishment(length_N: Tensor, *, longest: int, buffer: int, most: float) -> Tensor:
    """What is taken off responses that come near the length limit: 0 up to `longest - buffer` tokens, from there linear
    down to `-most` at `longest` (DAPO's soft overlong punishment, arXiv 2503.14476, Eq. 13, where `most` is 1).

    Args:
        length_N: tokens of each response; any shape.
        longest: the length limit.
        buffer: tokens before it over which the punishment grows.

    Returns:
        float64, of the shape of `length_N`.
    """
    over = length_N.double() - (longest - buffer)
    return -most * (over / buffer).clamp(0.0, 1.0)


def uniform_groups_P(rewards_PG: Tensor) -> Tensor:
    """True where all rewards of a group are equal: such a group has no advantage and carries no gradient.

    Args:
        rewards_PG: any type.

    Returns:
        bool [P].

    Raises:
        ValueError: if rewards are not [P, G] with G >= 2.
    """
    _check_rewards(rewards_PG)
    return (rewards_PG == rewards_PG[:, :1]).all(dim=1)


def group_relative_advantages(rewards_PG: Tensor, *, normalise_by_std: bool, epsilon: float) -> Tensor:
    """How much better each rollout did than its group: `A = (r - mean) / (std + epsilon)`.

    The standard deviation is the sample one (Bessel's correction, G - 1), as in TRL and verl; the GRPO paper writes
    `std` without saying which. A group of equal rewards has advantages of exactly zero, not rounding noise over
    `epsilon`.

    Args:
        rewards_PG: rewards, any real type; computed in float64, because only differences matter.
        normalise_by_std: false leaves out the division (Dr. GRPO, Liu et al., arXiv 2503.20783).
        epsilon: added to the standard deviation.

    Returns:
        float32 [P, G]; each group sums to zero.

    Raises:
        ValueError: if rewards are not [P, G] with G >= 2.

    References:
        Shao et al., arXiv 2402.03300, section 4.1.2 (outcome supervision).
    """
    uniform_P = uniform_groups_P(rewards_PG)
    rewards_PG = rewards_PG.double()
    advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if normalise_by_std:
        advantages_PG = advantages_PG / (rewards_PG.std(dim=1, keepdim=True) + epsilon)
    return torch.where(uniform_P[:, None], 0.0, advantages_PG).float()

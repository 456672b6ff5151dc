"""Group-relative advantages.

Shape legend: P prompts, G rollouts of each prompt (the group).
"""

from __future__ import annotations

import math

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

    Example:
        >>> overlong_punishment(torch.tensor([90, 95, 100]), longest=100, buffer=20, most=1.0).tolist()
        [-0.5, -0.75, -1.0]
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

    Example:
        >>> uniform_groups_P(torch.tensor([[1, 1], [0, 1]])).tolist()
        [True, False]
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

    Example:
        >>> rewards_PG = torch.tensor([[0.0, 2.0, 4.0], [5.0, 5.0, 5.0]])
        >>> group_relative_advantages(rewards_PG, normalise_by_std=True, epsilon=0.0).tolist()
        [[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    uniform_P = uniform_groups_P(rewards_PG)
    rewards_PG = rewards_PG.double()
    advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if normalise_by_std:
        advantages_PG = advantages_PG / (rewards_PG.std(dim=1, keepdim=True) + epsilon)
    return torch.where(uniform_P[:, None], 0.0, advantages_PG).float()


def w_reinforce_advantages(rewards_PG: Tensor, right_PG: Tensor, *, positive_weight: float) -> Tensor:
    """`positive_weight * r` for right rollouts, -1 for wrong ones: penalties are kept, praise is shrunk. No group is compared,
    so groups that are all right or all wrong train too. `positive_weight=0` is negative-sample reinforcement (NSR).

    Zhu et al., arXiv 2506.01347 (W-REINFORCE; its weight is 0.1). float32 [P, G].

    Example:
        >>> w_reinforce_advantages(torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]]), positive_weight=0.5).tolist()
        [[0.5, -1.0]]
    """
    return torch.where(right_PG, positive_weight * rewards_PG.double(), -1.0).float()


def pass_at_k_advantages(right_PG: Tensor, *, k: int) -> Tensor:
    """Advantage of each rollout's part in groups of k drawn from its G, whose reward is 1 if any of the k is right.

    Over all subsets of size k the mean reward is `m = 1 - C(w, k) / C(G, k)` with w wrong rollouts, its deviation
    `s = sqrt(m (1 - m))`. A right rollout's subsets all have reward 1: `(1 - m) / s`. A wrong one's have it unless the other
    k - 1 are wrong too: `(1 - m - C(w - 1, k - 1) / C(G - 1, k - 1)) / s`. Zero where m is 0 or 1.

    Chen et al., "Pass@k Training", arXiv 2508.10751 (analytical derivation). float32 [P, G].

    Raises:
        ValueError: unless 1 <= k <= G.

    Example:
        >>> right_PG = torch.tensor([[True, False, False, False]])  # half of the pairs contain the right one: m = s = 1/2
        >>> pass_at_k_advantages(right_PG, k=2).mul(3).round().tolist()  # thirds
        [[3.0, -1.0, -1.0, -1.0]]
    """
    _check_rewards(right_PG)
    G = right_PG.shape[1]
    if not 1 <= k <= G:
        raise ValueError(f"k={k} rollouts cannot be drawn from a group of {G}")
    all_wrong = torch.tensor([math.comb(w, k) / math.comb(G, k) for w in range(G + 1)], dtype=torch.float64)
    others_wrong = torch.tensor(
        [math.comb(max(w - 1, 0), k - 1) / math.comb(G - 1, k - 1) for w in range(G + 1)], dtype=torch.float64
    )
    wrong_P1 = (~right_PG).sum(dim=1, keepdim=True).cpu()
    miss_P1 = all_wrong[wrong_P1].to(right_PG.device)
    scale_P1 = (miss_P1 * (1.0 - miss_P1)).sqrt()
    advantages_PG = torch.where(right_PG, miss_P1, miss_P1 - others_wrong[wrong_P1].to(right_PG.device)) / scale_P1
    return torch.where(scale_P1 > 0, advantages_PG, 0.0).float()


def maxrl_advantages(rewards_PG: Tensor, *, epsilon: float) -> Tensor:
    """`(r - mean) / (mean + epsilon)`: the gradient of log pass rate instead of pass rate, up to the order that G rollouts allow.
    A group whose mean is not above 0, or whose rewards are all equal, has none.

    Tajwar et al., "Maximum Likelihood Reinforcement Learning", arXiv 2602.02710. float32 [P, G].

    Example:
        >>> maxrl_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), epsilon=0.0).tolist()
        [[3.0, -1.0, -1.0, -1.0]]
    """
    uniform_P = uniform_groups_P(rewards_PG)
    rewards_PG = rewards_PG.double()
    mean_P1 = rewards_PG.mean(dim=1, keepdim=True)
    silent_P1 = uniform_P[:, None] | (mean_P1 <= 0)
    return torch.where(silent_P1, 0.0, (rewards_PG - mean_P1) / (mean_P1 + epsilon)).float()

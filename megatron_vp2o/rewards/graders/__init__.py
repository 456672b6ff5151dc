"""The rewards there are. Each is a small class; what it imports is imported when it is made."""

from __future__ import annotations

from megatron_vp2o.config.reward import RewardConfig
from megatron_vp2o.rewards.graders.base import BatchGrader, Grader

ANSWERS = ("math", "choice", "exact", "regex", "code", "instructions")
"""Rewards that say whether an answer is right; length and format say how it is put, and a user's function either."""
CHEAP = frozenset(("choice", "exact", "length"))
"""Rewards that take microseconds on any text: they are computed where they are needed, without a worker process."""


def make_grader(name: str, config: RewardConfig) -> Grader | BatchGrader:
    """The reward of that name.

    Raises:
        RewardError: what it needs is not installed here, or does not work; says what to do.
        ConfigError: a setting that only the reward itself can judge.
    """
    if name == "math":
        from megatron_vp2o.rewards.graders.math import Math

        return Math()
    if name == "instructions":
        from megatron_vp2o.rewards.graders.instructions import Instructions

        return Instructions(config.instructions)
    if name == "code":
        from megatron_vp2o.rewards.graders.code import Code

        return Code(config.code)
    if name == "own":
        from megatron_vp2o.rewards.graders.own import Own

        assert config.path is not None
        return Own(config.path)
    from megatron_vp2o.rewards.graders.choice import Choice
    from megatron_vp2o.rewards.graders.text import Exact, Format, Length, Regex

    makers = {
        "choice": lambda: Choice(config.choice),
        "exact": lambda: Exact(config.exact),
        "regex": lambda: Regex(config.regex),
        "format": lambda: Format(config.format),
        "length": lambda: Length(config.length),
    }
    return makers[name]()

"""What cannot work in the settings of rewards, found before anything is spent. Part of `validate`."""

from __future__ import annotations

import importlib.util
import re
import string
from collections.abc import Iterator
from pathlib import Path

from megatron_vp2o.config.reward import RewardConfig
from megatron_vp2o.config.schema import DataSource, SupervisedConfig, TrainConfig

NEEDS_REWARD = "rows"
"""The task that does not verify answers itself."""
PACKAGES = {"math": "math_verify", "instructions": "if_verifiable"}
"""What a reward needs of the [rewards] extra."""


def reward_problems(config: TrainConfig) -> Iterator[str]:
    """One line for each thing that is wrong with `reward`."""
    reward = config.reward
    algorithm = config.algorithm
    answers = (
        not isinstance(algorithm, SupervisedConfig) or algorithm.data.source is DataSource.task
    )  # also evaluation's
    if config.task.name == NEEDS_REWARD and answers and not reward.active():
        yield (
            f"task.name={config.task.name} needs a reward to grade responses with: choose one, such as reward=math, or "
            "reward.path=file.py:function"
        )
    if config.task.name != NEEDS_REWARD and reward.active():
        yield (
            f"task.name={config.task.name} verifies answers itself, and reward.weights has "
            f"{', '.join(reward.active())}: leave `reward` out, or choose a task that reads rows"
        )
    yield from _path(reward)
    yield from _patterns(reward)
    if reward.length.full_words >= reward.length.zero_words:
        yield (
            f"reward.length.full_words={reward.length.full_words} is not below reward.length.zero_words="
            f"{reward.length.zero_words}: the reward falls from 1 to 0 between them; choose a smaller and a larger one"
        )
    letters = reward.choice.letters
    if len(letters) < 2 or len(set(letters)) < len(letters) or not set(letters) <= set(string.ascii_uppercase):
        yield f"reward.choice.letters={letters!r} must be two or more different capital letters, such as ABCD"
    longest = config.rollout.sampling.max_new_tokens
    if reward.overlong_buffer is not None and reward.overlong_buffer > longest:
        yield (
            f"reward.overlong_buffer={reward.overlong_buffer} exceeds rollout.sampling.max_new_tokens={longest}: it is the "
            f"last part of a response; choose at most {longest}, or null"
        )


def reward_outside(config: TrainConfig) -> Iterator[str]:
    """What rewards need and is not there: packages, the user's file."""
    path = config.reward.path
    if path is not None and (place := path.rpartition(":")[0]).endswith(".py") and not Path(place).is_file():
        yield f"reward.path={path}: there is no file {place} in {Path.cwd()}; correct the path"
    for name in config.reward.active():
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            yield (
                f"reward.weights.{name} needs {PACKAGES[name].replace('_', '-')}, which is not installed: "
                "pip install 'megatron-vp2o[rewards]'"
            )


def _path(reward: RewardConfig) -> Iterator[str]:
    if reward.path is None:
        if reward.weights.own:
            yield f"reward.weights.own={reward.weights.own} needs reward.path, which is null: name your function there"
        if reward.in_process:
            yield "reward.in_process=true is for reward.path, which is null: set it, or in_process=false"
        return
    place, _, function = reward.path.rpartition(":")
    if not place or not function.isidentifier():
        yield f"reward.path={reward.path} must be package.module:function or file.py:function"
    elif not place.endswith(".py") and not all(part.isidentifier() for part in place.split(".")):
        yield f"reward.path={reward.path}: {place} is neither a module's name nor a file that ends in .py"
    if reward.weights.own == 0:
        yield f"reward.path={reward.path} with reward.weights.own=0 has no effect: choose another weight, or path=null"


def _patterns(reward: RewardConfig) -> Iterator[str]:
    for name, pattern in (("regex", reward.regex.pattern), ("format", reward.format.pattern)):
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"reward.{name}.pattern={pattern!r} is no regular expression ({error}): correct it, and quote it in a shell"

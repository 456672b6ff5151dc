"""An own reward for the benchmark: mathematics, but some responses make it hang, crash or allocate without bound."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vp2o.rewards.graders.math import Math

BAD = ("hang", "spin", "crash", "allocate")
_math = Math()


def mathematics(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """reward=math, and what a response that is one of BAD says."""
    return [vars(_grade(*answer)) for answer in zip(prompts, responses, rows, strict=True)]


def _grade(prompt: str, response: str, row: Mapping[str, Any]) -> Any:
    if response == "hang":
        time.sleep(10_000)
    if response == "spin":
        while True:
            pass
    if response == "crash":
        os.abort()
    if response == "allocate":
        held = []
        while True:
            held.append(bytearray(10_000_000))
    return _math.grade(prompt, response, row)

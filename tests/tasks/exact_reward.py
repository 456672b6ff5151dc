"""A reward that compares texts, for tests of what is around rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vp2o.rl.types import RewardResult


class Exact:
    """1 for the row's answer, 0.25 for a response with the answer in it. Keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[str], list[Mapping[str, Any]]]] = []

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[RewardResult]:
        self.calls.append((list(prompts), list(responses), list(rows)))
        return [
            RewardResult(1.0, canonical=response)
            if response == row["answer"]
            else RewardResult(0.25 * (str(row["answer"]) in response), "other text")
            for response, row in zip(responses, rows, strict=True)
        ]

"""A server for whole runs, whatever their model: `python -m tests.rollout.any_model_server VOCABULARY END SECONDS PORT`.

It takes any set of weights and computes nothing with it. A sample is drawn evenly from the vocabulary, from the bits of the
weights, the prompt and the place in the group: the same weights say the same, and others something else. A request takes so many
seconds. The run's probe must tolerate that (rollout.server.probe_tolerance=1000). GET /served counts requests.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.rollout.fake_server import State, serve


class AnyModel(State):
    """Holds what it is given."""

    def __init__(self, vocabulary: int, end: int, seconds: float) -> None:
        self.vocabulary, self.end, self.seconds = vocabulary, end, seconds
        super().__init__(Path("/nowhere"))

    def remember(self) -> None:
        """The weights as a number."""
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(self.tensors):
            digest.update(name.encode() + np.ascontiguousarray(self.tensors[name]).tobytes())
        self.bits = int.from_bytes(digest.digest(), "little")

    def log_probs(self, token: int, temperature: float) -> Any:
        """All tokens are alike."""
        return np.full(self.vocabulary, -math.log(self.vocabulary))

    def draws(self, prompt: list[int], index: int) -> Any:
        """From weights, prompt and place."""
        return np.random.default_rng([self.bits, *prompt, index])

    def generate(self, body: dict[str, Any]) -> Any:
        """Takes its time for samples, and none for a probe."""
        if body["sampling_params"].get("prompt_logprobs") is None:
            time.sleep(self.seconds)
        return super().generate(body)


if __name__ == "__main__":
    serve(AnyModel(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])), int(sys.argv[4]))

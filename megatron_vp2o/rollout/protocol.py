"""What an engine is: a place that generates with its own copy of the weights.

    receipt  = engine.update_weights(stream, version=7, probe=probe)   # proves itself, or raises SyncError
    rollouts = engine.generate(prompts, uids, sampling, group_size)    # all of them with the weights of version 7
    engine.health()
    engine.close()

Two engines implement it: `megatron.actor.generation.MegatronEngine` in the learner's own processes, and
`rollout.pool.ServerPool` with vLLM servers. `rollout/contract.py` is the test suite that both pass, and that a third engine can
import. What the training loop sees is `rl.interfaces.RolloutEngine`, which is collective over the ranks of a run: the embedded
engine is one itself, and `rollout.served.ServedEngine` makes one from a pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_vp2o.rl.types import Rollouts, SamplingParams


@dataclass(frozen=True)
class Receipt:
    """What an engine holds after an update."""

    version: int
    tensors: int  # how many it took
    bytes: int  # of these
    checksum: int  # 64 bits over the tensors as the engine holds or received them (`parallel.checksum`)


@dataclass(frozen=True)
class Probe:
    """What the trainer makes of a few sequences: an engine that holds the same weights makes the same of them.

    Log-probabilities are those of softmax(logits), temperature 1, without a nucleus.
    """

    tokens: list[list[int]]  # at least two tokens a sequence
    logprobs: list[list[float]]  # of all tokens of a sequence but its first, nats
    tolerance: float  # largest difference of a token's log-probability, nats

    def difference(self, logprobs: Sequence[Sequence[float]]) -> float:
        """Largest difference from other log-probabilities of the same tokens, nats; infinity where they are not of the same
        tokens, or not numbers."""
        if [len(row) for row in logprobs] != [len(row) for row in self.logprobs]:
            return float("inf")
        pairs = [
            (here, there)
            for ours, theirs in zip(self.logprobs, logprobs, strict=True)
            for here, there in zip(ours, theirs, strict=True)
        ]
        differences = [abs(here - there) for here, there in pairs]
        return float("inf") if any(d != d for d in differences) else max(differences, default=0.0)


@dataclass(frozen=True)
class Health:
    """Whether an engine can generate."""

    ready: bool
    version: int  # of the weights it holds; -1: none that can be used
    detail: str  # one line for a person; empty where there is nothing to say


class Engine(Protocol):
    """Generates with its own copy of the weights."""

    version: int
    """Version of the weights that the engine holds; -1 before the first update and after one that failed."""

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int, probe: Probe | None = None
    ) -> Receipt:
        """Take a whole set of weights and call it `version`.

        Args:
            weights: (name, tensor), each once, in the names that the engine documents; taken to its end even when a tensor is
                wrong, because other ranks may be sending it. A tensor need not stay as it is after the next one is taken.
            version: at least 0.
            probe: if given, the engine scores its sequences with what it now holds and compares.

        Raises:
            SyncError: a tensor is missing, unknown, twice there or of another shape; what arrived is not what was sent; or the
                probe differs by more than its tolerance. The engine then has no usable weights (`version` is -1, and `generate`
                refuses) until an update succeeds.
        """
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: SamplingParams, group_size: int = 1
    ) -> Rollouts:
        """`group_size` sequences for each prompt; sequence g of prompt p is row p * group_size + g.

        Every row was sampled with the weights of `version`, and none is missing or there twice, whatever went wrong meanwhile.
        An engine that knows which experts its tokens went to says so in `routes_NSLK`.

        Args:
            prompts: token ids, at least one each; may be no prompt at all.
            uids: an identity of each prompt; engines that draw reproducibly draw by it.

        Raises:
            ValueError: a prompt is empty.
            SyncError: the engine has no usable weights.
            RolloutError: the engine cannot generate, and why.
        """
        ...

    def health(self) -> Health:
        """Look, without changing anything."""
        ...

    def close(self) -> None:
        """Give back everything that the engine holds or started; a second call does nothing."""
        ...

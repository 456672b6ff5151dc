"""What the parts of the training loop hand to each other: plain data. `interfaces.py` has who hands it on.

Shape legend: N sequences on this data-parallel rank, S padded sequence length (prompt then response, right-padded), L MoE layers of
this pipeline stage, K experts of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_vp2o.core.routes import sentinel

if TYPE_CHECKING:
    from megatron_vp2o.rl.interfaces import Tokenizer


class Split(Enum):
    train = "train"
    validation = "validation"
    test = "test"


@dataclass(frozen=True)
class Problem:
    """One thing to solve."""

    uid: int  # position in its split
    prompt: str  # what the model sees
    data: Any  # what the verifier needs (task-specific, immutable); a task of rows keeps the file's row here, a dict
    n_solutions: int | None  # distinct right answers by the task's canonical form; None where they cannot be counted
    tokens: tuple[int, ...] | None = None  # ids of the prompt where encoding `prompt` alone would not give them

    def prompt_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids that the model is given."""
        return tokenizer.encode(self.prompt) if self.tokens is None else list(self.tokens)


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one response. `canonical` identifies the solution up to trivial rewriting; None if wrong."""

    correct: bool
    canonical: Hashable | None
    reason: str  # "" if correct, else one of the task's short failure names
    score: float | None = None  # the reward where it is not just 1 for a right answer and 0 for a wrong one
    parts: Mapping[str, float] = field(default_factory=dict)  # a composed reward's summands by name, each a metric

    @property
    def reward(self) -> float:
        """What the policy is trained on."""
        return float(self.correct) if self.score is None else self.score


@dataclass(frozen=True)
class RewardResult:
    """What a reward says of one response."""

    reward: float
    reason: str = ""  # one short reason why it is not the full reward; "" where it is
    canonical: Hashable | None = None  # the answer up to rewriting; None where there is no such form
    correct: bool | None = None  # counts in pass@k; None: whether `reward` is at least 1
    parts: Mapping[str, float] = field(default_factory=dict)  # summands of a composed reward by name

    def verdict(self) -> Verdict:
        """The same as a verifier's verdict; a right answer without a canonical form counts as one and the same answer."""
        correct = self.reward >= 1 if self.correct is None else self.correct
        canonical = ("" if self.canonical is None else self.canonical) if correct else None
        return Verdict(correct, canonical, self.reason, self.reward, self.parts)


@dataclass
class SamplingParams:
    """temperature 0 is greedy; seed and a sequence's `uid` fix its random numbers whatever the layout or batch order."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


@dataclass
class LoggedGates:
    """The actor's gates at sampled contexts: those from which every `stride`-th response token was drawn."""

    gates_LMJE: Tensor  # float32, dense; MoE layers of this pipeline stage, logged sequences, sampled contexts, experts
    row_N: Tensor  # int64; of each sequence: which logged one it is
    stride: int


@dataclass
class Rollouts:
    """Generated sequences of one data-parallel rank, equal on all its tensor- and pipeline-parallel ranks."""

    tokens_NS: Tensor  # int64; prompt, response (end-of-sequence included), then pad_id
    prompt_len_N: Tensor  # int64
    total_len_N: Tensor  # int64, prompt + response
    logprobs_NS: (
        Tensor  # float32; log-probability under the sampling distribution of the token AT s; 0 outside responses
    )
    model_logprobs_NS: (
        Tensor  # the same under softmax(logits / temperature), without the nucleus: log mu, what a learner recomputes
    )
    finished_N: Tensor  # bool; ended by end-of-sequence, not by the length limit
    weight_version: int  # of the actor weights that generated them, or that were asked to
    gates: LoggedGates | None = None  # where the engine was asked to log them
    routes_NSLK: Tensor | None = None
    """The experts of every token of each MoE layer of this pipeline stage, packed (`core.routes`); tokens that were never routed,
    such as a sequence's last one, have none. Where the engine was asked for them, or the trainer recorded its own."""
    versions_NS: Tensor | None = None
    """int64; of the weights that made each token of a response, -1 elsewhere; None: all are of `weight_version`. A later version
    went on from tokens of an earlier one as from a prompt: its log-probabilities are those of one model given all tokens before."""

    def response_mask_NS(self) -> Tensor:
        """True at response tokens (end-of-sequence included). Shape [N, S]."""
        s_S = torch.arange(self.tokens_NS.shape[1])
        return (s_S >= self.prompt_len_N[:, None]) & (s_S < self.total_len_N[:, None])

    def rows(self, index_N: Tensor) -> Rollouts:
        """Some of the sequences."""
        return Rollouts(
            self.tokens_NS[index_N],
            self.prompt_len_N[index_N],
            self.total_len_N[index_N],
            self.logprobs_NS[index_N],
            self.model_logprobs_NS[index_N],
            self.finished_N[index_N],
            self.weight_version,
            None if self.gates is None else replace(self.gates, row_N=self.gates.row_N[index_N]),
            None if self.routes_NSLK is None else self.routes_NSLK[index_N],
            None if self.versions_NS is None else self.versions_NS[index_N],
        )

    def of_version_NS(self, version: int) -> Tensor:
        """True at response tokens that the weights of this version made. Shape [N, S]."""
        response_NS = self.response_mask_NS()
        if self.versions_NS is None:
            return response_NS if self.weight_version == version else torch.zeros_like(response_NS)
        return response_NS & (self.versions_NS == version)

    def response(self, n: int) -> list[int]:
        """Response token ids of sequence n, end-of-sequence included."""
        return self.tokens_NS[n, int(self.prompt_len_N[n]) : int(self.total_len_N[n])].tolist()


@dataclass
class TrainBatch:
    """One optimizer step's data on this data-parallel rank; equal on its tensor- and pipeline-parallel ranks.

    Position s of `*_NS` speaks of the token AT s (not of the prediction made there); position 0 is never trained on. What is
    optional is None in batches that have no use for it; supervised training needs the first three only.
    """

    tokens_NS: Tensor  # int64, right-padded
    length_N: Tensor  # int64, valid tokens
    loss_mask_NS: Tensor  # bool, tokens that count in the loss
    temperature: float = 1.0  # of the log-probabilities
    segment_NS: Tensor | None = None  # int64; packed rows: which document each token belongs to, -1 for padding
    behaviour_logprobs_NS: Tensor | None = None  # of the actor that generated the tokens, without the nucleus
    advantages_N: Tensor | None = None
    reference_logprobs_NS: Tensor | None = None  # of the KL reference
    engine_logprobs_NS: Tensor | None = None  # the engine's, where it holds the very weights that are being trained
    weight_NS: Tensor | None = None  # of each token's surrogate, for an engine that disagrees with the trainer
    selected_NS: Tensor | None = None  # bool; tokens that Clip-Cov or KL-Cov treats apart
    gate_row_N: Tensor | None = None  # int64; which sequence of `LoggedGates` each row is
    gate_rank_N: Tensor | None = None  # int64; the data-parallel rank with those, where rows have changed their rank
    present_N: Tensor | None = None  # bool; rows that the actors' present weights made alone; None: not told apart
    row_N: Tensor | None = None  # int64; which of all ranks' rollouts each row is
    routes_NSLK: Tensor | None = None  # packed; experts to replay in every forward pass, see `Rollouts`

    def map(self, per_row: Callable[[Tensor], Tensor], per_token: Callable[[Tensor, float], Tensor]) -> TrainBatch:
        """The batch with every tensor replaced.

        Args:
            per_row: what becomes of a tensor [N].
            per_token: what becomes of a tensor [N, S, ...], given the value that padding has in it.
        """
        changed: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                padding = -1.0 if name == "segment_NS" else 0.0
                if name == "routes_NSLK":
                    padding = sentinel(value.dtype)
                changed[name] = per_token(value, padding) if value.dim() >= 2 else per_row(value)
        return replace(self, **changed)  # type: ignore[arg-type]  # tensor fields only

    def rows(self, index_N: Tensor) -> TrainBatch:
        """Some of the rows."""
        return self.map(lambda value_N: value_N[index_N], lambda value_NS, _: value_NS[index_N])


@dataclass
class StepStats:
    """What one optimizer step did."""

    metrics: dict[str, float]  # global means per loss token of the objective's sums, and what the stepper measured
    grad_norm: float
    lr: float
    skipped: bool  # the optimizer refused the step (non-finite gradient)
    tokens: int  # global loss tokens
    rejected: bool = False  # the trust region took the step back

    @classmethod
    def of(cls, metrics: dict[str, float], grad_norm: float, *, lr: float) -> StepStats:
        """From what was measured, `tokens` among it. A step without tokens, or whose norm is not finite, is to be skipped."""
        tokens = int(metrics["tokens"])
        return cls(metrics, grad_norm, lr, skipped=tokens == 0 or not math.isfinite(grad_norm), tokens=tokens)

"""What the parts of the training loop hand to each other.

Shape legend: N sequences on this data-parallel rank, S padded sequence length (prompt then response, right-padded).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


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


class Reward(Protocol):
    """Grades responses to rows of a user's file, a batch at a time."""

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[RewardResult]:
        """One result for each response.

        Args:
            prompts: text that the model was given, chat template included.
            responses: what it wrote, without end-of-sequence.
            rows: the file's row of each, every column of it, with the mapped columns also under the names `prompt` and
                `answer` (and `data_source` and `extra_info` where the file has verl's layout).

        Raises:
            RewardError or ConfigError naming the row, where a row or the user's function makes grading impossible.
        """
        ...


class Tokenizer(Protocol):
    vocab_size: int  # ids are below this; the model's vocabulary may be padded beyond it
    pad_id: int
    eos_id: int  # the one that ends a demonstration
    eos_ids: tuple[int, ...]  # all that end a response, `eos_id` among them

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def save(self, folder: Path) -> None: ...


class Task(Protocol):
    """A family of problems: generator, tokenizer, verifier, demonstrations, count of right answers."""

    name: str
    tokenizer: Tokenizer
    max_prompt_tokens: int  # bound over all problems of all splits
    grades_elsewhere: bool
    """Whether `verify_all` waits for other processes, so that a second thread may call it while this process generates."""

    def size(self, split: Split) -> int: ...
    def problem(self, split: Split, index: int, variant: int = 0) -> Problem:
        """Problem `index` of a split. Variants put the same problem differently, where a task can; 0 is the original."""
        ...

    def verify_all(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        """One verdict for each response; `problems[i]` is what `responses[i]` answers. In bounded time, for any text."""
        ...

    def demonstration(self, problem: Problem, seed: int) -> str:
        """One right answer (without end-of-sequence), drawn from the distinct ones by `seed`."""
        ...


@dataclass
class SamplingParams:
    """temperature 0 is greedy; seed and a sequence's `uid` fix its random numbers whatever the layout or batch order."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


GATE_ROW = "gate_row"
"""Key of a batch's extras: which logged sequence each row is, [N]."""


ROW = "row"
"""Key of a batch's extras: the number of each row among all data-parallel ranks' rollouts, int64 [N]."""


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
    weight_version: int  # of the actor weights that generated them
    gates: LoggedGates | None = None  # where the engine was asked to log them

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
        )

    def response(self, n: int) -> list[int]:
        """Response token ids of sequence n, end-of-sequence included."""
        return self.tokens_NS[n, int(self.prompt_len_N[n]) : int(self.total_len_N[n])].tolist()


HandOver = Callable[[Sequence[int], Sequence[list[int]]], None]
"""Takes responses that are complete: their rows among all sequences of one call of `generate`, and their token ids."""


@runtime_checkable
class HandsOver(Protocol):
    """A rollout engine that hands responses over while it generates others."""

    def handing_over(self, take: HandOver) -> AbstractContextManager[None]:
        """Inside, `generate` hands every response to `take`, once, as soon as it is complete. Ranks may differ in this."""
        ...


class RolloutEngine(Protocol):
    """Holds its own snapshot of the weights (`version`); generation never sees the learner's."""

    version: int

    def generate(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: SamplingParams, group_size: int = 1
    ) -> Rollouts:
        """`group_size` sequences for each of this rank's prompts; sequence g of prompt p is row p * group_size + g.

        uids: a global identity of each prompt, for layout-independent random numbers.
        Collective over the ranks that share the model.  Prompts may be empty on a rank when others have some.
        """
        ...

    def refresh(self, version: int) -> None:
        """Take the learner's weights as they are now and call them `version`."""
        ...

    def checksum(self) -> int:
        """Of the weights that the engine holds: after a refresh, what `Policy.checksum` says on the same rank."""
        ...

    def at_learner_weights(self) -> AbstractContextManager[None]:
        """Inside, the engine generates with the learner's weights (for evaluation); outside, with its own snapshot again."""
        ...

    def log_probs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        """Log-probabilities of the tokens recomputed with the actor's weights by a teacher-forced pass. [N, S], float32."""
        ...


@dataclass
class TrainBatch:
    """One optimizer step's data on this data-parallel rank; equal on its tensor- and pipeline-parallel ranks.

    Position s of `*_NS` speaks of the token AT s (not of the prediction made there); position 0 is never trained on.
    """

    tokens_NS: Tensor  # int64, right-padded
    length_N: Tensor  # int64, valid tokens
    loss_mask_NS: Tensor  # bool, tokens that count in the loss
    extras: dict[str, Tensor]  # further per-sequence [N] or per-token [N, S] tensors, handed to the objective
    temperature: float = 1.0  # of the log-probabilities
    segment_NS: Tensor | None = None  # int64; packed rows: which document each token belongs to, -1 for padding


# (logprobs_NS and entropy_NS, both with gradient, micro-batch) -> (SUM over loss tokens, {metric: SUM over loss tokens})
Objective = Callable[[Tensor, Tensor, TrainBatch], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class StepStats:
    """What one optimizer step did."""

    metrics: dict[str, float]  # global means per loss token of the objective's sums, plus moe/* from the model
    grad_norm: float
    lr: float
    skipped: bool  # the optimizer refused the step (non-finite gradient)
    tokens: int  # global loss tokens
    rejected: bool = False  # the trust region took the step back


class Policy(Protocol):
    """The learner. Every call is collective over all ranks."""

    def forward_backward(self, batch: TrainBatch, objective: Objective, micro_batch_size: int) -> dict[str, float]:
        """Accumulate and reduce gradients of the objective's mean over all ranks' loss tokens. Returns global metric means."""
        ...

    def optimizer_step(self) -> StepStats: ...

    def carry(self) -> Any:
        """What forward and backward passes change besides gradients (buffers, random generators), as it is now."""
        ...

    def put_back(self, carried: Any) -> None:
        """Return to what `carry` returned: the step did not happen."""
        ...

    def checksum(self) -> int:
        """Of this rank's weights."""
        ...

    def log_probs(self, batch: TrainBatch, micro_batch_size: int) -> Tensor:
        """[N, S] float32, no gradient; 0 at position 0 and beyond a sequence's length."""
        ...


class PolicyDrift(Protocol):
    """How far the policy itself has moved from the actors', at a step's own tokens."""

    def observe(self, batch: TrainBatch) -> None:
        """This is what the coming step trains on. Collective."""
        ...

    def measure(self) -> float:
        """Mean |log pi - log pi_actor| of a response token under the weights as they are now, in nats. Collective over all
        ranks, which get the same number. It changes nothing."""
        ...

"""Every protocol of training: who hands the data of `types.py` to whom. The table says where each is implemented, and its task.

    Tokenizer, Task        tasks/                      what is asked
    Reward                 rewards/                    what an answer is worth
    RolloutEngine          megatron/actor/, rollout/served.py   who answers
    GeneratesAhead         rollout/served.py           who answers while the learner trains
    Recalls                rollout/store.py            who still knows what earlier weights answered
    Policy                 megatron/learner/policy.py  who learns
    Objective              rl/objectives.py            from what
    GradientTransform      megatron/stein/transform.py what becomes of the gradients
    Stepper, Restorable    rl/control.py, megatron/control/trust_region.py   whether a step happens
    PolicyDrift            rl/drift.py                 what a step did to the policy
    RefreshPolicy          rl/refresh.py               when the engine gets the learner's weights
    Sink, SampleSink       tracking/                   where numbers and texts go
    Checkpointer           megatron/checkpoint/        where the run is kept

Shape legend: N sequences on this data-parallel rank, S padded sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from megatron_vp2o.core.budget import Budget, RefreshReason
from megatron_vp2o.core.deferred import Deferred
from megatron_vp2o.rl.types import (
    Problem,
    RewardResult,
    Rollouts,
    SamplingParams,
    Split,
    StepStats,
    TrainBatch,
    Verdict,
)


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

    @property
    def version(self) -> int:
        """Version of the weights that the engine holds; -1 before the first refresh."""
        ...

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

    def checksum(self) -> Deferred[int]:
        """A number that tells the weights that the engine holds: after a refresh, what `Policy.checksum` says on the same rank."""
        ...

    def at_learner_weights(self) -> AbstractContextManager[None]:
        """Inside, the engine generates with the learner's weights (for evaluation); outside, with its own snapshot again."""
        ...

    def log_probs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        """Log-probabilities of the tokens recomputed with the actor's weights by a teacher-forced pass. [N, S], float32.

        The pass replays the rollouts' routes, where they have some.
        """
        ...

    def log_probs_and_routes(self, rollouts: Rollouts, temperature: float) -> tuple[Tensor, Tensor]:
        """The same by a pass that routes freely, and the routes that it took: packed as in `Rollouts.routes_NSLK`."""
        ...

    def close(self) -> None:
        """Give back what the engine holds or started; it is not used any more."""
        ...


class Generating(Protocol):
    """Rollouts that an engine was asked for, and that come while the caller does something else."""

    def done(self) -> bool:
        """Whether this rank need not wait for them any more."""
        ...

    def span(self) -> tuple[float, float] | None:
        """Once they are there: when servers began with them, and when they were through (time.monotonic). None where no server
        worked at them for this rank."""
        ...

    def wait(self) -> Rollouts:
        """The rollouts. Called once, on all ranks in the same order; collective. Raises what `RolloutEngine.generate` raises."""
        ...

    def cancel(self) -> None:
        """Nobody wants them any more: on this rank nothing is asked for them from now on. `wait` is not called after it."""
        ...


@runtime_checkable
class GeneratesAhead(Protocol):
    """A rollout engine that generates while its caller trains."""

    def begin(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: SamplingParams, group_size: int = 1
    ) -> Generating:
        """Ask for what `RolloutEngine.generate` returns, with the weights of now. Collective, and so is the handle's `wait`; in
        between the engine uses no process group. The weights may not change before every handle was waited for or cancelled,
        unless the engine was made for it: responses under way go on with the new ones then (`Rollouts.versions_NS`)."""
        ...


@runtime_checkable
class Recalls(Protocol):
    """A rollout engine that keeps its batches on disk, so that those of weights which it no longer holds can be had again."""

    def asked_of(self, generating: Generating) -> str:
        """Names the weights that a batch was asked of, the same on all ranks; empty where it is not kept."""
        ...

    def recall(
        self,
        prompts: Sequence[Sequence[int]],
        uids: Sequence[int],
        sampling: SamplingParams,
        group_size: int,
        weights: str,
    ) -> tuple[Generating, dict[str, Any] | None] | None:
        """What the weights of this name were asked for, with what `note` was given of it. None on all ranks where a rank lacks
        the batch; no notes on all ranks where a rank lacks them. Collective."""
        ...

    def note(self, generating: Generating, arrays: dict[str, Any]) -> None:
        """Keep numpy arrays with a batch that was waited for."""
        ...


class HeldOutSuites(Protocol):
    """Benchmarks that are evaluated during training, beside the task's held-out problems."""

    def due(self, step: int, *, final: bool) -> bool:
        """Whether they are evaluated after `step` training steps."""
        ...

    def evaluate(self, step: int) -> dict[str, float]:
        """`suite/*` metrics of the learner's weights, equal on all ranks. Collective."""
        ...


Objective = Callable[[Tensor, Tensor, TrainBatch], tuple[Tensor, dict[str, Tensor]]]
"""(log-probabilities and entropies [N, S], both with gradient; micro-batch) -> (loss, metrics), each a SUM over loss tokens.
Metrics whose `policy/` key `tracking.schema` declares a maximum are maxima."""

GradientTransform = Callable[[], Deferred[dict[str, float]]]
"""Changes the reduced gradients before they are clipped. Returns metrics, equal on all ranks."""


class Policy(Protocol):
    """The learner. Every call is collective over all ranks, and so is reading what it returns."""

    def accumulate_gradients(
        self, batch: TrainBatch, objective: Objective, micro_batch_size: int
    ) -> Deferred[dict[str, float]]:
        """Accumulate and reduce gradients of the objective's mean over all ranks' loss tokens. Returns global metric means, and
        `tokens`, the loss tokens of all ranks."""
        ...

    @property
    def learning_rate(self) -> float:
        """Of the coming optimizer step."""
        ...

    def gradient_norm(self) -> Deferred[float]:
        """Hand the gradients to the optimizer; returns their norm over all ranks."""
        ...

    def take_step(self) -> None:
        """Clip by that norm, and step. A step without tokens or with a norm that is not finite must not be taken, or be taken back:
        see `StepStats.of`."""
        ...

    def save_state(self) -> Any:
        """What forward and backward passes change besides gradients (buffers, random generators), as it is now."""
        ...

    def restore_state(self, saved: Any) -> None:
        """Return to what `save_state` returned: the step did not happen."""
        ...

    def checksum(self) -> Deferred[int]:
        """A number that tells this rank's weights from others."""
        ...

    def log_probs(self, batch: TrainBatch, micro_batch_size: int) -> Tensor:
        """`start_scoring`, waited for."""
        ...

    def start_scoring(self, batch: TrainBatch, micro_batch_size: int) -> Deferred[Tensor]:
        """Log-probabilities under the present weights, [N, S] float32 on the CPU, no gradient; 0 at position 0 and beyond a
        sequence's length."""
        ...


class Restorable(Protocol):
    """Has state that forward, backward or the gradient transform change, to be restored where the step does not happen."""

    def save_state(self) -> Any:
        """That state, as it is now."""
        ...

    def restore_state(self, saved: Any) -> None:
        """Return to what `save_state` returned."""
        ...


class Stepper(Protocol):
    """Takes an optimizer step once gradients are ready, or part of it, or none."""

    def begin(self, batch: TrainBatch) -> None:
        """Before the forward pass of a step on this batch: remember all that its passes and the transform change."""

    def step(self, measured: Deferred[dict[str, float]]) -> StepStats:
        """Take the step.

        Args:
            measured: what `Policy.accumulate_gradients` returned. The stepper reads it together with what it decides by.
        """
        ...

    def set_anchor(self) -> None:
        """The actors have the learner's weights now."""

    def observe_rollouts(self, rollouts: Rollouts) -> None:
        """These are what the coming steps train on."""


class PolicyDrift(Protocol):
    """How far the policy itself has moved from the actors', at a step's own tokens."""

    def observe(self, batch: TrainBatch) -> None:
        """This is what the coming step trains on. Collective."""
        ...

    def measure(self) -> Deferred[float]:
        """Mean |log pi - log pi_actor| of a response token under the weights as they are now, in nats. Collective over all
        ranks, which get the same number. It changes nothing."""
        ...


class RefreshPolicy(Protocol):
    def reason(self, age: int) -> RefreshReason | None:
        """Why the actors are to be refreshed before the next rollout batch, or None to keep them.

        Args:
            age: rollout batches generated with the actors' present weights.
        """
        ...

    def observe(self, budget: Budget | None, rejected: bool) -> None:
        """What the last rollout batch's training found: the budget, if it is measured, and whether a step was rejected."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values that a resumed run needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Sink(Protocol):
    """Takes the metrics of a step (record, trackers and console behind it; does nothing but on one rank)."""

    def write(self, step: int, metrics: dict[str, Any]) -> None: ...

    def phase(self, message: str) -> AbstractContextManager[None]: ...


class SampleSink(Protocol):
    """Takes samples, on one rank; on the others nothing is ever due."""

    prompts: int  # most prompts of a step
    responses: int  # most responses of a prompt

    def due(self, step: int) -> bool: ...
    def write(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None: ...


class Checkpointer(Protocol):
    """Writes checkpoints."""

    def save(self, step: int, state: dict[str, Any]) -> Any:
        """Save the weights and what goes with them as `step`; `state` is the trainer's, plain values."""
        ...

"""How much one rank has to do in a training step: rows, lengths, passes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vp2o.config.parameters import length_multiple, padded_vocab
from megatron_vp2o.config.schema import (
    DataSource,
    EngineKind,
    GRPOConfig,
    Implementation,
    KLReference,
    PrefixSharing,
    RouterReplay,
    SupervisedConfig,
    TrainConfig,
)
from megatron_vp2o.config.validate import compares_rollouts, data_parallel_size
from megatron_vp2o.data.prefix_slots import SHARED_FROM
from megatron_vp2o.planning.hardware import Assumptions

CHARACTERS = 104
"""Ids of the tasks' own tokenizer (`tasks.tokenizer`, which a test compares)."""


@dataclass(frozen=True)
class Workload:
    """The work of one data-parallel rank in one training step (for RL, a rollout batch). Context-parallel ranks share it.

    Attributes:
        rows: sequences trained on.
        tokens: of a row, on average.
        longest: of a row.
        updates: optimizer steps.
        micro_batches: forward and backward passes, in all updates together.
        micro_rows: sequences in one of them, on average where they are packed.
        scored: further forward passes over all rows, without gradient.
        decoded: rows that each of the learner's ranks generates; 0 without rollouts, and where servers generate them.
        decoded_at_once: of these, at most.
        evaluated_at_once: samples of an evaluation that are generated together at most; 0 without evaluation of a task.
        packed: tokens of the fullest micro-batch where rows are packed; None where they are padded.
        shared: leading tokens of a row that it shares with others; 0 where no prompt is shared.
        sharing: rows that share them.
    """

    rows: int
    tokens: float
    longest: int
    updates: int
    micro_batches: int
    micro_rows: int
    scored: float
    decoded: int
    decoded_at_once: int
    evaluated_at_once: int
    packed: int | None = None
    shared: float = 0.0
    sharing: int = 1

    @property
    def computed(self) -> float:
        """Tokens of a row that the model computes in training, on average: a shared prompt counts once for its rows."""
        return self.tokens - self.shared * (1 - 1 / self.sharing)

    @property
    def pairs(self) -> float:
        """Queries of a row times the keys that each may meet, on average."""
        own = self.tokens - self.shared
        return own * self.tokens + self.shared**2 / self.sharing

    @property
    def micro_tokens(self) -> int:
        """Tokens of the fullest micro-batch, padding included."""
        return self.micro_rows * self.longest if self.packed is None else self.packed

    @property
    def passed(self) -> float:
        """Tokens that go through training in a step, on average over lengths."""
        return self.micro_batches * self.micro_rows * self.tokens if self.packed is None else self.rows * self.computed


def workload(config: TrainConfig, gpus: int, assumed: Assumptions) -> Workload:
    """The work under a recipe that `validate` accepts on so many processes."""
    algorithm, ranks = config.algorithm, data_parallel_size(config, gpus)
    context = config.parallel.context_parallel
    multiple = length_multiple(config.parallel.tensor_parallel, context)
    limit = config.rollout.sampling.max_new_tokens + int(assumed.prompt_tokens)
    if isinstance(algorithm, SupervisedConfig):
        length = algorithm.sequence_length or config.model.max_sequence_length
        rows = algorithm.global_batch_size // ranks
        micro = min(algorithm.micro_batch_size, rows)
        task = algorithm.data.source is DataSource.task
        return Workload(
            rows,
            length,
            _round(length, multiple),
            1,
            -(-rows // micro),
            micro,
            0.0,
            0,
            0,
            _evaluated_at_once(config, ranks) if task else 0,
        )
    assert isinstance(algorithm, GRPOConfig)
    rollouts = algorithm.prompts_per_step // ranks * algorithm.group_size
    updates = algorithm.minibatches * algorithm.epochs
    rows = rollouts // algorithm.minibatches  # of one update
    mean = assumed.prompt_tokens + assumed.response_share * config.rollout.sampling.max_new_tokens
    # Context-parallel ranks deal prompts to each other.
    dealt = -(-algorithm.prompts_per_step // ranks // context) * algorithm.group_size
    packed, shared, sharing = None, 0.0, 1
    micro = min(algorithm.micro_batch_size, rows)
    micro_batches = -(-rows // micro)
    if (budget := algorithm.micro_batch_tokens) is not None:
        # As many rows of mean length as have room. A row beyond the budget has a micro-batch of its own.
        shared, sharing = _shared(config, mean, assumed)
        micro = max(1, min(rows, int(budget // (mean - shared * (1 - 1 / sharing)))))
        micro_batches = -(-rows // micro)
        packed = _round(max(limit, min(budget, rows * limit)), multiple)
    return Workload(
        rows=rollouts * algorithm.epochs,
        tokens=mean,
        longest=_round(limit, multiple),
        updates=updates,
        micro_batches=updates * micro_batches,
        micro_rows=micro,
        scored=float(algorithm.kl_reference is KLReference.initial) + float(_recomputed(config)),
        decoded=dealt if config.rollout.engine is EngineKind.embedded else 0,
        decoded_at_once=min(config.rollout.max_batch_size, dealt),
        evaluated_at_once=_evaluated_at_once(config, ranks),
        packed=packed,
        shared=shared,
        sharing=sharing,
    )


def _evaluated_at_once(config: TrainConfig, ranks: int) -> int:
    """Whole groups of samples, as `MegatronEngine` puts them together; context-parallel ranks deal problems to each other."""
    most, samples = config.rollout.max_batch_size, config.evaluation.samples
    problems = -(-config.evaluation.problems // (ranks * config.parallel.context_parallel))
    return min(most, samples) if samples >= most else min(most // samples, problems) * samples


def _shared(config: TrainConfig, mean: float, assumed: Assumptions) -> tuple[float, int]:
    """Tokens of a prompt that is computed once, and rows that share it, if rows of `mean` tokens are packed. Groups are taken to
    stay whole. `auto` counts only for models whose attention is certainly this project's."""
    algorithm, sharing = config.algorithm, 1
    assert isinstance(algorithm, GRPOConfig)
    if config.parallel.context_parallel > 1:  # nothing is shared there
        return 0.0, 1
    prompt = float(assumed.prompt_tokens)
    computed = mean - prompt * (1 - 1 / algorithm.group_size)
    if algorithm.prefix_sharing is PrefixSharing.on:
        sharing = algorithm.group_size
    elif algorithm.prefix_sharing is PrefixSharing.auto and config.model.implementation is Implementation.local:
        sharing = algorithm.group_size if mean >= SHARED_FROM * computed else 1
    return (prompt, sharing) if sharing > 1 else (0.0, 1)


def _recomputed(config: TrainConfig) -> bool:
    """Whether rollouts are scored with the actor's weights: for `mismatch/*`, or for their routes."""
    return compares_rollouts(config) or config.rollout.router_replay is RouterReplay.R2


def padded_vocabulary(config: TrainConfig, tokenizer_size: int | None = None) -> int:
    """Rows of the embedding under a recipe."""
    size = config.model.vocab_size or tokenizer_size or CHARACTERS
    return padded_vocab(size, config.parallel.tensor_parallel)


def _round(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

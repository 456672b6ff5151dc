"""Stand-ins for what the training loop is given. Each writes what is called into one shared log, in the order of the calls.

Shape legend: N sequences of this data-parallel rank, S padded sequence length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vp2o.core.budget import RefreshReason
from megatron_vp2o.core.deferred import Deferred, known, read
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl.types import LoggedGates, Problem, Rollouts, SamplingParams, Split, StepStats, TrainBatch, Verdict
from megatron_vp2o.tasks.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer()
WIDTH = 9  # of rollouts, padded


@contextmanager
def groups_of(rank: int = 0, size: int = 1) -> Iterator[Groups]:
    """The groups of one rank. All but the data-parallel and the world's hold it alone; others' numbers are as its own.

    Collectives go through torch's fake backend: reductions leave a tensor as it is, gathers repeat it.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        world, alone = dist.group.WORLD, dist.new_group([rank])
        assert world is not None
        names = [name for name in Groups.__dataclass_fields__ if name not in ("device", "timeout", "world", "dp")]
        yield Groups(world=world, dp=world, device=torch.device("cpu"), **dict.fromkeys(names, alone))  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()


def rollouts_of(generator: torch.Generator, rows: int, *, version: int = 0, gates: bool = False) -> Rollouts:
    """Prompts and responses of drawn lengths; the tokens of row n are 3 + n, so that a row can be told by them."""
    prompt_N = torch.randint(1, 4, (rows,), generator=generator)
    total_N = prompt_N + torch.randint(1, WIDTH - 3, (rows,), generator=generator)
    inside_NS = torch.arange(WIDTH) < total_N[:, None]
    tokens_NS = torch.where(inside_NS, 3 + torch.arange(rows)[:, None], TOKENIZER.pad_id)
    response_NS = inside_NS & (torch.arange(WIDTH) >= prompt_N[:, None])
    logprobs_NS = torch.where(response_NS, -torch.rand(rows, WIDTH, generator=generator), 0.0)
    logged = LoggedGates(torch.rand(1, rows, 2, 4, generator=generator), torch.randperm(rows, generator=generator), 2)
    finished_N = torch.rand(rows, generator=generator) < 0.5
    return Rollouts(
        tokens_NS,
        prompt_N,
        total_N,
        logprobs_NS,
        logprobs_NS - response_NS * 0.25,
        finished_N,
        version,
        logged if gates else None,
    )


@dataclass
class FakeTask:
    """Problem i of a split is the text `i.variant=`. A response is right if its first character is one of `right`."""

    sizes: dict[Split, int]
    right: str = "".join(TOKENIZER.decode([3 + n]) for n in range(0, 40, 2))  # rows of even number
    countable: bool = True
    name: str = "fake"
    tokenizer: Any = TOKENIZER
    max_prompt_tokens: int = 8
    grades_elsewhere: bool = False

    def size(self, split: Split) -> int:
        return self.sizes[split]

    def problem(self, split: Split, index: int, variant: int = 0) -> Problem:
        assert 0 <= index < self.sizes[split]
        return Problem(index, f"{index}.{variant}=", (split, index, variant), 40 if self.countable else None)

    def verify_all(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        firsts = [response[:1] for response in responses]
        return [Verdict(c in self.right, c, "") if c in self.right else Verdict(False, None, "wrong") for c in firsts]

    def demonstration(self, problem: Problem, seed: int) -> str:
        return self.right[seed % len(self.right)]


@dataclass
class FakeEngine:
    """Generates drawn rollouts. Its weights are a number, `weights`, that a refresh takes over from the policy."""

    log: list[str]
    policy: FakePolicy | None = None
    name: str = "engine"
    version: int = -1
    weights: int = -1
    drawn: list[Rollouts] = field(default_factory=list)
    asked: list[tuple[list[list[int]], list[int], SamplingParams, int]] = field(default_factory=list)
    mismatch: float = 0.0  # of what `log_probs` says

    def generate(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: SamplingParams, group_size: int = 1
    ) -> Rollouts:
        self.log.append(f"{self.name} generate")
        self.asked.append(([list(prompt) for prompt in prompts], list(uids), sampling, group_size))
        generator = torch.Generator().manual_seed(len(self.drawn))
        self.drawn.append(rollouts_of(generator, len(prompts) * group_size, version=self.version))
        return self.drawn[-1]

    def refresh(self, version: int) -> None:
        self.log.append(f"{self.name} refresh {version}")
        assert self.policy is not None
        self.version, self.weights = version, self.policy.weights

    def checksum(self) -> Deferred[int]:
        return known(self.weights)

    def close(self) -> None:
        self.log.append(f"{self.name} close")

    @contextmanager
    def at_learner_weights(self) -> Iterator[None]:
        self.log.append(f"{self.name} takes the learner's weights")
        yield
        self.log.append(f"{self.name} has its own again")

    def log_probs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        self.log.append(f"{self.name} log_probs of {len(rollouts.total_len_N)}")
        return rollouts.model_logprobs_NS + self.mismatch * rollouts.response_mask_NS()

    def log_probs_and_routes(self, rollouts: Rollouts, temperature: float) -> tuple[Tensor, Tensor]:
        """Each token's one expert, of one layer, is its id."""
        return self.log_probs(rollouts, temperature), rollouts.tokens_NS[:, :, None, None].to(torch.uint8)


@dataclass
class FakePolicy:
    """Its weights are a number that each step taken adds 1 to; `skips` are the steps whose gradients have no norm."""

    log: list[str]
    skips: set[int] = field(default_factory=set)
    weights: int = 0
    buffer: int = 0  # what a forward pass changes
    batches: list[TrainBatch] = field(default_factory=list)
    stepped: int = 0
    reports: dict[str, float] = field(default_factory=dict)  # further metrics of each forward_backward

    def accumulate_gradients(
        self, batch: TrainBatch, objective: Any, micro_batch_size: int
    ) -> Deferred[dict[str, float]]:
        self.log.append("accumulate_gradients")
        self.batches.append(batch)
        self.buffer += 1
        tokens = float(batch.loss_mask_NS.sum())
        loss = 0.0
        if tokens:
            logprobs_NS = torch.zeros(batch.tokens_NS.shape).requires_grad_()
            loss = objective(logprobs_NS, torch.zeros(batch.tokens_NS.shape), batch)[0].item() / tokens
        return known({"tokens": tokens, "loss": loss, **self.reports})

    learning_rate = 0.5

    def gradient_norm(self) -> Deferred[float]:
        self.log.append("gradient_norm")
        self.stepped += 1
        return known(math.nan if self.stepped - 1 in self.skips else 2.0)

    def take_step(self) -> None:
        self.weights += 1

    def save_state(self) -> int:
        return self.buffer

    def restore_state(self, saved: int) -> None:
        self.log.append("restore_state")
        self.buffer = saved

    def checksum(self) -> Deferred[int]:
        return known(self.weights)

    def log_probs(self, batch: TrainBatch, micro_batch_size: int) -> Tensor:
        return self.start_scoring(batch, micro_batch_size).read()

    def start_scoring(self, batch: TrainBatch, micro_batch_size: int) -> Deferred[Tensor]:
        self.log.append("policy log_probs")
        return known(-batch.tokens_NS.float() / 8)


@dataclass
class FakeStepper:
    """Lets the policy step; `rejects` are the calls of `step` that it takes back."""

    log: list[str]
    policy: FakePolicy
    rejects: set[int] = field(default_factory=set)
    begun: list[TrainBatch] = field(default_factory=list)
    calls: int = 0

    def begin(self, batch: TrainBatch) -> None:
        self.log.append("begin")
        self.begun.append(batch)

    def step(self, measured: Deferred[dict[str, float]]) -> StepStats:
        rejected = self.calls in self.rejects
        self.calls += 1
        stats = StepStats.of(*read(measured, self.policy.gradient_norm()), lr=self.policy.learning_rate)
        if not stats.skipped and not rejected:
            self.policy.take_step()
        return replace(stats, rejected=rejected)

    def set_anchor(self) -> None:
        self.log.append("set_anchor")

    def observe_rollouts(self, rollouts: Rollouts) -> None:
        self.log.append("observe_rollouts")


@dataclass
class FakeRefresh:
    """Gives the reasons that it was told to give, and notes what it was shown."""

    log: list[str]
    reasons: list[RefreshReason | None] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    observed: list[tuple[Any, bool]] = field(default_factory=list)

    def reason(self, age: int) -> RefreshReason | None:
        self.ages.append(age)
        return self.reasons.pop(0) if self.reasons else None

    def observe(self, budget: Any, rejected: bool) -> None:
        self.log.append("observe")
        self.observed.append((budget, rejected))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": len(self.observed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.observed = [(None, False)] * state["seen"]


@dataclass
class FakeSink:
    log: list[str] = field(default_factory=list)
    lines: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        self.log.append(f"write {step}")
        self.lines.append((step, dict(metrics)))

    @contextmanager
    def phase(self, message: str) -> Iterator[None]:
        yield


@dataclass
class FakeCheckpointer:
    log: list[str] = field(default_factory=list)
    saved: dict[int, dict[str, Any]] = field(default_factory=dict)

    def save(self, step: int, state: dict[str, Any]) -> None:
        assert step not in self.saved, "one checkpoint a step"
        self.log.append(f"save {step}")
        self.saved[step] = state

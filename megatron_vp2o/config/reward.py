"""The settings of rewards. Part of `schema`, which imports them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Annotated, Optional

from megatron_vp2o.config.ranges import COUNT, INDEX, Range

WEIGHT = Range(-1000, 1000)
TIME = Range(0.001, 10**6)


class SandboxKind(enum.Enum):
    bubblewrap = "bubblewrap"  # namespaces
    gvisor = "gvisor"  # a kernel in user space (runsc)


class Checker(enum.Enum):
    tokens = "tokens"  # equal up to white space
    lines = "lines"  # equal line by line, up to white space at their ends
    numbers = "numbers"  # tokens equal, or numbers within 1e-6, relative or absolute


class InstructionScore(enum.Enum):
    all = "all"  # 1 where every instruction is followed
    share = "share"  # the share that is followed


@dataclass
class RewardWeights:
    """Weight of each reward in the sum that a response is worth; 0 leaves it out. Rewards are between 0 and 1."""

    math: Annotated[float, WEIGHT] = 0.0
    """Mathematical equality with the row's `answer` (math-verify)."""
    choice: Annotated[float, WEIGHT] = 0.0
    """The letter of a multiple-choice question."""
    exact: Annotated[float, WEIGHT] = 0.0
    """The text of the row's `answer`, or one of several."""
    regex: Annotated[float, WEIGHT] = 0.0
    """What a pattern finds in the response is the row's `answer`."""
    code: Annotated[float, WEIGHT] = 0.0
    """Programs, judged in a sandbox by the row's `tests` or `assertions`."""
    instructions: Annotated[float, WEIGHT] = 0.0
    """IFEval's and IFBench's verifiable instructions: the row's `instruction_id_list` and `kwargs`."""
    length: Annotated[float, WEIGHT] = 0.0
    """Short responses, counted in words."""
    format: Annotated[float, WEIGHT] = 0.0
    """The whole response matches a pattern."""
    own: Annotated[Optional[float], WEIGHT] = None
    """The function of reward.path; null: 1 where reward.path is set, else 0."""


@dataclass
class ChoiceConfig:
    """reward=choice: multiple choice."""

    letters: str = "ABCDEFGHIJ"
    """Letters of the choices, where rows have no `choices` column (whose length says it otherwise)."""
    last_letter: bool = True
    """Where a response states no answer, take the last letter that stands alone, as MMLU-Pro's evaluation does."""


@dataclass
class ExactConfig:
    """reward=exact: the text itself."""

    ignore_case: bool = False
    """Upper and lower case are the same."""
    ignore_space: bool = True
    """Any white space is one space, and none at the ends."""


@dataclass
class RegexConfig:
    """reward=regex: what a pattern finds."""

    pattern: str = r"####\s*(\S[^\n]*)"
    """Its last match (its first group, if it has one) is compared with the row's `answer`. Default: GSM8K's format."""


@dataclass
class FormatConfig:
    """reward.weights.format: the form of the whole response."""

    pattern: str = r"\s*(<think>)?(?:(?!<think>|</think>).)*</think>(?:(?!<think>|</think>).)*\S\s*"
    """What the whole response must match; `.` matches newlines. Default: thinking that ends once, then an answer."""


@dataclass
class LengthConfig:
    """reward.weights.length: short responses."""

    full_words: Annotated[int, INDEX] = 256
    """Up to so many words the reward is 1."""
    zero_words: Annotated[int, COUNT] = 512
    """From so many words it is 0; linear between the two."""


@dataclass
class InstructionsConfig:
    """reward=instructions: verifiable instructions."""

    loose: bool = False
    """The benchmarks' loose criterion: also with the first or last line or asterisks left out."""
    score: InstructionScore = InstructionScore.all
    """all: 1 where every instruction of the row is followed; share: the share that is."""


@dataclass
class CodeConfig:
    """reward=code: programs."""

    sandbox: SandboxKind = SandboxKind.bubblewrap
    """Where programs run; without a sandbox that works here the run is refused."""
    checker: Checker = Checker.tokens
    """How output is compared with what is expected, where a row has no `checker` program of its own."""
    partial: bool = False
    """The share of tests that pass is the reward; false: 1 where all pass, and the first failure ends it."""
    time_s: Annotated[float, TIME] = 4.0
    """Seconds of processor time for one test, where a row has no `time_limit`."""
    memory_mib: Annotated[int, Range(64, 2**20)] = 512
    """Memory of a program, where a row has no `memory_limit`."""
    checker_time_s: Annotated[float, TIME] = 10.0
    """Seconds of processor time of a row's `checker` program."""
    total_s: Annotated[float, TIME] = 60.0
    """Seconds on the clock for all tests of one response; tests that would begin later count as failed."""


@dataclass
class RewardConfig:
    """What a response is worth: a weighted sum of rewards. Needed by tasks that read rows; other tasks verify themselves."""

    weights: RewardWeights = field(default_factory=RewardWeights)
    """Which rewards, and how much of each."""
    path: Optional[str] = None
    """A function of your own, `package.module:function` or `file.py:function`, called as
    `function(prompts=[...], responses=[...], rows=[...])`; returns a number or a result for each response."""
    in_process: bool = False
    """Call the own function in the training process, without limits on time and memory: where it holds a model or a
    connection. false: in worker processes."""
    batch_size: Annotated[int, COUNT] = 32
    """Most responses in one call of the own function (in worker processes)."""
    choice: ChoiceConfig = field(default_factory=ChoiceConfig)
    """Multiple choice."""
    exact: ExactConfig = field(default_factory=ExactConfig)
    """The text itself."""
    regex: RegexConfig = field(default_factory=RegexConfig)
    """What a pattern finds."""
    format: FormatConfig = field(default_factory=FormatConfig)
    """The form of the whole response."""
    length: LengthConfig = field(default_factory=LengthConfig)
    """Short responses."""
    instructions: InstructionsConfig = field(default_factory=InstructionsConfig)
    """Verifiable instructions."""
    code: CodeConfig = field(default_factory=CodeConfig)
    """Programs."""
    workers: Annotated[Optional[int], Range(1, 1024)] = None
    """Worker processes of each rank; null: the cores that the job may use on the node, divided among its ranks, at most 8."""
    timeout_s: Annotated[float, TIME] = 10.0
    """Seconds for one answer and one reward, after which it is worth 0: on the clock while it waits, of processor time
    while it computes (code has limits of its own). For the own
    function: seconds of one call; after that its answers are graded one by one."""
    memory_mib: Annotated[Optional[int], Range(256, 2**24)] = 1024
    """Address space of a worker; what needs more is worth 0. null: no limit."""
    overlong_buffer: Annotated[Optional[int], COUNT] = None
    """DAPO's soft overlong punishment (arXiv 2503.14476): over the last so many tokens before
    rollout.sampling.max_new_tokens the reward falls linearly by overlong_penalty; null: none."""
    overlong_penalty: Annotated[float, Range(0, 1000)] = 1.0
    """What is taken off a response of rollout.sampling.max_new_tokens tokens."""
    mask_truncated: bool = False
    """Leave responses that the length limit cut off out of the loss (DAPO's overlong filtering)."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of Python's random numbers before each answer, and before each call of the own function, for those that draw."""

    def active(self) -> dict[str, float]:
        """Weight by name of the rewards that count."""
        weights = dict(vars(self.weights))
        weights["own"] = float(self.path is not None) if self.weights.own is None else self.weights.own
        return {name: weight for name, weight in weights.items() if weight}

    def parts(self) -> tuple[str, ...]:
        """Names of the summands that the record has: of the weighted sum, and the punishment of overlong responses."""
        return (*self.active(), *(() if self.overlong_buffer is None else ("overlong",)))

"""Settings of the tasks: what is asked, how many problems there are, and what counts as an answer. Part of the schema
(`config/schema.py`); what several of them must satisfy together is in `validate_task.py`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated, Any, Optional

from megatron_vp2o.config.ranges import DECAY, SEED, Range


class AnswerFormat(enum.Enum):
    lenient = "lenient"  # as pretrained models write answers
    strict = "strict"  # the answer and nothing else


@dataclass
class TaskConfig:
    """What every task has. A recipe picks one of the classes below through the `task` group."""

    name: str = "countdown"
    """Which task."""
    seed: Annotated[int, SEED] = 0
    """Seed of the problem generator: with the same seed, the same problems in the same splits."""
    train_size: Annotated[int, Range(1, 10**6)] = 1000
    """Distinct training problems to prepare (fewer where the space is smaller; then all of them)."""
    validation_size: Annotated[int, Range(1, 10**6)] = 100
    """Distinct held-out problems evaluated during training."""
    test_size: Annotated[int, Range(1, 10**6)] = 200
    """Distinct held-out problems evaluated at the end."""
    tokenizer: Optional[str] = None
    """Folder of a Hugging Face tokenizer, for a model that was trained with it; null for the tasks' own, of characters."""


@dataclass
class OwnTaskConfig(TaskConfig):
    """A class of your own, in one file (CONTRIBUTING.md)."""

    name: str = "own"
    """Which task."""
    path: Optional[str] = None
    """The class, `file.py:Class` or `package.module:Class`, made as `Class(config, progress=...)`."""
    settings: Any = None
    """What the class wants to be told, in a form of its own: it reads `config.settings`."""


@dataclass
class CountdownTaskConfig(TaskConfig):
    """Countdown: make a target from given numbers with + - * / and parentheses."""

    name: str = "countdown"
    """Which task."""
    numbers: Annotated[int, Range(2, 4)] = 3
    """How many numbers are given."""
    min_number: Annotated[int, Range(1, 10**9 - 1)] = 1
    """Smallest number."""
    max_number: Annotated[int, Range(1, 10**9 - 1)] = 9
    """Largest number."""
    min_target: Annotated[int, Range(1, 10**9 - 1)] = 1
    """Smallest target."""
    max_target: Annotated[int, Range(1, 10**9 - 1)] = 30
    """Largest target."""
    answer_format: AnswerFormat = AnswerFormat.lenient
    """lenient: an answer may stand after `</think>`, in `<answer>`, in `\\boxed{}`, with white space and LaTeX's operators,
    and end in `=target`; strict: the response is the answer and nothing else."""


@dataclass
class ShortestPathTaskConfig(TaskConfig):
    """One of the shortest ways through a grid with blocked cells."""

    name: str = "shortest_path"
    """Which task."""
    train_size: Annotated[int, Range(1, 10**6)] = 5000
    """Distinct training problems to prepare (fewer where the space is smaller; then all of them)."""
    rows: Annotated[int, Range(1, 64)] = 4
    """Grid height."""
    columns: Annotated[int, Range(1, 64)] = 4
    """Grid width."""
    blocked_probability: Annotated[float, DECAY] = 0.2
    """Chance that a cell is blocked."""
    answer_format: AnswerFormat = AnswerFormat.lenient
    """lenient: an answer may stand after `</think>`, in `<answer>`, in `\\boxed{}`, with white space or commas between moves;
    strict: the response is the answer and nothing else."""


@dataclass
class AddendsTaskConfig(TaskConfig):
    """Numbers with a given sum, none above a given bound: tens to hundreds of right answers a problem."""

    name: str = "addends"
    """Which task."""
    addends: Annotated[int, Range(2, 6)] = 3
    """How many numbers to write."""
    min_target: Annotated[int, Range(2, 9999)] = 20
    """Smallest sum."""
    max_target: Annotated[int, Range(2, 9999)] = 119
    """Largest sum."""
    min_answers: Annotated[int, Range(1, 10**6)] = 10
    """Problems with fewer right answers are left out."""
    answer_format: AnswerFormat = AnswerFormat.lenient
    """lenient: an answer may stand after `</think>`, in `<answer>`, in `\\boxed{}`, with white space, and end in
    `=target`;
    strict: the response is the answer and nothing else."""


@dataclass
class ColoringTaskConfig(TaskConfig):
    """Colour the nodes of a small graph so that no edge joins two of the same colour."""

    name: str = "coloring"
    """Which task."""
    nodes: Annotated[int, Range(3, 9)] = 7
    """Nodes of each graph."""
    edges: Annotated[int, Range(1, 36)] = 8
    """Edges of each graph."""
    colors: Annotated[int, Range(2, 5)] = 3
    """Colours there are."""
    min_answers: Annotated[int, Range(1, 10**6)] = 10
    """Graphs with fewer right answers are left out."""
    answer_format: AnswerFormat = AnswerFormat.lenient
    """lenient: an answer may stand after `</think>`, in `<answer>`, in `\\boxed{}`, with white space or commas
    between colours;
    strict: the response is the answer and nothing else."""


@dataclass
class LinearOrderTaskConfig(TaskConfig):
    """Letters in an order that meets given precedences: tens of right answers a problem."""

    name: str = "linear_order"
    """Which task."""
    letters: Annotated[int, Range(3, 9)] = 6
    """Letters of each problem."""
    precedences: Annotated[int, Range(1, 36)] = 5
    """Pairs of letters of which one must come before the other."""
    min_answers: Annotated[int, Range(1, 10**6)] = 10
    """Problems with fewer right answers are left out."""
    answer_format: AnswerFormat = AnswerFormat.lenient
    """lenient: an answer may stand after `</think>`, in `<answer>`, in `\\boxed{}`, with white space, commas or < between
    letters;
    strict: the response is the answer and nothing else."""


@dataclass
class BracketsTaskConfig(TaskConfig):
    """A balanced string of brackets with a given number of peaks and some given brackets: tens of right answers a problem."""

    name: str = "brackets"
    """Which task."""
    pairs: Annotated[int, Range(2, 12)] = 7
    """Pairs of brackets."""
    min_given: Annotated[int, Range(0, 22)] = 2
    """Fewest brackets that are given in their places."""
    max_given: Annotated[int, Range(0, 22)] = 4
    """Most brackets that are given in their places."""
    min_answers: Annotated[int, Range(1, 10**6)] = 10
    """Problems with fewer right answers are left out."""
    answer_format: AnswerFormat = AnswerFormat.lenient
    """lenient: an answer may stand after `</think>`, in `<answer>`, in `\\boxed{}`, with white space or commas between
    brackets;
    strict: the response is the answer and nothing else."""


@dataclass
class ChangeTaskConfig(TaskConfig):
    """An amount in coins of given kinds, no more of them than allowed: tens of right answers a problem."""

    name: str = "change"
    """Which task."""
    kinds: Annotated[int, Range(1, 9)] = 5
    """How many kinds of coins each problem has, drawn from 1 to 9."""
    coins: Annotated[int, Range(1, 20)] = 7
    """Most coins of an answer."""
    min_amount: Annotated[int, Range(1, 180)] = 10
    """Smallest amount."""
    max_amount: Annotated[int, Range(1, 180)] = 40
    """Largest amount."""
    min_answers: Annotated[int, Range(1, 10**6)] = 10
    """Problems with fewer right answers are left out."""
    answer_format: AnswerFormat = AnswerFormat.lenient
    """lenient: an answer may stand after `</think>`, in `<answer>`, in `\\boxed{}`, with white space, commas or + between
    coins;
    strict: the response is the answer and nothing else."""


@dataclass
class OpenPathTaskConfig(TaskConfig):
    """A shortest way from corner to corner of a grid with few blocked cells: tens of right answers a problem."""

    name: str = "open_path"
    """Which task."""
    rows: Annotated[int, Range(2, 12)] = 5
    """Grid height."""
    columns: Annotated[int, Range(2, 12)] = 5
    """Grid width."""
    blocked_probability: Annotated[float, DECAY] = 0.15
    """Chance that a cell is blocked."""
    min_answers: Annotated[int, Range(1, 10**6)] = 10
    """Grids with fewer right answers are left out."""
    answer_format: AnswerFormat = AnswerFormat.lenient
    """lenient: an answer may stand after `</think>`, in `<answer>`, in `\\boxed{}`, with white space or commas
    between moves;
    strict: the response is the answer and nothing else."""

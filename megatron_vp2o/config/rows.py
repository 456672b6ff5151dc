"""Settings of task=rows, and what they must satisfy together."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Optional

from megatron_vp2o.config.ranges import SEED, Range
from megatron_vp2o.config.schema import TaskConfig


class OnBadRow(enum.Enum):
    refuse = "refuse"  # before anything is trained
    skip = "skip"  # left out and counted


class OnDuplicate(enum.Enum):
    keep = "keep"  # counted, and the first ones named
    skip = "skip"  # only the first of them is used
    refuse = "refuse"


class ChatTemplate(enum.Enum):
    auto = "auto"  # where the tokenizer has one
    always = "always"
    never = "never"


@dataclass
class ColumnsConfig:
    """task=rows: names of columns, dotted for those inside another one (`reward_model.ground_truth`)."""

    prompt: Optional[str] = None
    """Text or chat messages; null: `prompt`, else `messages`."""
    answer: Optional[str] = None
    """What the reward compares with; null: `answer`, else `reward_model.ground_truth` (verl's layout), if there is one."""
    completion: Optional[str] = None
    """A right response for supervised training; null: `completion` (TRL's layout), else the last message of `messages`, else
    the answer."""


@dataclass
class RowsTaskConfig(TaskConfig):
    """Rows of your own files, graded by a reward: JSONL, JSONL.gz, parquet, folders of them, or a data set of the hub."""

    name: str = "rows"
    """Which task."""
    seed: Annotated[int, SEED] = 0
    """Seed that decides which rows are held out, and the order of training."""
    train_size: Annotated[int, Range(1, 10**12)] = 10**12
    """Training rows of each file that are used at most."""
    validation_size: Annotated[int, Range(1, 10**6)] = 100
    """Rows held out for evaluation during training (without validation_path), or the first ones of validation_path."""
    test_size: Annotated[int, Range(0, 10**6)] = 200
    """The same for the evaluation at the end; 0 with evaluation.final_split=false."""
    path: Any = None
    """A file, a folder, or a data set of the hub (owner/name, or owner/name:subset), or a list of them."""
    weights: Annotated[Optional[list[float]], Range(1e-6, 10**4)] = None
    """How often an epoch goes through each path; null: once."""
    validation_path: Optional[str] = None
    """Rows of their own for validation; null holds rows of `path` out."""
    test_path: Optional[str] = None
    """The same for the test split."""
    hub_split: str = "train"
    """Split of a data set of the `datasets` library."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """Names of columns."""
    index_dir: Optional[str] = None
    """Where indexes of files are kept; null: beside each file, or in the user's cache folder if that cannot be written to."""
    prompt_format: str = "{prompt}"
    """What a prompt of text is put into, for instance "Question: {prompt}\\nAnswer:"."""
    chat_template: ChatTemplate = ChatTemplate.auto
    """The tokenizer's chat template: auto where it has one, always, never (prompts of text go to the model as they are)."""
    system_prompt: Optional[str] = None
    """System message of conversations that have none of their own."""
    enable_thinking: Optional[bool] = None
    """Handed to the chat template, for models that can think or not; null leaves it to the template."""
    max_prompt_tokens: Annotated[Optional[int], Range(1, 2**24)] = None
    """Longest prompt; null: what model.max_sequence_length leaves beside rollout.sampling.max_new_tokens."""
    on_long_prompt: OnBadRow = OnBadRow.skip
    """skip: longer prompts are left out and counted; refuse: they are an error."""
    on_bad_row: OnBadRow = OnBadRow.refuse
    """refuse: a row that cannot be used is an error with file, line and reason; skip: it is left out and counted."""
    on_duplicate: OnDuplicate = OnDuplicate.keep
    """keep: rows that repeat a prompt stay, and are counted and named; skip: only the first is used; refuse: an error."""

    def paths(self) -> list[str]:
        """`path` as a list."""
        return list(self.path) if isinstance(self.path, (list, tuple)) else [] if self.path is None else [self.path]


def rows_problems(task: RowsTaskConfig) -> Iterator[str]:
    """One line for each."""
    paths = task.paths()
    if not paths:
        yield "task.path=null: name a file of rows (JSONL, JSONL.gz, parquet), a folder of them, or a data set of the hub"
    elif any(not isinstance(path, str) or not path for path in paths):
        yield f"task.path={task.path} must be a path, or a list of paths"
    if task.weights is not None and len(task.weights) != len(paths):
        yield f"task.weights has {len(task.weights)} numbers for {len(paths)} paths of task.path: give one for each"
    if task.prompt_format.count("{prompt}") != 1:
        yield f"task.prompt_format={task.prompt_format!r} must have {{prompt}} in it once: there the prompt is put"

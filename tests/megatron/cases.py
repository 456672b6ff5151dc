"""What test_layouts.py asks of training_job.py. Apart from both, so that collecting the tests imports no megatron.core."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One training run. `layout` holds fields of ParallelConfig."""

    name: str
    layout: dict[str, Any] = field(default_factory=dict)
    steps: int = 50
    micro_batches: int = 2  # of a global batch
    bf16: bool = False
    tied: bool = False
    project_spec: bool = False  # the project's layers in place of Megatron's
    load: str | None = None  # folder of a checkpoint to start from
    save: str | None = None  # folder for one at the end

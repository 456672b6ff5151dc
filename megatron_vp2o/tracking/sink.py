"""Where a run's metrics go: the record, the trackers and the console behind one `write`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.tracking.console import Console
from megatron_vp2o.tracking.record import MetricsRecord
from megatron_vp2o.tracking.schema import schema_for
from megatron_vp2o.tracking.trackers import Trackers, make_trackers


class RunSink:
    """A context manager; does nothing but on rank 0, and nothing before `start`.

    Args:
        config: the run.
        plain: the same in plain types, for trackers that keep it.
        rank: this process's rank.
        suites: names of the benchmarks that are evaluated during training.
    """

    def __init__(self, config: TrainConfig, plain: Mapping[str, Any], rank: int, suites: Sequence[str] = ()) -> None:
        self.config, self.plain, self.rank = config, plain, rank
        self.console = Console(
            steps=config.algorithm.steps,
            algorithm=config.algorithm.name,
            interval=config.logging.console_interval,
            enabled=rank == 0,
        )
        self._record = MetricsRecord(
            config.run_dir, schema_for(config.algorithm.name, config.evaluation.pass_at, config.reward.parts(), suites)
        )
        self._trackers = Trackers([])

    def start(self, step: int | None = None) -> None:
        """Begin, or go on after `step`: lines of later steps, which a killed run may have written, are dropped."""
        if self.rank != 0:
            return
        self._record.truncate_after(-1 if step is None else step)
        self._trackers = make_trackers(
            self.config.logging, self.config.run_dir, self.plain, self.rank, resumed_after=step
        )
        self.console.start(step or 0)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """One step's line."""
        if self.rank != 0:
            return
        self._record.append({"step": step, **metrics})
        self._trackers.log(step, metrics)
        self.console.step(step, metrics)

    def phase(self, message: str) -> AbstractContextManager[None]:
        """Around long work that is no step."""
        return self.console.phase(message)

    def __enter__(self) -> RunSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.console.close()
        self._record.close()
        self._trackers.close(failed=kind is not None)

"""What every training run does around its steps: evaluate, record, save, resume, stop when asked.

`RLTrainer` and `SupervisedTrainer` say what a step is.
"""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.config.status import PREEMPTED
from megatron_vp2o.core.deferred import Deferred, known
from megatron_vp2o.errors import CheckpointError, DeadRunError
from megatron_vp2o.parallel.groups import Groups, any_rank, max_scalars
from megatron_vp2o.rl import stop
from megatron_vp2o.rl.interfaces import Checkpointer, HeldOutSuites, Sink
from megatron_vp2o.rl.types import StepStats


class Stopwatch:
    """Wall-clock seconds by phase, the slowest rank's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass
class Progress:
    """Everything a run must remember apart from weights and optimizer; plain numbers, saved in every checkpoint."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    optimizer_steps: int = 0
    skipped: int = 0
    nonfinite_in_a_row: int = 0
    empty_in_a_row: int = 0
    elapsed_s: float = 0.0
    actor_version: int = 0
    actor_age: int = 0
    actor_refreshes: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class TrainingLoop(ABC):
    """Steps from where `progress` stands to the end."""

    def __init__(self, config: TrainConfig, groups: Groups, sink: Sink, checkpointer: Checkpointer) -> None:
        self.config, self.groups, self.sink, self.checkpointer = config, groups, sink, checkpointer
        self.progress = Progress()
        self.identities: dict[str, str] = {}
        """What a resumed run must find as it was, by a name of `_IDENTITIES`: the data, the KL reference."""
        self.suites: HeldOutSuites | None = None
        """Benchmarks that are evaluated, too; set before `run`."""
        self._saving_s: float | None = None

    @abstractmethod
    def step(self, step: int, watch: Stopwatch) -> dict[str, float]:
        """One training step (counted from 0). Returns its metrics, equal on all ranks."""

    @abstractmethod
    def evaluate(self, final: bool) -> dict[str, float]:
        """Held-out metrics of the present weights."""

    def restore(self, progress: dict[str, Any]) -> None:
        """Take up the run where `progress`, out of a checkpoint, left it.

        Raises:
            CheckpointError: it is not the progress of such a run, or data or reference are others now.
        """
        try:
            self.progress = Progress(**progress)
            kept: dict[str, str] = self.progress.extra.get(IDENTITIES, {})
            changed = [
                name for name in self.identities if kept.get(name, self.identities[name]) != self.identities[name]
            ]
        except (TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the checkpoint's trainer state is of another version of this program ({error}): start a new run from its "
                "weights (init_from)"
            ) from error
        for name in changed:
            raise CheckpointError(_IDENTITIES[name].format(there=kept[name], here=self.identities[name]))

    def run(self) -> int:
        """Train to the end. Returns 0, or PREEMPTED when a signal asked for an early, saved end."""
        settings, progress = self.config, self.progress
        total = settings.algorithm.steps
        progress.extra[IDENTITIES] = self.identities
        stop.listen(signal.SIGTERM, signal.SIGUSR1)
        if progress.step == 0:
            watch = Stopwatch()
            self._write(self._evaluate(watch, final=total == 0), watch)
        while progress.step < total:
            watch = Stopwatch()
            with watch("step"):
                metrics = self.step(progress.step, watch)
            progress.step += 1
            last = progress.step == total
            metrics.update(self._evaluate(watch, final=last))
            stopping = any_rank(stop.asked(), self.groups.world)
            progress.elapsed_s += watch.seconds["step"] + watch.seconds.get("eval", 0.0)
            # The record is written before the checkpoint: after a kill in between, resuming repeats the step and its line.
            self._write(metrics, watch)
            self._refuse_to_go_on_dead()
            due = _due(progress.step, settings.checkpoint.interval) or (last and settings.checkpoint.save_at_end)
            if due or stopping:
                self._save()
            if stopping and not last:
                return PREEMPTED
        return 0

    def count_update(self, stats: StepStats) -> None:
        """Count what became of one optimizer step. What breaks a row of steps without result is a step that was no such."""
        progress = self.progress
        progress.tokens += stats.tokens
        progress.optimizer_steps += not (stats.skipped or stats.rejected)
        progress.skipped += stats.skipped
        if not stats.skipped:
            progress.nonfinite_in_a_row = progress.empty_in_a_row = 0
        elif stats.tokens == 0:
            progress.empty_in_a_row += 1
        else:
            progress.nonfinite_in_a_row += 1

    def _refuse_to_go_on_dead(self) -> None:
        """Raise DeadRunError after too many optimizer steps without result. Before saving: what is on disk stays the newest."""
        progress, settings = self.progress, self.config.algorithm
        if progress.nonfinite_in_a_row >= settings.max_consecutive_nonfinite_steps:
            raise DeadRunError(
                f"{progress.nonfinite_in_a_row} optimizer steps in a row, up to step {progress.step}, had a gradient that is not "
                f"finite (algorithm.max_consecutive_nonfinite_steps={settings.max_consecutive_nonfinite_steps}): lower "
                f"optimizer.lr={self.config.optimizer.lr:g} or optimizer.clip_grad={self.config.optimizer.clip_grad:g}, and start "
                "again; the run then goes on from its last checkpoint, which is older than these steps"
            )
        if progress.empty_in_a_row >= settings.max_consecutive_empty_steps:
            raise DeadRunError(
                f"{progress.empty_in_a_row} optimizer steps in a row, up to step {progress.step}, had no token to train on "
                f"(algorithm.max_consecutive_empty_steps={settings.max_consecutive_empty_steps}): {_EMPTY}"
            )

    def _evaluate(self, watch: Stopwatch, *, final: bool) -> dict[str, float]:
        """What is due after this many steps: held-out problems, benchmarks."""
        step = self.progress.step
        found: dict[str, float] = {}
        if step == 0 or final or _due(step, self.config.evaluation.interval):
            with watch("eval"), self.sink.phase("evaluating"):
                found |= self.evaluate(final)
        if self.suites is not None and self.suites.due(step, final=final):
            with watch("eval"), self.sink.phase("evaluating suites"):
                found |= self.suites.evaluate(step)
        return found

    def _save(self) -> None:
        start = time.perf_counter()
        self.checkpointer.save(self.progress.step, vars(self.progress).copy())
        self._saving_s = time.perf_counter() - start

    def _write(self, metrics: dict[str, float], watch: Stopwatch) -> None:
        progress = self.progress
        times = max_scalars(watch.seconds, self.groups.world)
        for phase, seconds in times.items():
            metrics[f"time/{phase}_s"] = seconds
        metrics["time/elapsed_s"] = progress.elapsed_s
        if self._saving_s is not None:  # known only after its own step's line
            metrics["time/checkpoint_s"], self._saving_s = self._saving_s, None
        metrics.update(samples=progress.samples, tokens=progress.tokens)
        self.sink.write(progress.step, metrics)


IDENTITIES = "identities"
"""Key of Progress.extra."""
DATA, ROWS, REFERENCE = "data", "rows", "reference"
_IDENTITIES = {
    DATA: (
        "the data of algorithm.data.path are not what the run was started with ({there} there, {here} here), so that documents "
        "would be repeated or skipped: put them back as they were, or start a new run from this one's weights (init_from)"
    ),
    ROWS: (
        "the rows of task.path are not those that the run was started with (fingerprint {there} there, {here} here: files, their "
        "order or weights changed): put them back, or start a new run from this one's weights (init_from)"
    ),
    REFERENCE: (
        "the KL reference (algorithm.kl_reference=initial) is not the one that the run was started with (weights {there} there, "
        "{here} here): restore the checkpoint that init_from named then (a run that went on has later ones; name the step's "
        "own folder), or start a new run from this one's weights"
    ),
}

_EMPTY = (
    "every group of rollouts had equal rewards, or every document was empty. Start from weights that earn some rewards "
    "(init_from), take easier problems or a larger algorithm.group_size, mend the data, or raise the limit"
)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def no_transform() -> Deferred[dict[str, float]]:
    """The gradient transform of plain GRPO: none."""
    return known({})

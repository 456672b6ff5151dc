"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere, and the table at the end."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from megatron_vp2o.config.schema import Algorithm
from megatron_vp2o.tracking import format as fmt
from megatron_vp2o.tracking.runs import ACCURACY, Measure, Run, measures, short_names

_WINDOW = 50  # steps that the time left is extrapolated from, so that rare evaluations count with their share
_PLAIN_WIDTH = 100

# (metric, word, how to say it); those that were not measured are left out.
_REINFORCEMENT: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("rollout/pass_rate", "right", fmt.percent),
    ("rollout/pass_any", "groups solved", fmt.percent),
    ("rollout/distinct", "distinct", fmt.number),
    ("rollout/response_length", "length", fmt.number),
    ("policy/entropy", "entropy", fmt.number),
    ("policy/approx_kl", "KL", fmt.number),
    ("optimizer/grad_norm", "grad", fmt.number),
)
_SUPERVISED: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("supervised/loss", "loss", lambda value: fmt.number(value, 4)),
    ("supervised/validation_loss", "validation loss", lambda value: fmt.number(value, 4)),
    ("optimizer/lr", "lr", fmt.number),
    ("optimizer/grad_norm", "grad", fmt.number),
)


class Console:
    """The progress of one run; a context manager. Says nothing unless `enabled` (one rank is).

    Args:
        steps: training steps of the whole run.
        algorithm: decides which numbers are shown.
        interval: steps between lines where the output is no terminal; the first, the last and evaluations always show.
        stream: standard output unless given.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        steps: int,
        algorithm: Algorithm,
        interval: int = 1,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._interval, self._enabled, self._clock = steps, interval, enabled, clock
        self._numbers = _SUPERVISED if algorithm is Algorithm.supervised else _REINFORCEMENT
        self._stream = stream if stream is not None else sys.stdout
        self._rich = RichConsole(file=self._stream, highlight=False)
        # Not rich's own test: FORCE_COLOR in a CI log must not bring control sequences that move the cursor.
        self._live_wanted = self._stream.isatty() and not self._rich.is_dumb_terminal
        self._live: Live | None = None
        self._spinner: Status | None = None
        self._times: deque[tuple[int, float]] = deque(maxlen=_WINDOW + 1)
        self._status, self._doing = "", ""
        self._any_line = False

    def start(self, step: int = 0) -> None:
        """Training begins after `step`: the clock for the time left runs from here."""
        self._times.clear()
        self._times.append((step, self._clock()))
        if not self._enabled or not self._live_wanted:
            return
        self._stop_spinner()
        self._bar = Progress(
            TextColumn("[bold]step"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            console=self._rich,
            expand=True,
        )
        self._task = self._bar.add_task("train", total=self._steps, completed=step, pace="")
        self._live = Live(self._draw(), console=self._rich, refresh_per_second=4, transient=True)
        self._live.start()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line of the record was written."""
        if self._times and self._times[-1][0] == step:  # the evaluation before training: no step
            self._times.clear()
        self._times.append((step, self._clock()))
        if not self._enabled:
            return
        pace = self._pace(step, metrics)
        numbers = "  ".join(f"{word} {say(metrics[key])}" for key, word, say in self._numbers if _has(metrics, key))
        if self._live is not None:
            self._bar.update(self._task, completed=step, pace=pace)
            self._status = numbers
            self._refresh()
        elif step > 0 and (step % self._interval == 0 or step == self._steps or not self._any_line):
            self._any_line = True
            self.print("  ".join(part for part in (f"step {step}/{self._steps}", numbers, pace) if part))
        for prefix, where in (("eval", "validation"), ("test", "test")):
            if _has(metrics, f"{prefix}/{ACCURACY}"):
                self.print(f"{where} at step {step}/{self._steps}: {_evaluation(prefix, metrics)}")

    @contextmanager
    def phase(self, message: str) -> Iterator[None]:
        """Around long work that is no step: says `message` at once, and how long it took in the end."""
        if not self._enabled:
            yield
            return
        start, outer = self._clock(), self._doing
        outcome = "failed after"
        if self._live_wanted:
            self._do(message)
        else:
            self.print(f"{message} ...")
        try:
            yield
            outcome = "done in"
        finally:
            if self._live_wanted:
                self._do(outer)
            if self._live is None or outcome != "done in":  # under the bar there is only its second line while it lasts
                self.print(f"{message}: {outcome} {fmt.duration(self._clock() - start)}")

    def print(self, what: RenderableType) -> None:
        """Text or a table, above the live bar."""
        if not self._enabled:
            return
        width = None if self._live_wanted else _PLAIN_WIDTH
        self._rich.print(what, soft_wrap=isinstance(what, str), markup=False, width=width)
        self._stream.flush()

    def close(self) -> None:
        """Take the bar down. Nothing after the first call."""
        self._stop_spinner()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pace(self, step: int, metrics: Mapping[str, Any]) -> str:
        parts = []
        for key in ("time/tokens_per_s", "time/rollout_tokens_per_s"):
            if _has(metrics, key):
                word = "rollout tok/s" if "rollout" in key else "tok/s"
                parts.append(f"{metrics[key]:,.0f} {word}")
        (first, then), (_, now) = self._times[0], self._times[-1]
        if step > first:
            seconds = (now - then) / (step - first)
            parts.insert(0, f"{seconds:.2f} s/step")
            parts.append(f"ETA {fmt.duration(seconds * (self._steps - step))}")
        return "  ".join(parts)

    def _draw(self) -> RenderableType:
        lines: list[RenderableType] = [self._bar]
        text = "  ".join(part for part in (self._status, f"{self._doing} ..." if self._doing else "") if part)
        lines.append(Text(text, style="dim", overflow="ellipsis", no_wrap=True))
        return Group(*lines)

    def _do(self, message: str) -> None:
        """Show on the terminal what is going on; nothing for an empty message."""
        self._doing = message
        if self._live is not None:
            self._refresh()
        elif not message:
            self._stop_spinner()
        elif self._spinner is not None:
            self._spinner.update(Text(f"{message} ..."))
        else:
            self._spinner = self._rich.status(Text(f"{message} ..."))
            self._spinner.start()

    def _stop_spinner(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def _refresh(self) -> None:
        assert self._live is not None
        self._live.update(self._draw(), refresh=True)


ENDS = (("moe/router_entropy", "router entropy (nats)"), ("stein/prototype_overlap", "prototype overlap"))
"""Metrics of training steps that are shown as first and last."""


def comparison_table(runs: Sequence[Run]) -> Table:
    """First and last evaluation of each run side by side, for the end of a job.

    A cell is `first → last` on validation problems; a row `test ...` holds the run's final evaluation on test problems.
    """
    names = [run.name for run in runs]
    table = Table(title="validation: first evaluation → last", title_style="", title_justify="left")
    table.add_column("")
    for name in short_names(names):
        table.add_column(name, justify="right", overflow="fold")
    found = measures(runs)
    for measure in found:
        table.add_row(_label(measure), *(_first_to_last(run, measure) for run in runs))
    for measure in found[:1]:
        if any(run.has(f"test/{measure.key}") for run in runs):
            table.add_row(f"test {_label(measure)}", *(_last(run, f"test/{measure.key}", measure) for run in runs))
    for key, label in ENDS:
        if any(run.has(key) for run in runs):
            table.add_row(label, *(_ends(run, key) for run in runs))
    if any(run.has("actor/refreshes") for run in runs):
        table.add_row("weight syncs", *(_count(run, "actor/refreshes") for run in runs))
    table.add_row("steps", *(fmt.number(run.steps) for run in runs))
    table.add_row("training samples", *(fmt.number(int(run.last("samples") or 0)) for run in runs))
    table.add_row("time", *(fmt.duration(run.last("time/elapsed_s") or 0.0) for run in runs))
    return table


def say_measure(measure: Measure, value: float) -> str:
    """A value of a measure, without its unit unless that is per cent."""
    return fmt.percent(value) if measure.percent else fmt.number(value)


def _label(measure: Measure) -> str:
    return f"{measure.label} ({measure.unit})" if measure.unit else measure.label


def _first_to_last(run: Run, measure: Measure) -> str:
    values = run.values(f"eval/{measure.key}")
    if not values:
        return "–"
    ends = [values[0], values[-1]] if len(values) > 1 else [values[-1]]
    return " → ".join(say_measure(measure, value) for value in ends)


def _ends(run: Run, key: str) -> str:
    values = run.values(key)
    return f"{fmt.number(values[0])} → {fmt.number(values[-1])}" if values else "–"


def _count(run: Run, key: str) -> str:
    value = run.last(key)
    return "–" if value is None else fmt.number(int(value))


def _last(run: Run, key: str, measure: Measure) -> str:
    values = run.values(key)
    return say_measure(measure, values[-1]) if values else "–"


def _has(metrics: Mapping[str, Any], key: str) -> bool:
    return metrics.get(key) is not None


def _evaluation(prefix: str, metrics: Mapping[str, Any]) -> str:
    parts = [f"greedy {fmt.percent(metrics[f'{prefix}/{ACCURACY}'])}"]
    parts += [
        f"{key.removeprefix(f'{prefix}/')} {fmt.percent(value)}"
        for key, value in metrics.items()
        if key.startswith(f"{prefix}/pass@") and value is not None
    ]
    for name, word, say in (
        ("distinct", "distinct", fmt.number),
        ("coverage", "coverage", fmt.percent),
        ("answer_entropy", "answer entropy", fmt.number),
    ):
        if _has(metrics, f"{prefix}/{name}"):
            parts.append(f"{word} {say(metrics[f'{prefix}/{name}'])}")
    return "  ".join(parts)

"""`samples.jsonl` in the run folder: prompts, responses, rewards with reasons and advantages of every so many steps."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vp2o import atomic
from megatron_vp2o.config.schema import LoggingConfig

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"
SHOWN = 300  # characters of a text in the console's table; its end is kept, where answers stand


class RunSamples:
    """Implements `rl.samples.SampleSink`; does nothing but on rank 0."""

    def __init__(self, settings: LoggingConfig, run_dir: str | Path, rank: int) -> None:
        self.prompts, self.responses = settings.sample_prompts, settings.sample_responses
        self.interval = settings.sample_interval if rank == 0 else 0
        self.table = settings.sample_table
        self.path = Path(run_dir) / SAMPLES_FILE

    def start(self, step: int) -> None:
        """Go on after `step`: lines of later steps, which a killed run may have written, are dropped, as is a torn one."""
        if not self.interval or not self.path.is_file():
            return
        kept = [line for line in read_samples(self.path) if line["step"] <= step]
        atomic.write_text(self.path, "".join(map(_line, kept)))

    def due(self, step: int) -> bool:
        """Whether samples of this step (counted from 1) are wanted: of the first one, and of every `sample_interval`th."""
        return self.interval > 0 and (step == 1 or step % self.interval == 0)

    def write(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append one line a prompt."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(_line({"step": step, **sample}) for sample in samples)
        if self.table:
            _print(step, samples)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file of samples; one that was torn by a kill is left out."""
    samples = []
    for line in path.read_bytes().splitlines():
        try:
            sample = json.loads(line)
        except ValueError:
            continue
        if isinstance(sample, dict) and isinstance(sample.get("step"), int):
            samples.append(sample)
    return samples


def _line(sample: Mapping[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=True) + "\n"


def _print(step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"samples of step {step}", show_lines=True)
    for name in ("prompt", "response", "reward", "advantage", "why not more"):
        table.add_column(name, overflow="fold", justify="right" if name in ("reward", "advantage") else "left")
    for sample in samples:
        for i, response in enumerate(sample["responses"]):
            table.add_row(
                Text(_shortened(sample["prompt"]) if i == 0 else ""),
                Text(_shortened(response["text"]) + ("" if response["finished"] else " [cut off]")),
                f"{response['reward']:.3g}",
                f"{response['advantage']:+.3f}",
                Text(response["reason"]),
            )
    Console(stderr=True).print(table)


def _shortened(text: str) -> str:
    return printable(text if len(text) <= SHOWN else "... " + text[-SHOWN:])


def printable(text: str) -> str:
    """The text with halves of surrogate pairs replaced, which no file or terminal takes."""
    return text.encode("utf-8", "replace").decode()

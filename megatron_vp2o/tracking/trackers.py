"""Copies of the metrics for people's tools: TensorBoard and Weights & Biases. `metrics.jsonl` is the record."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megatron_vp2o import atomic
from megatron_vp2o.config.schema import LoggingConfig, WandbMode
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.tracking.nemo import ExpManager

WANDB_ID_FILE = "wandb_id"


class Tracker(Protocol):
    """Takes the measured metrics of a step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class Trackers:
    """Several trackers as one; none on ranks that don't write. A context manager that notes a failed run."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand on what was measured (is not None)."""
        measured = {key: value for key, value in metrics.items() if value is not None and key != "step"}
        for tracker in self._trackers:
            tracker.log(step, measured)

    def close(self, failed: bool = False) -> None:
        """Write out what is pending. Nothing after the first call."""
        while self._trackers:
            self._trackers.pop().close(failed)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


class TensorBoard:
    """Event files in `tensorboard/` of the run folder.

    Args:
        resumed_after: last step that a resumed run keeps; TensorBoard then hides what came after it.

    Raises:
        ConfigError: if tensorboard is not installed.
    """

    def __init__(self, run_dir: Path, *, resumed_after: int | None) -> None:
        with _needing("tensorboard", "logging.tensorboard=true", "logging.tensorboard=false"):
            from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resumed_after is None else resumed_after + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step, flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, global_step=step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One wandb run for a run folder, however often it is resumed: its id is kept there.

    Offline writes below `wandb/` of the run folder for `wandb sync`; nothing then touches the network.

    Raises:
        ConfigError: if wandb is not installed, or (online) refuses: no key, no network.
    """

    def __init__(self, mode: WandbMode, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        # In the environment, because wandb's service process and later imports read it there.
        os.environ["WANDB_MODE"] = mode.value
        os.environ["WANDB_SILENT"] = "true"
        if mode is WandbMode.offline:
            os.environ["WANDB_ERROR_REPORTING"] = "false"  # its crash reports go out even when it is offline
        with _needing("wandb", f"logging.wandb={mode.name}", "logging.wandb=disabled"):
            import wandb
        online = mode is WandbMode.online
        try:
            self._run = wandb.init(
                project=project,
                name=str(config.get("name") or run_dir.name),
                id=_stable_id(run_dir),
                resume="allow" if online else None,  # offline runs are joined by their id when they are synced
                mode=mode.value,
                dir=str(run_dir),
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"logging.wandb={mode.name}: wandb refused ({error}); log in first, or use logging.wandb=offline"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # A step that wandb already has (repeated after a kill) is ignored there; its metrics are the same.
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def make_trackers(
    logging: LoggingConfig,
    run_dir: str | Path,
    config: Mapping[str, Any],
    rank: int,
    *,
    resumed_after: int | None = None,
) -> Trackers:
    """The trackers that the settings ask for; none unless `rank` is 0.

    Args:
        config: the resolved configuration in plain types, kept with the wandb run.
        resumed_after: last step that a resumed run keeps; None for a run that starts.

    Raises:
        ConfigError: if one is not installed or refuses.
    """
    if rank != 0:
        return Trackers([])
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    chosen: list[Tracker] = []
    if logging.wandb is not WandbMode.disabled:
        chosen.append(WeightsAndBiases(logging.wandb, logging.wandb_project, folder, config))
    if logging.tensorboard:
        chosen.append(TensorBoard(folder, resumed_after=resumed_after))
    if config.get("exp_manager") is not None:
        chosen.append(ExpManager(config["exp_manager"]))
    return Trackers(chosen)


def _stable_id(run_dir: Path) -> str:
    path = run_dir / WANDB_ID_FILE
    if not path.exists():
        atomic.write_text(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()


@contextmanager
def _needing(package: str, asked_by: str, instead: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigError(f"{asked_by} needs the package {package}: pip install {package}, or set {instead}") from error

"""What of NeMo's `exp_manager` settings a run here can honour, and what it would have to ignore.

NeMo's experiment manager sets up a Lightning trainer: its folder, its loggers, and callbacks that save, resume and stop. Runs
here have no Lightning trainer: they take the folder and the loggers from it. What is a callback is refused where it is
asked for, with the setting that does the same.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator
from typing import Any

HONOURED = (
    "explicit_log_dir",
    "exp_dir",
    "name",
    "version",
    "use_datetime_version",
    "files_to_copy",
    "create_tensorboard_logger",
    "summary_writer_kwargs",
    *(
        name
        for logger in ("wandb", "mlflow", "dllogger", "clearml", "neptune")
        for name in (f"create_{logger}_logger", f"{logger}_logger_kwargs")
    ),
)
"""Keys that do here what they do in NeMo."""

INSTEAD = {
    "create_checkpoint_callback": "checkpoint.* saves",
    "checkpoint_callback_params": "checkpoint.* saves",
    "create_preemption_callback": "SIGTERM and SIGUSR1 save and stop every run",
    "resume_if_exists": "resume=auto goes on from the last checkpoint",
    "resume_ignore_no_checkpoint": "resume=auto starts where there is no checkpoint",
    "resume_past_end": "a finished run stays finished",
    "resume_from_checkpoint": "init_from names weights to start from",
    "max_time_per_run": "executor.time of the launcher stops a run in time",
    "create_early_stopping_callback": "algorithm.steps says how long a run is",
    "ema": "there is no moving average of weights",
    "create_straggler_detection_callback": "there is no detection of stragglers",
    "create_fault_tolerance_callback": "executor.max_restarts of the launcher starts ranks again",
    "log_step_timing": "time/* metrics are always recorded",
    "log_delta_step_timing": "time/* metrics are always recorded",
    "log_tflops_per_sec_per_gpu": "time/* metrics are always recorded",
    "disable_validation_on_resume": "a resumed run does not evaluate again",
    "seconds_to_sleep": "no rank waits for another",
}
"""Keys of NeMo's that are refused unless they are off, and what does that here."""

MATCHING = {"resume_if_exists", "resume_ignore_no_checkpoint", "disable_validation_on_resume", "log_step_timing"}
"""Those of them that may be on: it is how runs here behave anyway."""


def exp_manager_problems(block: Any, *, elsewhere: bool) -> Iterator[str]:
    """What is wrong with the block, one line each; nothing for null."""
    if block is None:
        return
    if not isinstance(block, dict):
        yield f"exp_manager={block} must be a mapping of NeMo's settings, as exp_manager={{exp_dir: results}}, or null"
        return
    for key, value in block.items():
        if key in HONOURED or (key in INSTEAD and (not value or key in MATCHING)):
            continue
        if key in INSTEAD:
            yield f"exp_manager.{key}={value} is NeMo's and does nothing here ({INSTEAD[key]}): remove it or set it to false"
            continue
        near = difflib.get_close_matches(str(key), [*HONOURED, *INSTEAD], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(HONOURED)}"
        yield f"exp_manager has no setting {key!r}; {hint}"
    if not elsewhere and importlib.util.find_spec("nemo") is None:
        yield (
            "exp_manager is set and needs nemo-toolkit, which is not installed: pip install 'megatron-vp2o[nemo-toolkit]', or set "
            "exp_manager=null"
        )

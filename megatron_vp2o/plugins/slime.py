"""slime: a hook before each training step, and a policy loss. Settings come from the file of `--custom-config-path`.

    --custom-megatron-before-train-step-hook-path megatron_vp2o.plugins.slime.before_train_step
    --loss-type custom_loss --custom-loss-function-path megatron_vp2o.plugins.slime.policy_loss
    --custom-config-path vp2o.yaml                                   # vp2o: {stein: {enabled: true}}

slime assigns `finalize_model_grads_func` anew for every rollout, so what is installed once is gone at the second: the hook puts it
back, with the state that it had.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.plugins.hook import Plugged, keep_state_in_checkpoints, plug_in, restore_from
from megatron_vp2o.plugins.settings import read_settings
from megatron_vp2o.plugins.versions import warn_if_untested

logger = logging.getLogger(__name__)

UNBOUNDED = 1e9
"""A clip range that no ratio leaves."""
_OURS = "vp2o_plugged"


def before_train_step(
    args: Any, rollout_id: int, step_id: int, model: Sequence[Any], optimizer: Any, scheduler: Any
) -> None:
    """slime calls this before each optimizer step. The first call installs; later ones put back what slime has overwritten.

    A critic, which slime trains by the same loop, is left alone.

    Raises:
        ConfigError: no settings, or some that cannot work; or the step before did not run the transform.
    """
    if getattr(model[0], "role", "actor") != "actor":
        return
    plugged: Plugged | None = getattr(model[0], _OURS, None)
    if plugged is None:
        given = getattr(args, "vp2o", None)
        if given is None:
            raise ConfigError(
                "the vp2o hook is set and its settings are not: write a file with `vp2o: {stein: {enabled: true}}` and pass it as "
                "--custom-config-path"
            )
        config = read_settings(given, "vp2o")
        if not config.active:
            return
        warn_if_untested("megatron-core")
        plugged = plug_in(model, optimizer, config, "slime")
        assert plugged is not None
        keep_state_in_checkpoints(model, plugged)
        folder = _resumed_from(args)
        if folder is not None:
            restore_from(folder, plugged)
        setattr(model[0], _OURS, plugged)
    else:
        plugged.after_step()  # of the step before this one
        _log(args, plugged)
    plugged.before_step()


def metrics(model: Sequence[Any]) -> dict[str, float]:
    """Those of the last step; empty where nothing is installed."""
    plugged: Plugged | None = getattr(model[0], _OURS, None)
    return {} if plugged is None else plugged.metrics


def policy_loss(args: Any, batch: Any, logits: Any, sum_of_sample_mean: Callable[..., Any]) -> Any:
    """VP2O's unclipped surrogate `r A`: slime's own policy loss, with its KL, entropy and corrections, without the clip.

    Raises:
        ConfigError: for advantage estimators whose loss is another one.
    """
    from slime.backends.megatron_utils.loss import policy_loss_function

    if args.advantage_estimator in ("cispo", "gspo"):
        raise ConfigError(
            f"--advantage-estimator {args.advantage_estimator} brings a loss of its own, which VP2O's would replace: choose grpo"
        )
    unclipped = copy.copy(args)
    unclipped.eps_clip, unclipped.eps_clip_high, unclipped.eps_clip_c = UNBOUNDED, UNBOUNDED, None
    return policy_loss_function(unclipped, batch, logits, sum_of_sample_mean)


def _resumed_from(args: Any) -> Path | None:
    """The checkpoint that slime has loaded the run's weights from; None for a start from pretrained ones."""
    load = getattr(args, "load", None)
    if not load or getattr(args, "finetune", False):
        return None
    if re.fullmatch(r"iter_\d{7}", Path(load).name):
        return Path(load)
    tracker = Path(load) / "latest_checkpointed_iteration.txt"
    iteration = tracker.read_text().strip() if tracker.is_file() else ""
    if iteration.isdigit() and getattr(args, "ckpt_step", None) is not None:
        iteration = str(args.ckpt_step)
    return Path(load) / f"iter_{int(iteration):07d}" if iteration.isdigit() else None


def _log(args: Any, plugged: Plugged) -> None:
    """To slime's trackers, from the rank that writes slime's own metrics. They are those of the step before."""
    if not plugged.metrics or plugged.installed is None:
        return
    if (
        parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.is_pipeline_last_stage()
    ):
        named = {f"vp2o/{name}": value for name, value in plugged.metrics.items()}
        _logging().log(args, {**named, "vp2o/step": plugged.installed.transform.steps}, step_key="vp2o/step")


@functools.cache
def _logging() -> Any:
    """slime's logging_utils, which in August 2026 moved from `slime.utils` to `slime.observability`."""
    try:
        return importlib.import_module("slime.observability.logging_utils")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("slime"):
            raise
        return importlib.import_module("slime.utils.logging_utils")


__all__ = ["before_train_step", "metrics", "policy_loss"]

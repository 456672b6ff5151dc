"""Megatron-LM's own `pretrain()` (megatron-core 0.19 and later, which ships it): a hook for `GPTModelConfig.post_wrap_hooks`.

config = gpt_config_from_args(args)
config.post_wrap_hooks.append(post_wrap_hook(["stein.enabled=true", "stein.eta=0.01"]))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config

from megatron_vp2o.plugins.hook import Plugged, keep_state_in_checkpoints, plug_in
from megatron_vp2o.plugins.settings import read_settings
from megatron_vp2o.plugins.versions import warn_if_untested


def post_wrap_hook(
    settings: Mapping[str, Any] | Sequence[str] | None, *, where: str = "vp2o"
) -> Callable[[list[Any]], list[Any]]:
    """A hook that puts the transform, the losses and the diagnostics into the model that Megatron has built and wrapped.

    Metrics go to Megatron's TensorBoard and W&B writers under `vp2o/`; the state goes into its checkpoints.

    Args:
        settings: a tree or lines of settings (`plugins.settings.PluginConfig`); with nothing switched on the model is left alone.
        where: how the user writes them, for messages.

    Raises:
        ConfigError: for settings that cannot work, here; for a model or layout that cannot, when the model is built.
    """
    config = read_settings(settings, where)

    def hook(model: list[Any]) -> list[Any]:
        if config.active:
            warn_if_untested("megatron-core")
            model_config = get_model_config(model[0])
            if (
                model_config.finalize_model_grads_func is None
            ):  # train() sets this default later and keeps what it finds
                model_config.finalize_model_grads_func = finalize_model_grads
            plugged = plug_in(model, None, config, "Megatron-LM's pretrain()")
            assert plugged is not None
            keep_state_in_checkpoints(model, plugged)
            if plugged.installed is not None:
                model_config.finalize_model_grads_func = _then_write(model_config.finalize_model_grads_func, plugged)
        return model

    return hook


def _then_write(finalize: Callable[..., Any], plugged: Plugged) -> Callable[..., Any]:
    @functools.wraps(finalize)
    def finalize_and_write(*args: Any, **kwargs: Any) -> Any:
        result = finalize(*args, **kwargs)
        _write(plugged.metrics)
        return result

    return finalize_and_write


def _write(metrics: Mapping[str, float]) -> None:
    """To the writers that Megatron's training log uses, at the iteration that is being computed."""
    from megatron.training.global_vars import get_args, get_tensorboard_writer, get_wandb_writer

    arguments = get_args()
    step = int(arguments.curr_iteration) + 1
    named = {f"vp2o/{name}": value for name, value in metrics.items()}
    if step % int(arguments.tensorboard_log_interval) == 0:
        if (board := get_tensorboard_writer()) is not None:
            for name, value in named.items():
                board.add_scalar(name, value, step)
        if (tracker := get_wandb_writer()) is not None:
            tracker.log(named, step)

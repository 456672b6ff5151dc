"""What the plug-in puts into verl's registries."""

from __future__ import annotations

import functools
from typing import Any

from verl.trainer.ppo import core_algos
from verl.workers.engine import BaseEngine, EngineRegistry

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.plugins.verl import VENDOR
from megatron_vp2o.plugins.verl.advantages import ESTIMATORS
from megatron_vp2o.plugins.verl.losses import vp2o_policy_loss
from megatron_vp2o.plugins.versions import warn_if_untested

POLICY_LOSS = "vp2o"


@functools.cache
def register() -> None:
    """Register engine, policy loss and advantages. A second call in the same process does nothing.

    Raises:
        ConfigError: verl has no Megatron engine here, another engine has the place, or verl would not choose ours.
    """
    warn_if_untested("verl")
    engine = _engine()
    registered = EngineRegistry._engines.get("language_model", {})
    for backend in list(registered):
        _enter(backend, engine if backend == "megatron" else _refusal(backend))
    chosen = EngineRegistry.get_engine_cls("language_model", "megatron")
    if chosen is not engine:
        raise ConfigError(
            f"verl chooses {chosen.__module__}.{chosen.__name__} for language_model on megatron, not the plug-in's engine: unset "
            "VERL_ENGINE_DEVICE"
        )
    taken = core_algos.POLICY_LOSS_REGISTRY.get(POLICY_LOSS)
    if taken is not None and taken is not vp2o_policy_loss:
        raise ConfigError(
            f"another policy loss is registered in verl under the name {POLICY_LOSS!r}: {taken.__module__}"
        )
    core_algos.register_policy_loss(POLICY_LOSS)(vp2o_policy_loss)
    for name, function in ESTIMATORS.items():
        core_algos.register_adv_est(name)(function)


def _engine() -> type:
    if "megatron" not in EngineRegistry._engines.get("language_model", {}):
        raise ConfigError(
            "verl has no Megatron engine here (its import failed: see verl's warning above): install megatron-core and mbridge"
        )
    from megatron_vp2o.plugins.verl.engine import VP2OEngine

    return VP2OEngine


def _enter(backend: str, engine: type) -> None:
    """Register for the device that verl detects."""
    from verl.utils.device import get_device_name

    key = (get_device_name(), VENDOR)
    taken = EngineRegistry._engines["language_model"][backend].get(key)
    if taken is not None:
        raise ConfigError(
            f"an engine is registered in verl already for vendor {VENDOR!r} on {backend} ({taken.__module__}.{taken.__name__}): "
            "megatron_vp2o is installed twice, or another package uses its name"
        )
    EngineRegistry.register(model_type="language_model", backend=backend, device=[key[0]], vendor=VENDOR)(engine)


def _refusal(backend: str) -> type:
    """An engine for a backend that the plug-in does not support, which says so."""

    class Refusal(BaseEngine):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise ConfigError(
                f"VERL_ENGINE_VENDOR={VENDOR} and strategy={backend}: the plug-in works in verl's megatron engine only; choose "
                "strategy=megatron, or unset VERL_ENGINE_VENDOR"
            )

    return Refusal

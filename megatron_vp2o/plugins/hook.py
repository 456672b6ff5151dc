"""What every plug-in does with a host's Megatron model: install the transform, attach losses, say so, keep the state.

Shape legend: T tokens of a micro-batch as a MoE layer gets them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.utils import get_model_config

from megatron_vp2o import __version__
from megatron_vp2o.core.choices import OrthogonalityScale
from megatron_vp2o.errors import CheckpointError, ConfigError
from megatron_vp2o.megatron.model.moe_layer import VP2OMoELayer, moe_layers
from megatron_vp2o.megatron.model.orthogonality_weight import specialise
from megatron_vp2o.megatron.platform.world import current_groups
from megatron_vp2o.megatron.stein.install import Installed, install
from megatron_vp2o.plugins.settings import PluginConfig

logger = logging.getLogger(__name__)

STATE = "vp2o.stein."
"""Prefix of the state's keys in Megatron's distributed checkpoints."""
_HOST = "vp2o_host"
"""Attribute of the first chunk of a model that has a plug-in."""


class Plugged:
    """A model of a host with the transform and the losses in it.

    Attributes:
        installed: None where only losses are on.
    """

    def __init__(self, config: PluginConfig, layers: Sequence[VP2OMoELayer], installed: Installed | None) -> None:
        self.config, self.layers, self.installed = config, layers, installed
        self._steps = 0 if installed is None else installed.transform.steps

    @property
    def metrics(self) -> dict[str, float]:
        """Those of the last step, under the names of docs/metrics.md."""
        return {} if self.installed is None else dict(self.installed.metrics)

    def before_step(self) -> None:
        """Call before each optimizer step of the host: puts the transform back where the host has overwritten it."""
        if self.installed is not None:
            self.installed.ensure()
            self._steps = self.installed.transform.steps

    def after_step(self) -> None:
        """Call after it.

        Raises:
            ConfigError: the transform did not run: the host's schedule does not call what the model's configuration names.
        """
        if self.installed is not None and self.installed.transform.steps != self._steps + 1:
            raise ConfigError(
                f"the Stein transform ran {self.installed.transform.steps - self._steps} times in one optimizer step: the host "
                "does not call the model's config.finalize_model_grads_func once a step, so its gradients were not transformed"
            )

    def count_only(self, valid_T: torch.Tensor | None) -> None:
        """Say which tokens of the coming micro-batch are no padding, where the host passes Megatron no `padding_mask`."""
        for layer in self.layers:
            layer.valid_tokens = valid_T


def plug_in(model: Any, optimizer: Any, config: PluginConfig, host: str) -> Plugged | None:
    """Install what the settings ask for, and print one line that says so (rank 0). Nothing where they ask for nothing.

    Args:
        model: the host's DistributedDataParallel chunks.
        optimizer: Megatron's, or None where there is none yet: the loss scale is then taken from the model's configuration.
        host: its name, for the line.

    Raises:
        ConfigError: for a model, layout or loop that the transform does not know; for a model that has a plug-in already.
    """
    if not config.active:
        return None
    chunks = list(model) if isinstance(model, (list, tuple)) else [model]
    if earlier := getattr(chunks[0], _HOST, None):
        raise ConfigError(f"vp2o is in this model already, put there by {earlier}: register its hook once")
    layers = [layer for chunk in chunks for layer in moe_layers(chunk)]
    count = _layers_of_all_stages(len(layers))
    if count == 0:
        raise ConfigError(
            f"vp2o is switched on and {host}'s model has no MoE layer: switch it off, or train a Mixture-of-Experts model"
        )
    installed = None
    if config.observes:
        scale = optimizer if optimizer is not None else _LossScale(get_model_config(chunks[0]))
        installed = install(chunks, scale, config.stein)
    if config.specialises:
        weight = specialise(layers, config.specialization, current_groups())
        if installed is not None:
            installed.orthogonality = weight
    setattr(chunks[0], _HOST, f"the plug-in for {host}")
    if dist.get_rank() == 0:
        print(f"megatron-vp2o {__version__} is active in {host}: {describe(config)}, {count} MoE layers", flush=True)
    return Plugged(config, layers, installed)


def describe(config: PluginConfig) -> str:
    """What the settings switch on, in words."""
    parts = []
    if config.stein.enabled:
        parts.append(f"Stein transform of expert gradients (eta {config.stein.eta:g})")
    elif config.stein.monitor:
        parts.append("diagnostics, gradients untouched")
    losses = config.specialization
    if losses.orthogonality_coef > 0:
        relative = losses.orthogonality_scale is OrthogonalityScale.relative
        parts.append(f"orthogonality loss {losses.orthogonality_coef:g}{' of its first value' if relative else ''}")
    if losses.variance_coef > 0:
        parts.append(f"variance loss {losses.variance_coef:g}")
    return ", ".join(parts)


class _LossScale:
    """The loss scale of a host whose optimizer comes later, by what it puts into the model's configuration."""

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config

    def get_loss_scale(self) -> float:
        """1 where nothing is scaled."""
        scale: Callable[[torch.Tensor], torch.Tensor] | None = self._model_config.grad_scale_func
        return 1.0 if scale is None else float(scale(torch.ones(())))


def _layers_of_all_stages(count: int) -> int:
    groups = current_groups()
    total = torch.tensor([count], device=groups.device)
    if groups.pp.size() > 1:
        dist.all_reduce(total, group=groups.pp)
    return int(total)


# --- Megatron's checkpoints -------------------------------------------------------------------------------------------


def keep_state_in_checkpoints(model: Any, plugged: Plugged) -> None:
    """Let Megatron's own checkpoints carry the transform's state: saved and loaded with the model's, under any layout.

    It adds entries to the first chunk's `sharded_state_dict`, and takes them out again before the weights are loaded. A checkpoint
    that has none (of a run without the plug-in) loads under `--dist-ckpt-strictness log_all`; the state then starts anew.
    """
    installed = plugged.installed
    if installed is None:
        return
    chunk = model[0] if isinstance(model, (list, tuple)) else model
    while hasattr(chunk, "module"):
        chunk = chunk.module
    inner = chunk.sharded_state_dict

    def sharded_state_dict(*args: Any, **kwargs: Any) -> Any:
        tree = inner(*args, **kwargs)
        tree.update(_sharded(installed))
        return tree

    def take_out(
        module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        found = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(f"{prefix}{STATE}")}
        _load(installed, {key.removeprefix(f"{prefix}{STATE}"): value for key, value in found.items()})

    chunk.sharded_state_dict = sharded_state_dict
    chunk.register_load_state_dict_pre_hook(take_out)


def restore_from(folder: Path, plugged: Plugged) -> None:
    """Take the state out of one of Megatron's distributed checkpoints, for hosts that load theirs before a plug-in is called."""
    if plugged.installed is None:
        return
    names = load_sharded_metadata(str(folder))
    found = {}
    if any(str(name).startswith(STATE) for name in names):
        found = dist_checkpointing.load(_sharded(plugged.installed), str(folder))
    _load(plugged.installed, {key.removeprefix(STATE): value for key, value in found.items()})


def _sharded(installed: Installed) -> dict[str, ShardedObject]:
    """One object a layer, the same under every layout, and one of what all have in common."""
    state, groups = installed.state_dict(), current_groups()
    stage = groups.stage.rank()
    common = {key: value for key, value in state.items() if key != "layers"}
    tree = {f"{STATE}common": _object("common", common, (groups.pp.rank(), stage))}
    for weights in installed.transform.prototypes.weights:
        name = f"layer{weights.layer}"
        tree[f"{STATE}{name}"] = _object(name, state["layers"].get(weights.layer, {}), (0, stage))
    return tree


def _object(name: str, data: Any, replica: tuple[int, int]) -> ShardedObject:
    return ShardedObject(f"{STATE}{name}", data, (1,), (0,), replica_id=replica)


def _load(installed: Installed, found: dict[str, Any]) -> None:
    if any(isinstance(value, ShardedObject) for value in found.values()) or not found:
        logger.warning(
            "the checkpoint has no state of the Stein transform (it is of a run without the plug-in): co-activation averages and "
            "prototypes start anew"
        )
        return
    if "common" not in found:
        raise CheckpointError(f"the checkpoint's state of the Stein transform lacks its common part, {STATE}common")
    layers = {
        int(name.removeprefix("layer")): value for name, value in found.items() if name.startswith("layer") and value
    }
    installed.load_state_dict({**found["common"], "layers": layers})

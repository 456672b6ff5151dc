"""The Stein transform in a training loop that is not this project's: `installed = install(model, optimizer, SteinConfig(...))`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron.core.utils import get_model_config

from megatron_vp2o.config.schema import SteinConfig
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.megatron.model.orthogonality_weight import OrthogonalityWeight
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes
from megatron_vp2o.megatron.stein.transform import SteinTransform


class Installed:
    """A transform behind the gradient reduction of somebody else's loop.

    Attributes:
        transform: what runs; its state lives as long as this object, also while it is taken out.
        metrics: those of the last step.
        orthogonality: the weight of the loop's orthogonality loss, which is settled after each step; None where it has none.
    """

    def __init__(self, transform: SteinTransform, model_config: Any) -> None:
        self.transform = transform
        self.metrics: dict[str, float] = {}
        self.orthogonality: OrthogonalityWeight | None = None
        self._model_config = model_config
        self._inner: Callable[..., Any] | None = None
        self._ours: Callable[..., Any] | None = None

    @property
    def present(self) -> bool:
        """Whether the schedule would run the transform now."""
        return self in _found_in(self._model_config.finalize_model_grads_func)

    def ensure(self) -> bool:
        """Put the transform back where the loop has overwritten `finalize_model_grads_func`, or after `remove`.

        Some loops (slime's `train`, for one) assign that function anew for every rollout: call this before each step. State
        goes on where it was.

        Returns:
            Whether it was missing.

        Raises:
            ConfigError: the function is None, or another transform has taken this one's place.
        """
        if self.present:
            return False
        inner = self._model_config.finalize_model_grads_func
        if inner is None:
            raise ConfigError(
                "the model's config.finalize_model_grads_func is None, so gradients are not reduced by the schedule: set it "
                "(megatron.core.distributed.finalize_model_grads) before install()"
            )
        if _found_in(inner):
            raise ConfigError("a Stein transform is installed in this model already: call remove() on that one first")
        for layer in self.transform.prototypes.layers:
            if layer.statistics is None:
                layer.observe()

        @functools.wraps(inner)
        def finalize_then_transform(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            self.metrics.clear()
            self.metrics.update(self.transform.apply())
            if self.orthogonality is not None:
                self.orthogonality.settle()
            return result

        finalize_then_transform.stein_installed = self  # type: ignore[attr-defined]
        self._inner, self._ours = inner, finalize_then_transform
        self._model_config.finalize_model_grads_func = finalize_then_transform
        return True

    def remove(self) -> None:
        """Take the transform out; the layers stop observing. What the loop has put in its place meanwhile stays.

        Raises:
            ConfigError: something else has wrapped the transform, so that it cannot be taken out.
        """
        current = self._model_config.finalize_model_grads_func
        if current is not None and current is self._ours:
            self._model_config.finalize_model_grads_func = self._inner
        elif self.present:
            raise ConfigError(
                "config.finalize_model_grads_func has been wrapped since install(), so the Stein transform cannot be taken out: "
                "take the wrapper out first"
            )
        for layer in self.transform.prototypes.layers:
            layer.statistics = None

    def state_dict(self) -> dict[str, Any]:
        """The transform's state for the loop's own checkpoints: plain values and tensors, equal on all ranks of a stage."""
        first = None if self.orthogonality is None else self.orthogonality.first
        return self.transform.state_dict() | {"orthogonality_first": first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ConfigError: it is of other layers or another number of experts.
        """
        self.transform.load_state_dict(state)
        if self.orthogonality is not None:
            self.orthogonality.first = state.get("orthogonality_first")


def install(model: Any, optimizer: Any, config: SteinConfig) -> Installed:
    """Put the transform into a Megatron training loop, behind its gradient reduction.

    Args:
        model: what the loop hands to Megatron's schedules: one DistributedDataParallel module or a list of chunks.
        optimizer: Megatron's optimizer; None where the loop has none yet and does not scale its loss.
        config: the transform's settings. With `monitor=True` and `enabled=False` it only measures; in every other case it changes
            gradients, also with `enabled=False`.

    Raises:
        ConfigError: for experts, gradients or routers that it does not know, by name; if the model's configuration has no
            `finalize_model_grads_func` yet, or a transform is in it already.
    """
    chunks = model if isinstance(model, (list, tuple)) else [model]
    settings = replace(config, enabled=config.enabled or not config.monitor)
    model_config = get_model_config(chunks[0])
    if _found_in(model_config.finalize_model_grads_func):
        raise ConfigError("a Stein transform is installed in this model already: call remove() on that one first")
    transform = SteinTransform(ExpertPrototypes(chunks, settings), optimizer=optimizer)
    installed = Installed(transform, model_config)
    installed.ensure()
    return installed


def _found_in(function: Any) -> list[Installed]:
    """Transforms in a chain of wrapped functions, outermost first."""
    found = []
    while function is not None:
        installed = vars(function).get("stein_installed") if hasattr(function, "__dict__") else None
        if installed is not None and installed not in found:
            found.append(installed)
        function = function.func if isinstance(function, functools.partial) else getattr(function, "__wrapped__", None)
    return found

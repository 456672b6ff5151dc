"""The learner's state of before a step: put back bit for bit, or gone towards by halves.

What is kept is what this rank's optimizer owns: its parameters (float32 masters, or its shard of them under the distributed
optimizer) and their moments. Model weights follow from those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vp2o.megatron.learner.policy import MegatronPolicy


@dataclass(frozen=True)
class _Kept:
    parameter: Tensor
    value: Tensor
    state: dict[str, Any]


class Snapshot:
    """State of a policy's optimizers and schedule, taken now.

    Args:
        on_host: keep it in host memory.
    """

    @torch.no_grad()
    def __init__(self, policy: MegatronPolicy, *, on_host: bool = False) -> None:
        self._policy = policy
        self._schedule = policy.scheduler.num_steps
        self._device = torch.device("cpu") if on_host else None
        self._kept = [
            _Kept(
                parameter, self._copy(parameter), {k: self._copy(v) for k, v in inner.state.get(parameter, {}).items()}
            )
            for inner in _inner(policy)
            for group in inner.param_groups
            for parameter in group["params"]
        ]
        self._group_steps = [group.get("step") for inner in _inner(policy) for group in inner.param_groups]

    @torch.no_grad()
    def restore(self) -> None:
        """Parameters, moments, masters and schedule as they were. Collective over data-parallel ranks (distributed optimizer)."""
        policy, kept = self._policy, iter(self._kept)
        for inner in _inner(policy):
            for group in inner.param_groups:
                for parameter in group["params"]:
                    old = next(kept)
                    parameter.data.copy_(old.value)
                    if not old.state:
                        inner.state.pop(parameter, None)
                        continue
                    state = inner.state[parameter]
                    for key, value in old.state.items():
                        if isinstance(value, Tensor):
                            state[key].copy_(value)
                        else:
                            state[key] = value
        steps = iter(self._group_steps)
        for inner in _inner(policy):
            for group in inner.param_groups:
                step = next(steps)
                if "step" in group:
                    group["step"] = step
        _publish(policy)
        policy.scheduler.num_steps = self._schedule
        policy.scheduler.step(increment=0)

    @torch.no_grad()
    def halve(self) -> None:
        """Half of the way back to the parameters as they were; moments stay. Collective, as `restore`."""
        for old in self._kept:
            old.parameter.data.copy_(torch.lerp(old.value.to(old.parameter.device), old.parameter.data, 0.5))
        _publish(self._policy)

    def _copy(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone() if self._device is None else value.detach().to(self._device, copy=True)


def _inner(policy: MegatronPolicy) -> list[torch.optim.Optimizer]:
    return [optimizer.optimizer for optimizer in policy.optimizers()]


def _publish(policy: MegatronPolicy) -> None:
    """Write the optimizers' parameters through to the model's weights, on all ranks that hold them."""
    for optimizer in policy.optimizers():
        copy = getattr(optimizer, "_copy_main_params_to_model_params", None)
        if copy is not None:
            copy()
    if policy.ddp.ddp_config.use_distributed_optimizer:
        policy.ddp.start_param_sync(force_sync=True)

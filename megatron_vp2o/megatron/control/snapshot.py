"""A copy of the learner's optimizer state from before a step: `restore` returns to it exactly, `halve` goes half-way back.

What is kept is what this rank's optimizer owns: its parameters (float32 masters, or its shard of them under the distributed
optimizer), their moments, and the entries of its parameter groups. Model weights follow from those. Buffers, random generators
and the Stein transform's state change earlier, in the forward and backward passes: see `MegatronPolicy.save_state`.
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
        on_host: keep it in host memory. With CUDA it is page-locked, and copies run beside the host's work: they are ordered
            before the step by the stream that makes them.
    """

    @torch.no_grad()
    def __init__(self, policy: MegatronPolicy, *, on_host: bool = False) -> None:
        self._policy = policy
        self._schedule = policy.scheduler.num_steps
        self._on_host = on_host
        self._pending: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        self._kept = [
            _Kept(
                parameter, self._copy(parameter), {k: self._copy(v) for k, v in inner.state.get(parameter, {}).items()}
            )
            for inner in _inner(policy)
            for group in inner.param_groups
            for parameter in group["params"]
        ]
        self._groups = [
            {key: self._copy(value) for key, value in group.items() if key != "params"}
            for inner in _inner(policy)
            for group in inner.param_groups
        ]
        for targets, sources in self._pending.values():  # few operations: a layer of 128 experts has 1,024 tensors
            torch._foreach_copy_(targets, sources, non_blocking=True)
        self._pending.clear()

    @torch.no_grad()
    def restore(self) -> None:
        """Parameters, moments, masters and schedule as they were. Collective over data-parallel ranks (distributed optimizer)."""
        policy, kept, groups = self._policy, iter(self._kept), iter(self._groups)
        for inner in _inner(policy):
            for group in inner.param_groups:
                for parameter in group["params"]:
                    old = next(kept)
                    parameter.data.copy_(old.value, non_blocking=True)
                    if old.state:
                        _put_back(inner.state[parameter], old.state)
                    else:
                        inner.state.pop(parameter, None)
                # Some optimizers count steps in the group, and begin with the first: what was not there goes again.
                _put_back(group, {"params": group["params"], **next(groups)})
        _publish(policy)
        policy.scheduler.num_steps = self._schedule
        policy.scheduler.step(increment=0)

    @torch.no_grad()
    def halve(self) -> None:
        """Half of the way back to the parameters as they were; moments stay. Collective, as `restore`."""
        for old in self._kept:
            value = old.value.to(old.parameter.device, non_blocking=True)
            old.parameter.data.copy_(torch.lerp(value, old.parameter.data, 0.5))
        _publish(self._policy)

    def _copy(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        place: dict[str, Any] = {"device": "cpu", "pin_memory": value.is_cuda} if self._on_host else {}
        copy = torch.empty_like(value, **place)
        targets, sources = self._pending.setdefault((value.device, value.dtype), ([], []))
        targets.append(copy)
        sources.append(value)
        return copy


def _put_back(entries: dict[str, Any], old: dict[str, Any]) -> None:
    """Give a dictionary its old entries, tensors into the tensors that are there."""
    for key in entries.keys() - old.keys():
        del entries[key]
    for key, value in old.items():
        if isinstance(value, Tensor) and isinstance(entries.get(key), Tensor):
            entries[key].copy_(value, non_blocking=True)
        elif isinstance(value, Tensor):
            entries[key] = value.clone()
        else:
            entries[key] = value


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

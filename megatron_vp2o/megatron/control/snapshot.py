"""A copy of the learner's optimizer state from before a step: `restore` returns to it exactly, `halve` goes half-way back.

What is kept is what this rank's optimizer owns: its parameters (float32 masters, or its shard of them under the distributed
optimizer), their moments, and the entries of its parameter groups. Model weights follow from those. Buffers, random generators
and the Stein transform's state change earlier, in the forward and backward passes: see `MegatronPolicy.save_state`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from megatron_vp2o.megatron.learner.policy import MegatronPolicy

ROOM_BYTES = 256 * 2**20
"""About how many bytes one allocation for several copies has: one of everything might find no room between others."""


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
        live = [
            (parameter, inner.state.get(parameter, {}))
            for inner in _inner(policy)
            for group in inner.param_groups
            for parameter in group["params"]
        ]
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for inner in _inner(policy)
            for group in inner.param_groups
        ]
        parameters = _copies([parameter for parameter, _ in live], on_host)
        states = _copied([state for _, state in live], on_host)
        self._kept = [
            _Kept(parameter, value, state)
            for (parameter, _), value, state in zip(live, parameters, states, strict=True)
        ]
        self._groups = _copied(groups, on_host)

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


def _copied(entries: Sequence[dict[str, Any]], on_host: bool) -> list[dict[str, Any]]:
    """The dictionaries again, with copies of the tensors in them."""
    copies = iter(_copies([v for entry in entries for v in entry.values() if isinstance(v, Tensor)], on_host))
    return [{k: next(copies) if isinstance(v, Tensor) else v for k, v in entry.items()} for entry in entries]


def _copies(tensors: Sequence[Tensor], on_host: bool) -> list[Tensor]:
    """Copies, made by few operations: a layer of 128 experts has 1,024 tensors."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(index)
    copies: dict[int, Tensor] = {}
    for indices in alike.values():
        sources = [tensors[index] for index in indices]
        targets = _pages(sources) if on_host else _side_by_side(sources)
        torch._foreach_copy_(targets, sources, non_blocking=True)
        copies.update(zip(indices, targets, strict=True))
    return [copies[index] for index in range(len(tensors))]


def _pages(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Room for copies in host memory, page-locked where the tensors are on a GPU."""
    return [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in tensors]


def _side_by_side(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Room for copies of tensors of one device and dtype, many by one allocation."""
    dtype, device = tensors[0].dtype, tensors[0].device
    apart = max(1, 16 // dtype.itemsize)  # each begins where vectors of 16 bytes can
    sizes = [-(-tensor.numel() // apart) * apart for tensor in tensors]
    places = zip(tensors, sizes, accumulate(sizes, initial=0), strict=False)
    room: list[Tensor] = []
    for _, run in groupby(places, key=lambda place: place[2] * dtype.itemsize // ROOM_BYTES):
        those = list(run)
        parts = torch.empty(sum(size for _, size, _ in those), dtype=dtype, device=device).split(
            [n for _, n, _ in those]
        )
        room += [part[: tensor.numel()].view(tensor.shape) for part, (tensor, _, _) in zip(parts, those, strict=True)]
    return room


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

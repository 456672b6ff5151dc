"""One rank of a large world, alone: every collective is recorded and none takes place, every float tensor has a shape and no data.

torch's fake process group lets one process build all the groups that a rank of the world would be in. `MetaWorld` is the mode
under which it then runs:
  - float tensors are on the meta device, whatever device was asked for; integers and booleans made by the program (token ids,
    lengths, routes, split sizes) are real, because shapes follow from them, and so is float64, in which it keeps accounts;
  - top-k, of which routes are made, chooses in turn: every expert gets the same number of tokens;
  - gathers of real tensors answer as if all ranks had sent the same, reductions leave what this rank has; a number read from a
    meta tensor is 1.

So shapes, and sizes and order of collectives, are those of a run with perfectly balanced routes; values mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

META, CPU = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten


@dataclass(frozen=True)
class Collective:
    """One communication of the traced rank.

    Attributes:
        ranks: of the group, in its order.
        given: bytes of what this rank hands over.
        taken: bytes of what it gets.
        sends: elements for each rank of the group, for an all-to-all with unequal splits.
        phase: what the program was doing.
    """

    op: str
    ranks: tuple[int, ...]
    given: int
    taken: int
    dtype: str
    phase: str
    sends: tuple[int, ...] = ()
    receives: tuple[int, ...] = ()

    def sent(self, rank: int) -> int:
        """Bytes that leave `rank`, a member, at least (a ring's): what stays on it does not count."""
        n = len(self.ranks)
        if n == 1:
            return 0
        if self.sends:
            total, own = sum(self.sends), self.sends[self.ranks.index(rank)]
            return self.given * (total - own) // total if total else 0
        share = {"all_reduce": 2 * (n - 1) / n, "all_gather": n - 1, "send": 1, "receive": 0, "broadcast": 1}
        return round(self.given * share.get(self.op, (n - 1) / n))


_NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}
_OUTPUT_FIRST = {"all_gather", "reduce_scatter", "all_to_all"}  # (outputs, inputs, ...); others work in place
_LIKE = {aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.full_like.default}
_COUNTS = (torch.int32, torch.int64)
_NO_CHANGE = {aten.normal_.default, aten.uniform_.default}


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [tensor for part in tree for tensor in _tensors(part)]
    if isinstance(tree, dict):
        return _tensors(list(tree.values()))
    return []


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class MetaWorld(TorchDispatchMode):
    """See the module. `collectives` is the record; set `phase` to label what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self.groups: dict[str, list[tuple[int, ...]]] = {}
        """Ranks of all groups that were made, this rank's or not, by Megatron's description."""
        self.awaited: Tensor | None = None
        """What the integers are that other ranks send to this one alone (the shape of their activations)."""
        self.said: Any = None
        """The object that another rank broadcasts to this one."""
        self.phase = "start"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        given = _tensors([args, kwargs])
        if not any(tensor.is_meta for tensor in given):
            return self._unreal(func, args, kwargs)
        if func in _NO_CHANGE:
            return args[0]
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return False if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if func in _LIKE and not (kwargs.get("dtype") or args[0].dtype).is_floating_point:
            real = torch.zeros if func is not aten.ones_like.default else torch.ones
            return real(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten._to_copy.default and (kwargs.get("dtype") or torch.bool) in _COUNTS:
            return torch.zeros(args[0].shape, dtype=kwargs["dtype"])  # routes are marked in such zeros
        if func is aten.topk.default:
            return self._in_turn(args[0], args[1], args[2] if len(args) > 2 else -1)
        if func is aten.masked_select.default and not args[1].is_meta:
            return args[0].new_empty(int(args[1].expand(args[0].shape).sum()))
        if func is aten.index.Tensor:
            args = (args[0], _indices(args[1]), *args[2:])
        if func._schema.is_mutable and isinstance(args[0], Tensor) and not args[0].is_meta:
            return args[0]  # integers that would take unknown values keep the ones they have
        if "device" in kwargs:
            kwargs["device"] = META
        if "generator" in kwargs:
            kwargs["generator"] = None
        return func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))

    def _unreal(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Real tensors, or none: run, unless a float tensor comes of it."""
        makes = not _tensors([args, kwargs])
        dtype = kwargs.get("dtype")
        if makes and "device" in kwargs:
            if dtype is None:
                numbers = {aten.full.default: args[1:], aten.arange.default: args, aten.arange.start: args}
                whole = func in numbers and all(isinstance(value, int) for value in numbers[func])
                dtype = torch.int64 if whole else torch.get_default_dtype()
            if _unknown(dtype):
                kwargs["device"] = META
                kwargs.pop("pin_memory", None)
                return func(*args, **kwargs)
        return tree_map(_floats_to_meta, func(*args, **kwargs))

    def _in_turn(self, scores: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
        """Top-k by turns: row t gets t k, t k + 1, ... modulo the number of choices."""
        shape = list(scores.shape)
        choices, shape[dim] = shape[dim], k
        dim = dim % scores.dim()
        rows = scores.numel() // max(choices, 1)
        index = (torch.arange(rows * k) % choices).view(*(size for d, size in enumerate(shape) if d != dim), k)
        return scores.new_empty(shape), index.movedim(-1, dim).contiguous()

    def _communicate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.split("::")[1]
        op = _NAMES.get(name, name)
        boxed = next(value for value in args if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value))
        group = dist.ProcessGroup.unbox(boxed)
        ranks = tuple(dist.get_process_group_ranks(group))
        outputs, inputs = _tensors(args[0]), _tensors(args[0])
        splits: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        if op in _OUTPUT_FIRST:
            inputs = _tensors(args[1])
        if name == "alltoall_base_":
            receives, sends = (tuple(map(int, value)) for value in (args[3], args[4]))
            splits = (sends, receives)
        if inputs:
            dtype = str(inputs[0].dtype).removeprefix("torch.")
            given, taken = _bytes(inputs), _bytes(outputs)
            self.collectives.append(Collective(op, ranks, given, taken, dtype, self.phase, *splits))
        if op in _OUTPUT_FIRST:
            _answer(op, outputs, inputs)
        elif op == "receive" and self.awaited is not None and not outputs[0].is_meta:
            outputs[0].copy_(self.awaited)
        dummy = tree_map(lambda value: torch.empty(0) if isinstance(value, Tensor) else value, (args, kwargs))
        if name == "alltoall_base_":
            dummy = ((*dummy[0][:3], [], [], *dummy[0][5:]), dummy[1])
        with torch.utils._python_dispatch._disable_current_modes():
            result = func(*dummy[0], **dummy[1])
        if isinstance(result, (list, tuple)):  # (tensors, work)
            return (args[0], result[-1])
        return result


def _answer(op: str, outputs: list[Tensor], inputs: list[Tensor]) -> None:
    """Integers arrive as if every rank had sent what this one did."""
    with torch.utils._python_dispatch._disable_current_modes():
        for number, output in enumerate(outputs):
            source = inputs[min(number, len(inputs) - 1)]
            if output.is_meta or source.is_meta or not output.numel():
                continue
            if output.numel() % max(source.numel(), 1) == 0 and op == "all_gather":
                output.view(-1, source.numel()).copy_(source.reshape(1, -1))
            elif output.numel() == source.numel():
                output.view(-1).copy_(source.reshape(-1))


def _unknown(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype is not torch.float64


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.device):
        return META
    return value.to(META) if isinstance(value, Tensor) and not value.is_meta else value


def _floats_to_meta(value: Any) -> Any:
    if isinstance(value, Tensor) and _unknown(value.dtype) and not value.is_meta:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
    return value


def _indices(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Boolean masks as the places that they mark, while these are known."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool and not index.is_meta:
            found.extend(index.nonzero().unbind(1))
        else:
            found.append(index)
    return found


class _Types(TorchFunctionMode):
    """`Tensor.type()` of a meta tensor names the CPU's type, which Megatron compares with; `tolist()` says ones."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.type and len(args) == 1 and not kwargs and args[0].is_meta:
            return _TYPES[args[0].dtype]
        if func is torch.tensor and isinstance(args[0], list) and any(tensor.is_meta for tensor in _tensors(args[0])):
            return _stack(args[0])
        if func is Tensor.tolist and args[0].is_meta:
            return np.ones(tuple(args[0].shape)).tolist()
        return func(*args, **(kwargs or {}))


def _stack(values: Any) -> Tensor:
    return torch.stack([_stack(value) if isinstance(value, list) else value for value in values])


_TYPES = {
    torch.float32: "torch.FloatTensor",
    torch.bfloat16: "torch.BFloat16Tensor",
    torch.float16: "torch.HalfTensor",
}


@contextmanager
def meta_world(rank: int, size: int) -> Iterator[MetaWorld]:
    """Be rank `rank` of `size`. No other process group may be there."""
    if dist.is_initialized():
        raise RuntimeError("a process group is there already; a simulated world needs the process for itself")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with _Types(), MetaWorld() as mode, _fake_groups(mode):
            yield mode
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _fake_groups(mode: MetaWorld) -> Iterator[None]:
    """Every new group is fake, also where gloo is asked for by name; `mode.groups` remembers all of them."""
    real: Callable[..., Any] = dist.new_group

    def new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is not None:
            mode.groups.setdefault(str(kwargs.get("group_desc")), []).append(tuple(ranks))
        return real(ranks, *args, **{**kwargs, "backend": "fake"})

    def one_by_one(operations: list[dist.P2POp]) -> list[Any]:
        return [each.op(each.tensor, each.peer, each.group, each.tag) for each in operations]

    def broadcast_objects(objects: list[Any], *_: Any, group: Any, group_src: int) -> None:
        if group.rank() != group_src:
            objects[0] = mode.said

    own = {"new_group": new_group, "batch_isend_irecv": one_by_one, "broadcast_object_list": broadcast_objects}
    kept = {name: getattr(dist, name) for name in own}
    vars(dist).update(own)
    try:
        yield
    finally:
        vars(dist).update(kept)

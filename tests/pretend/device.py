"""A second device, made of CPU memory, on which everything runs that would run on a GPU.

A tensor there is a `PretendTensor`: to torch it lives on the device "pretend"; what it holds is an ordinary tensor, with which each
operation is really computed. Two things are checked that a CPU never notices:

- operands on two devices. An operation that a GPU would refuse raises `MixedDevices`, here, on the line that made it.
- waiting. Whatever makes the host wait for a GPU is written down with the line that asked for it (`Waits`): values that are read,
  tensors that are copied to the CPU, or from it without `non_blocking`, shapes that depend on values.

Importing this module registers the device for the rest of the process; `megatron.py` beside it points megatron.core's CUDA at it.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME = "pretend"
ROOT = Path(__file__).resolve().parent.parent.parent
_LIBRARY_FOLDER = f"{ROOT / 'megatron_vp2o'}/"
_DEFERRED = f"{_LIBRARY_FOLDER}core/deferred.py"
"""Reads for others: whoever called it asked."""
aten = torch.ops.aten


class MixedDevices(RuntimeError):
    """An operation got tensors of two devices."""


@dataclass(frozen=True)
class Wait:
    """One time that the host waited: why, and which line of the library or of Megatron asked for it."""

    why: str
    line: str
    """File and function; no line number, which changes with every edit."""
    phase: str


@dataclass
class Waits:
    """What was written down since `counts` was cleared last."""

    counts: Counter[Wait] = field(default_factory=Counter)
    phase: str = ""
    """What the program is doing, set by who knows it."""

    def add(self, why: str) -> None:
        """Write down one wait of the line that is running."""
        self.counts[Wait(why, _asking_line(), self.phase)] += 1

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is written down inside belongs to this phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before


WAITS = Waits()


def _asking_line() -> str:
    """The innermost function of the library on the stack, and what it called of Megatron, if Megatron asked."""
    asked_by_megatron = ""
    frame = sys._getframe(2)
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_qualname
        if file.startswith(_LIBRARY_FOLDER) and file != _DEFERRED:
            return f"{file[len(str(ROOT)) + 1 :]}:{function}" + asked_by_megatron
        if not asked_by_megatron and "/megatron/core/" in file:
            asked_by_megatron = f" < megatron/core/{file.rpartition('/megatron/core/')[2]}:{function}"
        frame = frame.f_back  # type: ignore[assignment]
    return asked_by_megatron or "elsewhere"


# --- the tensor -------------------------------------------------------------------------------------------------------


class PretendTensor(torch.Tensor):
    """A tensor of the pretended device. `held` is the tensor with its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, PretendTensor):
            raise MixedDevices(f"a tensor on {DEVICE} is given the data of one on {value.device}")
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"a tensor on {DEVICE} has no array; .cpu() copies it")

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendTensor:
        return PretendTensor(self.held.clone()).requires_grad_(self.requires_grad)  # type: ignore[return-value]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"pretend {self.held!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = dict(kwargs or {})
        tensors: list[Tensor] = []
        _collect(args, tensors)
        _collect(tuple(kwargs.values()), tensors)
        _refuse_mixtures(func, tensors)
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(
                f"{func} changes a tensor's shape in place, which the pretended device cannot follow"
            )
        _count_waits(func, args, kwargs)
        to_cpu = _stays_on_cpu(kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
            kwargs.pop("pin_memory", None)
        out = func(*_held(args), **{name: _held(value) for name, value in kwargs.items()})
        given: dict[int, Tensor] = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, PretendTensor)}
        given.update((id(tensor), tensor) for tensor in tensors)
        return out if to_cpu else _made(out, given)


def _collect(value: Any, into: list[Tensor]) -> None:
    """The tensors among an operation's arguments, which are nested in lists at most."""
    for part in value:
        if isinstance(part, torch.Tensor):
            into.append(part)
        elif isinstance(part, (list, tuple)):
            _collect(part, into)


def _held(value: Any) -> Any:
    if isinstance(value, PretendTensor):
        return value.held
    if isinstance(value, (list, tuple)):
        return type(value)([_held(part) for part in value])
    return value


def _made(value: Any, given: dict[int, Tensor]) -> Any:
    """What an operation returns: tensors of the device, and where it returns an argument, that very one."""
    if isinstance(value, torch.Tensor):
        return given[id(value)] if id(value) in given else PretendTensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_made(part, given) for part in value])
    return value


# --- mixtures ---------------------------------------------------------------------------------------------------------

_BETWEEN_DEVICES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
_INDEXED_BY_CPU = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_NO_SCALARS = {aten.cat.default, aten.stack.default, aten.index_select.default, aten.gather.default}


def _refuse_mixtures(func: Any, tensors: list[Tensor]) -> None:
    foreign = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor)]
    if not foreign or func in _BETWEEN_DEVICES:
        return
    written = not isinstance(tensors[0], PretendTensor) and func._schema.is_mutable
    if not written and func in _INDEXED_BY_CPU:
        WAITS.add("an index on the CPU")
        return
    # A number in a tensor without dimensions may come from the CPU, but not be written to.
    if not written and func not in _NO_SCALARS and all(tensor.dim() == 0 for tensor in foreign):
        return
    described = ", ".join(f"{list(tensor.shape)} on {tensor.device.type}" for tensor in tensors)
    raise MixedDevices(f"{func} of tensors {described}, asked for by {_asking_line()}")


# --- waiting ----------------------------------------------------------------------------------------------------------

_READ = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
_CHECKED = {aten._linalg_eigh.default, aten._linalg_svd.default}
_SHAPED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}


def _stays_on_cpu(kwargs: dict[str, Any]) -> bool:
    """Whether the operation was asked for a tensor on the CPU."""
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def _count_waits(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if func in _READ:
        WAITS.add("a value is read")
    elif func in _CHECKED:
        WAITS.add(f"{func._opname}: whether it succeeded is asked")
    elif func in _SHAPED_BY_VALUES:
        WAITS.add(f"{func._opname}: a shape that depends on values")
    elif func in _INDEXED_BY_CPU and any(
        isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        WAITS.add("an index of truth values: a shape that depends on values")
    elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        WAITS.add("repeat_interleave without output_size: a shape that depends on values")
    elif func is aten._to_copy.default and _stays_on_cpu(kwargs):
        WAITS.add("a copy to the CPU")
    elif func in (aten.copy_.default, aten._foreach_copy_.default):
        (target, source), rest = (part[0] if isinstance(part, (list, tuple)) else part for part in args[:2]), args[2:]
        blocking = not (rest[0] if rest else kwargs.get("non_blocking", False))
        if not isinstance(target, PretendTensor):
            WAITS.add("a copy to the CPU")
        elif not isinstance(source, PretendTensor) and blocking:
            WAITS.add("a copy from the CPU without non_blocking")


# --- the device -------------------------------------------------------------------------------------------------------


class _Backend:
    """What torch asks of a device's module, as `torch.cuda` is one: one device, one queue, and everything in it is done."""

    @staticmethod
    def is_available() -> bool:
        return True

    is_initialized = is_available

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Random numbers come from the CPU's generator."""

    @staticmethod
    def current_stream(_: Any = None) -> Any:
        return _QUEUE

    @staticmethod
    def stream(_: Any) -> Any:
        return contextlib.nullcontext()

    @staticmethod
    def synchronize(_: Any = None) -> None:
        WAITS.add("the device is waited for")


class _Queue:
    device_type = NAME

    def synchronize(self) -> None:
        WAITS.add("the device is waited for")


_QUEUE = _Queue()


def _register() -> None:
    """Make torch know the device. Factories reach it through the dispatcher; what has an operand, through PretendTensor."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    for name in ("empty.memory_format", "empty_strided"):
        _LIBRARY.impl(name, _factory(getattr(aten, name.split(".")[0]), name), "PrivateUse1")
    _LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


def _factory(operation: Any, name: str) -> Any:
    overload = getattr(operation, name.partition(".")[2] or "default")

    def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
        return PretendTensor(overload(*args, device="cpu", **kwargs))

    return make


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What torch.tensor(values, device=...) ends in: torch asks no subclass there."""
    if isinstance(target, PretendTensor) and not isinstance(source, PretendTensor):
        if not non_blocking:
            WAITS.add("a copy from the CPU without non_blocking")
        target.held.copy_(source)
        return target
    raise NotImplementedError(f"a copy from {source.device} to {target.device} below the dispatch of subclasses")


_LIBRARY = torch.library.Library("aten", "IMPL")
_register()
DEVICE = torch.device(NAME, 0)

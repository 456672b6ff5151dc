"""Values that a device is still computing, and one transfer for all that the host wants to know of them.

A GPU works through a queue. Reading one number empties the queue first, and the GPU then idles until the host has filled it again.
So what a training step measures stays on the device as `Deferred` until the host must decide something, and `read` fetches
everything in one copy. On a CPU it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")
Together = Callable[[Sequence[tuple[Tensor, ...]]], list[tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Deferred(Generic[T]):
    """A value that follows from tensors, once the host has them.

    Example:
        >>> mean = Deferred((torch.tensor([1.0, 3.0]),), lambda on_host: on_host[0].mean().item())
        >>> (mean.read(), mean.then(lambda value: value + 1).read())
        (2.0, 3.0)
    """

    tensors: tuple[Tensor, ...]
    """What the device computes; numbers or truth values of any shape."""
    finish: Callable[[list[Tensor]], T]
    """Makes the value from the same tensors in host memory. It may be a collective: values are finished in the order in which
    they are given to `read`."""
    together: Together | None = None
    """The last step on the device, where that makes the host wait, as eigenvalue routines do: takes the `tensors` of all values
    with the same function that are read at once, and returns what is read instead."""

    def read(self) -> T:
        """The value. The host waits for the device."""
        value: T = read(self)[0]
        return value

    def then(self, change: Callable[[T], U]) -> Deferred[U]:
        """What `change` makes of the value, on the host."""
        return Deferred(self.tensors, lambda on_host: change(self.finish(on_host)), self.together)


def known(value: T) -> Deferred[T]:
    """A value that the host has already.

    Example:
        >>> known(3).read()
        3
    """
    return Deferred((), lambda _: value)


def merged(*values: Deferred[dict[str, float]]) -> Deferred[dict[str, float]]:
    """Several dictionaries as one; the last has the last word. None of them may have a `together`.

    Example:
        >>> merged(known({"a": 1.0}), known({"b": 2.0})).read()
        {'a': 1.0, 'b': 2.0}
    """
    assert all(value.together is None for value in values)

    def finish(on_host: list[Tensor]) -> dict[str, float]:
        left = iter(on_host)
        found: dict[str, float] = {}
        for value in values:
            found |= value.finish([next(left) for _ in value.tensors])
        return found

    return Deferred(tuple(tensor for value in values for tensor in value.tensors), finish)


def read(*values: Deferred[Any]) -> list[Any]:
    """All values, with one copy from the device (and one call of each `together`).

    Example:
        >>> read(known("a"), Deferred((torch.tensor(2),), lambda on_host: on_host[0].item()))
        ['a', 2]
    """
    tensors = [value.tensors for value in values]
    for together in dict.fromkeys(value.together for value in values if value.together is not None):
        places = [place for place, value in enumerate(values) if value.together == together]
        for place, changed in zip(places, together([tensors[place] for place in places]), strict=True):
            tensors[place] = changed
    left = iter(_on_host([tensor for parts in tensors for tensor in parts]))
    return [value.finish([next(left) for _ in parts]) for value, parts in zip(values, tensors, strict=True)]


def _on_host(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors in host memory, bit for bit, in one copy: as words of eight bytes."""
    # A simulated rank (planning/simulate.py) has no values: whatever it reads is 1.
    tensors = [torch.ones(t.shape, dtype=torch.float64) if t.is_meta else t for t in tensors]
    away = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    if not away:
        return tensors
    words = torch.cat([_wide(tensor).reshape(-1).view(torch.int64) for tensor in away]).cpu()
    parts = iter(words.split([tensor.numel() for tensor in away]))
    return [
        tensor
        if tensor.device.type == "cpu"
        else next(parts).view(_wide_type(tensor)).to(tensor.dtype).view(tensor.shape)
        for tensor in tensors
    ]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_wide_type(tensor))


def _wide_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.is_floating_point() else torch.int64

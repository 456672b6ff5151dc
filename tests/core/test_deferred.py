"""Values read together: what comes back is what each alone would be, and the device's last step is taken once."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from megatron_vp2o.core import deferred
from megatron_vp2o.core.deferred import Deferred, known, merged, read

KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool]


def drawn(dice: random.Random) -> Tensor:
    shape = [dice.randint(0, 3) for _ in range(dice.randint(0, 3))]
    kind = dice.choice(KINDS)
    if kind.is_floating_point:
        values = torch.randn(shape, dtype=torch.float64).to(kind)
        return torch.where(
            torch.rand(shape) < 0.2, torch.tensor(float(dice.choice(["nan", "inf", "-0.0"]))), values
        ).to(kind)
    return torch.randint(-(2**62), 2**62, shape).to(kind)


def bits(tensor: Tensor) -> Any:
    return tensor.dtype, list(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_tensors_come_back_bit_for_bit(monkeypatch: Any) -> None:
    """Words of eight bytes hold every value of every kind."""
    for seed in range(200):
        dice = random.Random(seed)
        torch.manual_seed(seed)
        tensors = [drawn(dice) for _ in range(dice.randint(1, 5))]
        tensors = [t.transpose(0, -1) if t.dim() > 1 and dice.random() < 0.5 else t for t in tensors]
        for tensor in tensors:
            words = deferred._wide(tensor).reshape(-1).view(torch.int64)
            back = words.view(deferred._wide_type(tensor)).to(tensor.dtype).view(tensor.shape)
            assert bits(back) == bits(tensor), (seed, tensor)


def test_each_value_gets_its_own() -> None:
    calls: list[int] = []

    def together(steps: Any) -> list[tuple[Tensor, ...]]:
        calls.append(len(steps))
        return [(2 * first + second,) for first, second in steps]

    dice = random.Random(3)
    for _ in range(50):
        values: list[Deferred[Any]] = []
        expected: list[Any] = []
        for number in range(dice.randint(1, 6)):
            kind = dice.choice(["known", "plain", "together", "merged"])
            if kind == "known":
                values.append(known(number))
                expected.append(number)
            elif kind == "plain":
                values.append(
                    Deferred((torch.tensor(number),), lambda on_host: on_host[0].item()).then(lambda x: x + 1)
                )
                expected.append(number + 1)
            elif kind == "together":
                pair = torch.tensor(number), torch.tensor(1)
                values.append(Deferred(pair, lambda on_host: on_host[0].item(), together))
                expected.append(2 * number + 1)
            else:
                one = Deferred((torch.tensor(float(number)),), lambda on_host: {"a": on_host[0].item(), "b": 0.0})
                values.append(merged(one, known({"b": 1.0})))
                expected.append({"a": float(number), "b": 1.0})
        calls.clear()
        assert read(*values) == expected
        assert len(calls) <= 1 and sum(calls) == sum(value.together is not None for value in values)

"""The pretended device itself: what it computes, what it refuses, what it writes down."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.distributed import ROOT

CASES = {
    "computes": """
x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
w = torch.nn.Parameter(x.t().to(DEVICE))
y = (x.to(DEVICE) @ w).relu().sum()
y.backward()
plain = x.t().clone().requires_grad_()
(x @ plain).relu().sum().backward()
assert w.device == DEVICE and w.grad.device == DEVICE and torch.equal(w.grad.cpu(), plain.grad)
view = w.detach()[1:]
view.fill_(7.0)
assert float(w.detach()[2, 0]) == 7.0  # a view has the same memory
assert torch.equal(copy.deepcopy(view).cpu(), view.cpu())
""",
    "refuses": """
here, there = torch.ones(3), torch.ones(3, device=DEVICE)
for mixed in (
    lambda: here + there,
    lambda: there.mul_(here),
    lambda: torch.cat([there, here]),
    lambda: here.add_(there[0]),
    lambda: torch.where(there > 0, here, there),
    lambda: torch.nn.functional.linear(there[None], here[None]),
    lambda: setattr(there, "data", here),
):
    try:
        mixed()
    except (MixedDevices, RuntimeError) as error:
        assert isinstance(error, MixedDevices), error
    else:
        raise AssertionError("no error")
assert (there + torch.tensor(1.0)).device == DEVICE  # as a GPU: a number may come from the CPU
try:
    there.numpy()
except TypeError:
    pass
else:
    raise AssertionError("an array of a device's memory")
""",
    "writes_waits_down": """
x = torch.arange(6.0).to(DEVICE, non_blocking=True)
x.add_(1).mul_(2).cumsum(0)
assert not WAITS.counts, WAITS.counts
for waits, action in (
    (1, lambda: x.sum().item()),
    (1, lambda: float(x[0])),
    (1, lambda: x.cpu()),
    (1, lambda: x.tolist()),
    (1, lambda: torch.tensor([1.0], device=DEVICE)),
    (1, lambda: torch.ones(2).to(DEVICE)),
    (1, lambda: x.nonzero()),
    (1, lambda: x[x > 3]),
    (1, lambda: torch.masked_select(x, x > 3)),
    (1, lambda: bool((x > 3).any())),
    (1, lambda: torch.ones(6).copy_(x)),
    (0, lambda: x.clone().sort().values[:2]),
    (0, lambda: torch.zeros(4, device=DEVICE).index_copy_(0, torch.zeros(1, dtype=torch.long, device=DEVICE), x[:1])),
):
    WAITS.counts.clear()
    action()
    assert sum(WAITS.counts.values()) == waits, (action.__code__.co_firstlineno, WAITS.counts)
""",
}


@pytest.mark.parametrize("case", CASES)
def test_device(case: str) -> None:
    head = "import copy, torch\nfrom tests.pretend.device import DEVICE, MixedDevices, WAITS\n"
    done = subprocess.run([sys.executable, "-c", head + CASES[case]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

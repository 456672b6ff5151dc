"""The routed experts' forward pass on the CPU, by rows: one expert at a time, all experts through an operation together, and
torch's grouped product, which has to stack the experts' weights first. `python -m tools.bench experts [--threads 1]`.

Shape legend: T rows, E experts, D hidden size, F expert intermediate size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

E, D, F = 16, 128, 64  # the tiny model's
ROWS = (256, 512, 1024, 2048, 4096, 28672)
ROUNDS, REPEATS = 7, 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints median milliseconds of a call; the variants take turns."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench experts", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    import torch

    from megatron_vp2o.megatron.platform.cpu import enable_cpu

    enable_cpu()
    from megatron_vp2o.megatron.model import experts

    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(2 * F, D, generator=generator) for _ in range(E)]
    weights += [torch.randn(D, F, generator=generator) for _ in range(E)]

    def ours(in_cache: int, *inputs: Any) -> None:
        experts._IN_CACHE = in_cache
        experts._swiglu_experts(inputs[0], inputs[1], inputs[2], weights)

    def grouped(x_TD: torch.Tensor, probs_T: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        inner_T2F = torch.nn.functional.grouped_mm(x_TD, torch.stack(weights[:E]).transpose(1, 2), offs=ends_E)
        gate_TF, up_TF = inner_T2F.chunk(2, dim=-1)
        act_TF = torch.nn.functional.silu(gate_TF).mul_(up_TF).mul_(probs_T[:, None])
        return torch.nn.functional.grouped_mm(act_TF, torch.stack(weights[E:]).transpose(1, 2), offs=ends_E)

    print(f"milliseconds a call, {options.threads} threads")
    print(f"{'rows':>6} {'one at a time':>14} {'together':>9} {'grouped':>8}")
    for rows in ROWS:
        x_TD, probs_T = torch.randn(rows, D, generator=generator), torch.rand(rows, generator=generator)
        sizes_E = torch.randint(E, (rows,), generator=generator).bincount(minlength=E)
        sizes, ends_E = sizes_E.tolist(), sizes_E.cumsum(0).to(torch.int32)

        calls: list[Callable[[], object]] = [
            partial(ours, 0, x_TD, probs_T, sizes),
            partial(ours, 2**62, x_TD, probs_T, sizes),
            partial(grouped, x_TD, probs_T, ends_E),
        ]
        with torch.no_grad():
            found = [[_milliseconds(call) for call in calls] for _ in range(ROUNDS)]
        one, together, group = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{rows:>6} {one:>14.2f} {together:>9.2f} {group:>8.2f}", flush=True)
    return 0


def _milliseconds(call: Callable[[], object]) -> float:
    call()
    start = time.perf_counter()
    for _ in range(REPEATS):
        call()
    return (time.perf_counter() - start) / REPEATS * 1000

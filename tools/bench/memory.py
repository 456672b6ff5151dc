"""Peak memory of training on the CPU, measured with torch's profiler, beside what the plan says (docs/planning.md).

`--long` trains on one sequence of 16,384 tokens over 151,936 ids, log-probabilities in chunks and whole, in 24 GiB.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_vp2o.megatron.platform.cpu import enable_cpu

if not torch.cuda.is_available():
    enable_cpu()

from megatron_vp2o.config.compose import compose
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.platform import world
from megatron_vp2o.planning.hardware import GIB, Assumptions
from megatron_vp2o.planning.memory import memory, static_memory
from megatron_vp2o.planning.workload import padded_vocabulary, workload
from megatron_vp2o.rl.objectives import next_token
from megatron_vp2o.rl.types import TrainBatch

MIB = 2**20
IDS = 100
MEDIUM = [
    *("model.hidden_size=512", "model.num_layers=4", "model.num_attention_heads=8", "model.num_query_groups=4"),
    *("model.kv_channels=64", "model.moe_ffn_hidden_size=512", "model.num_moe_experts=32", "model.vocab_size=16384"),
]
CASES = {
    "tiny": (16, 64, []),
    "tiny, recomputed": (16, 64, ["model.recompute=true"]),
    "tiny, 64 experts": (16, 64, ["model.num_moe_experts=64"]),
    "tiny, 40,000 ids": (16, 64, ["model.vocab_size=40000"]),
    "tiny, 40,000 ids in chunks": (16, 64, ["model.vocab_size=40000", "model.logits_chunk_mib=20"]),
    "120M": (4, 512, MEDIUM),
    "120M, recomputed": (4, 512, [*MEDIUM, "model.recompute=true"]),
    "120M, logits in chunks": (8, 512, [*MEDIUM, "model.logits_chunk_mib=32"]),
}
LONG = (1, 16384, ["model.num_layers=2", "model.vocab_size=151936"])


def peak_of(call: Callable[[], object]) -> int:
    """Most bytes that torch had allocated at a time during the call, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    assert found.profiler is not None and found.profiler.kineto_results is not None
    changes = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak


class Case:
    """A model on one CPU process, and a batch of random tokens."""

    def __init__(self, rows: int, length: int, overrides: list[str]) -> None:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29534"}.items():
            os.environ.setdefault(name, value)
        sizes = [f"algorithm.{name}={rows}" for name in ("micro_batch_size", "global_batch_size")]
        lengths = [f"{name}={length}" for name in ("algorithm.sequence_length", "model.max_sequence_length")]
        self.config = compose("train", ["algorithm=supervised", *sizes, *lengths, *overrides])
        groups = world.start(self.config.parallel, self.config.seed)
        self.ids = padded_vocabulary(self.config)
        self.policy = MegatronPolicy(self.config, groups, vocab_size=self.ids, optimizer_steps=100)
        tokens = torch.randint(IDS, (rows, length), generator=torch.Generator().manual_seed(0))
        mask = torch.ones(rows, length, dtype=torch.bool)
        mask[:, 0] = False  # nothing predicts it
        self.batch = TrainBatch(tokens, torch.full((rows,), length), mask)

    def measured_and_planned(self) -> tuple[int, int]:
        """Bytes of weights, gradients, optimizer state and the most that forward and backward pass add to them."""
        self.train()  # what the first pass allocates and keeps is part of neither
        peak = peak_of(self.train)
        assumed = Assumptions(imbalance=1.0, reserve_gib=0.0, fragmentation=0.0)
        plan = memory(self.config, 1, self.ids, workload(self.config, 1, assumed), assumed, grouped=False)
        stays = sum(static_memory(self.config, 1, self.ids).values())
        return stays + peak, stays + sum(plan.training.values())

    def train(self) -> float:
        """Forward and backward pass; the loss a token."""
        return self.policy.forward_backward(self.batch, next_token, len(self.batch.tokens_NS))["loss"]


def main(argv: list[str]) -> int:
    """Print a line for each case; each runs in a process of its own."""
    parser = argparse.ArgumentParser(prog="tools.bench memory", description=__doc__)
    parser.add_argument("--long", action="store_true", help="the long sequence instead (minutes)")
    parser.add_argument("--case", help="one of: " + "; ".join(CASES))
    parser.add_argument("--chunk-mib", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.chunk_mib is not None:
        return _train_long(given.chunk_mib)
    if given.case:
        measured, planned = Case(*CASES[given.case]).measured_and_planned()
        print(
            f"{given.case:28} measured {measured / MIB:9,.1f} MiB, planned {planned / MIB:9,.1f}: "
            f"{100 * (planned / measured - 1):+.1f} %",
            flush=True,
        )
        return 0
    own = [sys.executable, "-m", "tools.bench", "memory"]
    if given.long:
        return sum(subprocess.run([*own, "--chunk-mib", size]).returncode for size in ("256", "1e5"))
    return sum(subprocess.run([*own, "--case", case]).returncode for case in CASES)


def _train_long(chunk_mib: float) -> int:
    """Three steps in at most 24 GiB."""
    resource.setrlimit(resource.RLIMIT_DATA, (24 * GIB, 24 * GIB))
    rows, length, overrides = LONG
    case = Case(rows, length, [*overrides, f"model.logits_chunk_mib={chunk_mib}"])
    assumed = Assumptions(imbalance=1.0, reserve_gib=0.0, fragmentation=0.0)
    plan = memory(case.config, 1, case.ids, workload(case.config, 1, assumed), assumed, grouped=False)
    planned = (sum(static_memory(case.config, 1, case.ids).values()) + sum(plan.training.values())) / GIB
    head = f"{length:,} tokens, {case.ids:,} ids, at most {chunk_mib:,.0f} MiB of logits at a time: planned {planned:.1f} GiB"
    for step in range(1, 4):
        begin = time.monotonic()
        try:
            loss = case.train()
        except RuntimeError as error:
            print(f"{head}; out of memory in forward and backward pass: {str(error).splitlines()[0][:160]}", flush=True)
            return 0
        case.policy.optimizer_step(step)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{head}; step {step}: loss {loss:.4f}, {time.monotonic() - begin:.0f} s, peak of the process {peak:.1f} GiB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What gathering keys and values costs under context parallelism: its seconds beside those of a forward and backward pass, in turn.

    torchrun --nproc-per-node 2 -m tools.bench context

All processes are context-parallel ranks of one sequence. The gathers are timed alone, with the shapes of the layers, one after the
other: beside computing they may take less.

Shape legend: t positions of this rank, g key/value heads, d head width.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_vp2o.megatron.platform.cpu import enable_cpu

if not torch.cuda.is_available():
    enable_cpu()

from megatron_vp2o.config.schema import ModelConfig, ParallelConfig, TrainConfig
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.platform import world
from megatron_vp2o.parallel.context import deal_one
from megatron_vp2o.rl.objectives import next_token
from megatron_vp2o.rl.types import TrainBatch

VOCAB = 1024


def main(argv: list[str]) -> int:
    """Print medians and the share. Run by torchrun; one process has nothing to gather."""
    parser = argparse.ArgumentParser(prog="tools.bench context", description=__doc__)
    parser.add_argument("--length", type=int, default=2048, help="tokens of the sequence")
    parser.add_argument("--pairs", type=int, default=5, help="counted, after one pair of warm-up")
    given = parser.parse_args(argv)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        parser.error("start several processes: torchrun --nproc-per-node 2 -m tools.bench context")
    torch.set_num_threads(1)
    config = TrainConfig(
        model=ModelConfig(max_sequence_length=given.length, vocab_size=VOCAB),
        parallel=ParallelConfig(context_parallel=ranks),
    )
    groups = world.start(config.parallel, config.seed)
    policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=100)
    tokens = torch.randint(VOCAB, (1, given.length), generator=torch.Generator().manual_seed(0))
    batch = TrainBatch(tokens, torch.tensor([given.length]), torch.ones(1, given.length, dtype=torch.bool))
    model = config.model
    both_t1gd = torch.randn(
        given.length // ranks, 1, model.num_query_groups, 2 * model.kv_channels, device=groups.device
    ).requires_grad_()
    dealt = deal_one(given.length, ranks, groups.device)

    def gathers() -> None:
        for _ in range(model.num_layers):
            dealt.whole(both_t1gd, groups.cp).sum().backward()

    def train() -> None:
        policy.forward_backward(batch, next_token, 1)

    def seconds(call: Callable[[], None]) -> float:
        dist.barrier()
        begin = time.perf_counter()
        call()
        if groups.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter() - begin

    times = [(seconds(train), seconds(gathers)) for _ in range(given.pairs + 1)][1:]
    if groups.rank == 0:
        whole, gathered = (statistics.median(column) for column in zip(*times, strict=True))
        share = statistics.median(b / a for a, b in times)
        print(
            f"{ranks} ranks, {given.length} tokens, {model.num_layers} layers: forward and backward {whole * 1e3:.1f} ms, of it "
            f"gathering keys and values {gathered * 1e3:.1f} ms: {100 * share:.1f} %",
            flush=True,
        )
    world.stop()
    return 0

"""What the Stein transform costs: each phase of the transform, and a training step with it over one without, in turns.

`--layer 33b` takes one MoE layer of a 33B/4B model (meant for a GPU; `--shrink 8` makes all of it smaller, to see that it
works). `--ranks N` starts N processes, the experts and their gradients spread over them, and compares the bytes that are
sent with the exchange's plan.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest import mock

# Under the transform's methods that do them; `exchange` is the mixing of gradients, wherever they lie.
PHASES = {
    "collect": "_collect_statistics",
    "prototypes": "prototypes.update",
    "field": "_compute_field",
    "exchange": "gradients.mix",
    "repulsion": "_repel",
}
GOALS = {"tiny": 8.0, "33b": 3.0}  # per cent of a step
LAYER_33B = {
    "num_layers": 1,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_query_groups": 4,
    "kv_channels": 128,
    "num_moe_experts": 128,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 768,
}


def main(argv: list[str]) -> int:
    """Measure and print; rank 0 speaks."""
    arguments = parse(argv)
    if arguments.ranks > 1 and "RANK" not in os.environ:
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
        return subprocess.run([sys.executable, "-m", *command, "-m", "tools.bench.stein", *argv]).returncode
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as megatron_vp2o.train does
    measure(arguments)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; those of other benchmarks are passed over."""
    parser = argparse.ArgumentParser(prog="tools.bench stein", description=__doc__)
    parser.add_argument("--layer", choices=GOALS, default="tiny", help="which shapes (default tiny: the recipe's)")
    parser.add_argument("--pairs", type=int, default=12, help="steps with the transform, and as many without")
    parser.add_argument("--warmup", type=int, default=2, help="pairs before those that count")
    parser.add_argument("--shrink", type=int, default=1, help="divide the widths, experts and rows of --layer 33b")
    parser.add_argument("--rows", type=int, help="sequences of a step, all ranks together")
    parser.add_argument("--chunk-mib", type=float, default=256.0, help="bound of the exchange's workspace")
    parser.add_argument("--ranks", type=int, default=1, help="processes; all of them are expert-parallel")
    parser.add_argument("--threads", type=int, help="CPU threads of a process (default: the cores, divided)")
    parser.add_argument("--distributed-optimizer", action="store_true", help="gradients cut over all ranks")
    return parser.parse_known_args(argv)[0]


def settings(arguments: argparse.Namespace) -> tuple[Any, int, int, int]:
    """(run configuration, rows of a step, rows of a micro-batch, width of a row)."""
    from megatron_vp2o.config.compose import compose

    overrides = [f"algorithm.stein.chunk_mib={arguments.chunk_mib}", "init_from=null"]
    overrides += [f"parallel.expert_parallel={arguments.ranks}"]
    overrides += [f"parallel.distributed_optimizer={str(arguments.distributed_optimizer).lower()}"]
    rows, micro, width = 256, 256, 26  # one of the recipe's minibatches: prompts * rollouts / minibatches
    if arguments.layer == "33b":
        import torch

        shape = dict(LAYER_33B)
        for key in ("hidden_size", "num_attention_heads", "num_query_groups", "num_moe_experts", "moe_ffn_hidden_size"):
            shape[key] = max(4 if "num" in key else 32, shape[key] // arguments.shrink)
        rows, micro, width = max(8, 64 // arguments.shrink), 8, max(64, 1024 // arguments.shrink)
        overrides += [f"model.{key}={value}" for key, value in shape.items()]
        overrides += [f"model.max_sequence_length={width}"]
        overrides += [f"model.precision={'bf16' if torch.cuda.is_available() else 'fp32'}"]
    return compose("countdown_tiny_vp2o", overrides), arguments.rows or rows, micro, width


def measure(arguments: argparse.Namespace) -> None:
    """Train in turns with and without the transform."""
    from megatron_vp2o.megatron.platform.cpu import enable_cpu

    enable_cpu()
    import torch
    import torch.distributed as dist

    from megatron_vp2o.megatron.learner.policy import MegatronPolicy
    from megatron_vp2o.megatron.platform import world
    from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes
    from megatron_vp2o.megatron.stein.transform import SteinTransform
    from megatron_vp2o.rl.objectives import next_token
    from megatron_vp2o.rl.types import TrainBatch

    config, rows, micro, width = settings(arguments)
    world.set_threads(arguments.threads)
    with world.joined(config.parallel, config.seed) as groups:
        vocab = 64
        policy = MegatronPolicy(config, groups, vocab_size=vocab, optimizer_steps=10**6)
        transform = SteinTransform(
            ExpertPrototypes(policy.ddp, config.algorithm.stein, groups), optimizer=policy.optimizer
        )
        observed = [layer.statistics for layer in transform.prototypes.layers]
        generator = torch.Generator().manual_seed(groups.dp_rank)
        share = max(1, rows // groups.dp_size)
        tokens_NS = torch.randint(vocab, (share, width), generator=generator)
        mask_NS = torch.ones(share, width, dtype=torch.bool)
        mask_NS[:, : width // 2] = False
        batch = TrainBatch(tokens_NS, torch.full((share,), width), mask_NS, temperature=1.0)
        now = clock(torch)
        phases: dict[str, list[float]] = defaultdict(list)

        def step(with_transform: bool) -> tuple[float, float]:
            for layer, statistics in zip(transform.prototypes.layers, observed, strict=True):
                layer.statistics = statistics if with_transform else None
            begin = now()
            policy.forward_backward(batch, next_token, micro)
            before = now()
            if with_transform:
                transform.apply()
            after = now()
            policy.optimizer_step(1)
            return now() - begin, after - before

        for _ in range(arguments.warmup):
            step(True), step(False)
        time_phases(transform, phases, now)
        times = [(step(True), step(False)) for _ in range(arguments.pairs)]
        planned, sent = transform.gradients.exchange.bytes_sent, count_bytes(dist, lambda: step(True))
        if groups.rank == 0:
            print(
                f"{arguments.layer}: {describe(config.model)}; {share * groups.dp_size} rows of {width} tokens, ",
                end="",
            )
            print(f"{groups.world_size} ranks on {groups.device.type}, {torch.get_num_threads()} threads each")
            report(times, phases, GOALS[arguments.layer] if arguments.shrink == 1 else None)
            report_exchange(transform.gradients.exchange, planned, sent, arguments.chunk_mib)


def describe(model: Any) -> str:
    """A model's shape in one line."""
    return (
        f"{model.num_layers} layers, E={model.num_moe_experts} top-{model.moe_router_topk}, D={model.hidden_size}, "
        f"F={model.moe_ffn_hidden_size}, {model.precision.value}"
    )


def clock(torch: Any) -> Callable[[], float]:
    """Seconds, when everything that was asked of the device is done."""

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    return now


def time_phases(transform: Any, phases: dict[str, list[float]], now: Callable[[], float]) -> None:
    """Put a stopwatch around each of the transform's phases."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = now()
            result = function(*args, **kwargs)
            phases[name].append(now() - begin)
            return result

        return run

    for name, path in PHASES.items():
        *owners, method = path.split(".")
        owner = getattr(transform, owners[0]) if owners else transform
        setattr(owner, method, timed(name, getattr(owner, method)))


def count_bytes(dist: Any, run: Callable[[], Any]) -> int:
    """Bytes that this rank gives to other ranks in the exchange's collectives while `run` runs."""
    from megatron_vp2o.parallel import exchange

    real, total = dist.all_to_all_single, 0

    def counted(output: Any, given: Any, receives: list[int], sends: list[int], group: Any) -> Any:
        nonlocal total
        total += (sum(sends) - sends[group.rank()]) * given.element_size()
        return real(output, given, receives, sends, group=group)

    with mock.patch.object(exchange, "dist", mock.Mock(wraps=dist, all_to_all_single=counted)):
        run()
    return total


Times = list[tuple[tuple[float, float], tuple[float, float]]]
"""A pair of (step, transform) seconds: with the transform, and without (transform: 0)."""


def report(times: Times, phases: dict[str, list[float]], goal: float | None) -> None:
    """Medians; the ratio is the median over pairs, so that a machine that grows slower does not show in it."""

    def milliseconds(name: str, values: list[float]) -> None:
        print(f"  {name:18}{statistics.median(values) * 1e3:12,.2f} ms")

    milliseconds("step without", [without[0] for _, without in times])
    milliseconds("step with", [with_[0] for with_, _ in times])
    milliseconds("transform", [with_[1] for with_, _ in times])
    for name in PHASES:
        if phases.get(name):
            milliseconds(f"  {name}", phases[name])
    milliseconds("statistics", [with_[0] - with_[1] - without[0] for with_, without in times])
    more = statistics.median(with_[0] / without[0] - 1 for with_, without in times)
    transform = statistics.median(with_[1] / without[0] for with_, without in times)
    aim = "shapes made smaller, no goal" if goal is None else f"goal: {goal:.0f} %"
    print(f"  overhead          {100 * more:12.1f} % of a step ({aim}); the transform alone {100 * transform:.1f} %")


def report_exchange(exchange: Any, planned: int, sent: int, chunk_mib: float) -> None:
    """What travels, and in how much memory."""
    print(f"  sent by rank 0    {sent:12,} bytes (planned {planned:,})")
    print(
        f"  workspace         {exchange.workspace_bytes:12,} bytes (bound {int(chunk_mib * 2**20):,}), "
        f"{len(exchange.chunks)} rounds"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

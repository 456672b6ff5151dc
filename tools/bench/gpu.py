"""Measurements on a CUDA device at the layer shapes of large models: `python -m tools.bench gpu WHAT`.

Each prints lines `figure NAME VALUE UNIT`, which `tools.gpu_check` collects. `--shrink 16` makes shapes small enough to see
on a CPU that everything runs; the figures then mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest import mock

SHAPES: dict[str, dict[str, int]] = {
    "qwen3_30b_a3b": {"num_moe_experts": 128, "moe_router_topk": 8, "moe_ffn_hidden_size": 768},
    "vp2o_33b_a4b": {"num_moe_experts": 128, "moe_router_topk": 10, "moe_ffn_hidden_size": 832},
}
COMMON = {"hidden_size": 2048, "num_attention_heads": 32, "num_query_groups": 4, "kv_channels": 128}
PEAK_TFLOPS = 989.0
"""Dense bfloat16 peak of an H100 or H200 by its data sheet; model FLOPs utilisation is stated against it."""


def main(argv: list[str]) -> int:
    """Run one measurement."""
    parser = argparse.ArgumentParser(prog="tools.bench gpu", description=__doc__)
    parser.add_argument(
        "what", choices=("ceilings", "layer", "experts", "decode", "logprobs"), nargs="?", default="ceilings"
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3_30b_a3b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", default="64,128,256", help="for `experts`: comma-separated counts")
    parser.add_argument("--rows", type=int, default=16, help="sequences of a step")
    parser.add_argument("--width", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--pairs", type=int, default=5, help="steps with, and as many without")
    parser.add_argument("--shrink", type=int, default=1, help="divide all widths and counts")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--implementation", choices=("auto", "torch", "local", "transformer_engine"), default="auto")
    arguments = parser.parse_known_args(argv)[0]
    from megatron_vp2o.megatron.platform.cpu import enable_cpu

    enable_cpu()
    {"ceilings": ceilings, "layer": layer, "experts": experts, "decode": decode, "logprobs": logprobs}[arguments.what](
        arguments
    )
    return 0


def figure(name: str, value: float, unit: str) -> None:
    """One result."""
    print(f"figure {name} {value:.6g} {unit}", flush=True)


def ceilings(arguments: argparse.Namespace) -> None:
    """What the device reaches with torch's own kernels: a large matrix product and a large copy."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 // arguments.shrink
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _median(lambda: left @ right, 10)
    figure("ceiling/matmul", 2 * size**3 / seconds / 1e12, "TFLOP/s")
    source = torch.randn(2**30 // 4 // arguments.shrink, device=device)
    target = torch.empty_like(source)
    seconds = _median(lambda: target.copy_(source), 10)
    figure("ceiling/copy", 2 * source.nbytes / seconds / 1e9, "GB/s")


def _median(run: Callable[[], Any], times: int) -> float:
    """Seconds of one call, the device's queue emptied before and after."""
    for _ in range(3):
        run()
    now = _clock()
    values = []
    for _ in range(times):
        begin = now()
        run()
        values.append(now() - begin)
    return statistics.median(values)


def _clock() -> Callable[[], float]:
    import torch

    from tools.bench.stein import clock

    return clock(torch)


def _config(arguments: argparse.Namespace, **model: int) -> Any:
    from megatron_vp2o.config.compose import compose

    shape: dict[str, int] = {**COMMON, **SHAPES[arguments.shape], "num_layers": arguments.layers, **model}
    for key in ("hidden_size", "num_attention_heads", "num_query_groups", "num_moe_experts", "moe_ffn_hidden_size"):
        shape[key] = max(4 if "num" in key else 32, shape[key] // arguments.shrink)
    shape["moe_router_topk"] = min(shape["moe_router_topk"], shape["num_moe_experts"] // 2)
    overrides = [f"model.{key}={value}" for key, value in shape.items()]
    overrides += [f"model.max_sequence_length={arguments.width}", f"model.precision={arguments.precision}"]
    overrides.append(f"model.implementation={arguments.implementation}")
    config = compose("countdown_tiny_vp2o", ["init_from=null", *overrides])
    config.optimizer.lr = 1e-6  # steps stay within the trust region: what is timed is the check
    return config


class _Bench:
    """A policy with its Stein transform and trust region on random tokens, from random weights of Megatron's own drawing."""

    def __init__(self, arguments: argparse.Namespace, **model: int) -> None:
        import torch

        from megatron_vp2o.config.schema import ControlMode, TrustRegionConfig
        from megatron_vp2o.megatron.control.trust_region import TrustRegion
        from megatron_vp2o.megatron.learner.policy import MegatronPolicy
        from megatron_vp2o.megatron.platform import world
        from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes
        from megatron_vp2o.megatron.stein.transform import SteinTransform
        from megatron_vp2o.rl.objectives import next_token
        from megatron_vp2o.rl.types import TrainBatch

        self.config = _config(arguments, **model)
        world.set_threads(None)
        self.groups = world.start(self.config.parallel, self.config.seed)
        with mock.patch("megatron_vp2o.megatron.model.build.initialise"):  # drawn on the CPU, which takes long
            self.policy = MegatronPolicy(self.config, self.groups, vocab_size=512, optimizer_steps=10**6)
        self.transform = SteinTransform(
            ExpertPrototypes(self.policy.ddp, self.config.algorithm.stein, self.groups), optimizer=self.policy.optimizer
        )
        self.region = TrustRegion(
            self.policy,
            self.transform.prototypes,
            TrustRegionConfig(mode=ControlMode.enforce, delta=1.9),
            self.transform,
        )
        self.region.set_anchor()
        self.losses = [layer.specialization for layer in self.transform.prototypes.layers]
        self.observed = [layer.statistics for layer in self.transform.prototypes.layers]
        self.watcher = self.policy.watcher
        generator = torch.Generator().manual_seed(0)
        tokens_NS = torch.randint(512, (arguments.rows, arguments.width), generator=generator)
        mask_NS = torch.ones(tokens_NS.shape, dtype=torch.bool)
        mask_NS[:, : arguments.width // 4] = False
        lengths_N = torch.full((arguments.rows,), arguments.width)
        self.batch = TrainBatch(tokens_NS, lengths_N, mask_NS, temperature=1.0)
        self.next_token, self.micro = next_token, max(1, min(4, arguments.rows))
        self.now = _clock()

    def step(self, transform: bool, region: bool, losses: bool = False) -> tuple[float, float, float]:
        """Seconds of (forward and backward, transform, optimizer and check); `losses`: with the specialisation losses."""
        for layer_, attached in zip(self.transform.prototypes.layers, self.losses, strict=True):
            layer_.specialization = attached if losses else type(attached)()
        for layer_, statistics_ in zip(self.transform.prototypes.layers, self.observed, strict=True):
            layer_.statistics = statistics_ if transform else None
        self.policy.watcher = self.watcher if region else None
        begin = self.now()
        if region:
            self.region.begin(self.batch)
        measured = self.policy.accumulate_gradients(self.batch, self.next_token, self.micro)
        trained = self.now()
        if transform:
            self.transform.apply()
        transformed = self.now()
        stats = self.region.step(measured) if region else self.policy.optimizer_step(int(measured.read()["tokens"]))
        assert not stats.skipped
        return trained - begin, transformed - trained, self.now() - transformed

    def phases(self) -> dict[str, list[float]]:
        """From now on, seconds of each phase of the transform gather here."""
        from tools.bench.stein import time_phases

        seconds: dict[str, list[float]] = defaultdict(list)
        time_phases(self.transform, seconds, self.now)
        return seconds


def layer(arguments: argparse.Namespace) -> None:
    """Training steps of a few layers: without the Stein transform, with it, and under the trust region, in turns."""
    import torch

    from megatron_vp2o.megatron.platform import world
    from megatron_vp2o.planning.compute import training_flops

    bench = _Bench(arguments)
    try:
        for _ in range(2):
            bench.step(False, False), bench.step(True, False), bench.step(True, True), bench.step(True, True, True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        phases = bench.phases()
        triples = [
            (
                sum(bench.step(False, False)),
                bench.step(True, False),
                bench.step(True, True),
                sum(bench.step(True, True, True)),
            )
            for _ in range(arguments.pairs)
        ]
        kind = "" if arguments.implementation == "auto" else f"_{arguments.implementation}"
        name = f"layer/{arguments.shape}{kind}"
        plain = statistics.median(t[0] for t in triples)
        tokens = arguments.rows * arguments.width
        figure(f"{name}/step_plain", plain * 1e3, "ms")
        figure(f"{name}/step_stein", statistics.median(sum(t[1]) for t in triples) * 1e3, "ms")
        figure(f"{name}/step_trust_region", statistics.median(sum(t[2]) for t in triples) * 1e3, "ms")
        figure(f"{name}/forward_backward", statistics.median(t[1][0] for t in triples) * 1e3, "ms")
        figure(f"{name}/hook", statistics.median(t[1][1] for t in triples) * 1e3, "ms")
        figure(f"{name}/optimizer", statistics.median(t[1][2] for t in triples) * 1e3, "ms")
        figure(f"{name}/optimizer_and_check", statistics.median(t[2][2] for t in triples) * 1e3, "ms")
        figure(f"{name}/overhead_stein", 100 * statistics.median(sum(t[1]) / t[0] - 1 for t in triples), "%")
        figure(
            f"{name}/overhead_trust_region", 100 * statistics.median(sum(t[2]) / sum(t[1]) - 1 for t in triples), "%"
        )
        figure(f"{name}/step_whole_vp2o", statistics.median(t[3] for t in triples) * 1e3, "ms")
        figure(f"{name}/overhead_orthogonality", 100 * statistics.median(t[3] / sum(t[2]) - 1 for t in triples), "%")
        figure(f"{name}/overhead_whole_vp2o", 100 * statistics.median(t[3] / t[0] - 1 for t in triples), "%")
        for phase, values in phases.items():
            figure(f"{name}/hook_{phase}", statistics.median(values) * 1e3, "ms")
        figure(f"{name}/tokens", tokens / plain, "tokens/s")
        flops = training_flops(bench.config.model, arguments.rows, arguments.width, bench.policy.padded_vocab)
        fwd = statistics.median(t[1][0] for t in triples)
        figure(f"{name}/mfu_forward_backward", 100 * flops / fwd / (PEAK_TFLOPS * 1e12), "%")
        if torch.cuda.is_available():
            figure(f"{name}/peak_memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
            _profile(bench)
    finally:
        world.stop()


def _profile(bench: _Bench) -> None:
    """The kernels that take most of a step, printed."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        bench.step(True, True, True)
    table = profile.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60)
    print(table)


def _profile_decoding(run: Callable[[], Any]) -> None:
    """What the host does, and what the device does, in some tokens of decoding."""
    import cProfile
    import pstats

    import torch

    if not torch.cuda.is_available():
        return
    host = cProfile.Profile()
    host.runcall(run)
    pstats.Stats(host).sort_stats("tottime").print_stats(25)
    with torch.profiler.profile() as profile:
        run()
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=20, max_name_column_width=60))


def experts(arguments: argparse.Namespace) -> None:
    """The transform alone, by phase, for several numbers of experts of one layer."""
    from megatron_vp2o.megatron.platform import world

    for count in map(int, arguments.experts.split(",")):
        arguments.rows = min(arguments.rows, 4)
        bench = _Bench(arguments, num_layers=1, num_moe_experts=count)
        for _ in range(2):
            bench.step(True, False)
        phases = bench.phases()
        hooks = [bench.step(True, False)[1] for _ in range(arguments.pairs)]
        figure(f"experts/{count}/hook", statistics.median(hooks) * 1e3, "ms")
        for phase, values in phases.items():
            figure(f"experts/{count}/{phase}", statistics.median(values) * 1e3, "ms")
        del bench
        world.stop_model_parallel()
    world.stop()


def decode(arguments: argparse.Namespace) -> None:
    """Tokens a second of the embedded engine."""
    from megatron_vp2o.megatron.actor.generation import MegatronEngine
    from megatron_vp2o.megatron.platform import world
    from megatron_vp2o.rl.types import SamplingParams

    bench = _Bench(arguments)
    try:
        engine = MegatronEngine(bench.config, bench.policy, eos_ids=[511], pad_id=0)
        engine.refresh(0)
        prompts = [[1 + i] * 64 for i in range(8)]
        new = 128 // min(8, arguments.shrink)
        for name, group in (("batch_64", 8), ("batch_512", 64)):
            engine.max_batch_size = 8 * group
            engine.generate(prompts, range(8), SamplingParams(1.0, 1.0, 8, seed=0), group)
            begin = time.perf_counter()
            rollouts = engine.generate(prompts, range(8), SamplingParams(1.0, 1.0, new, seed=1), group)
            seconds = time.perf_counter() - begin
            figure(f"decode/{name}", float(rollouts.response_mask_NS().sum()) / seconds, "tokens/s")
            figure(f"decode/{name}/per_token_and_layer", seconds / new / arguments.layers * 1e6, "us")
        _profile_decoding(lambda: engine.generate(prompts, range(8), SamplingParams(1.0, 1.0, 16, seed=2), 8))
    finally:
        world.stop()


def logprobs(arguments: argparse.Namespace) -> None:
    """Forward and backward from hidden states to log-probabilities at 16,384 tokens and 151,936 ids: time and memory."""
    import torch
    import torch.distributed as dist

    from megatron_vp2o.parallel.logprobs import log_probs_and_entropy
    from megatron_vp2o.parallel.output_logprobs import output_log_probs_and_entropy

    tokens, vocab, width = 16384 // arguments.shrink, 151_936 // arguments.shrink, 2048 // arguments.shrink
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    generator = torch.Generator(device).manual_seed(0)
    hidden_TD = torch.randn(tokens, width, device=device, dtype=dtype, generator=generator)
    weight_VD = torch.randn(vocab, width, device=device, dtype=dtype, generator=generator) * width**-0.5
    hidden_TD.requires_grad_(), weight_VD.requires_grad_()
    targets_T = torch.randint(vocab - 100, (tokens,), device=device, generator=generator)
    same = {"temperature": 1.0, "valid_vocab": vocab - 100, "group": group}
    results: dict[str, list[torch.Tensor]] = {}

    def plain() -> torch.Tensor:
        return log_probs_and_entropy(hidden_TD @ weight_VD.t(), targets_T, **same)[0]  # type: ignore[arg-type]

    def chunked(mib: int) -> Callable[[], torch.Tensor]:
        chunk = max(1, mib * 2**18 // vocab)
        return lambda: output_log_probs_and_entropy(hidden_TD, weight_VD, targets_T, chunk_tokens=chunk, **same)[0]  # type: ignore[arg-type]

    for name, run in {"plain": plain, "chunks_256": chunked(256), "chunks_1024": chunked(1024)}.items():

        def once(run: Callable[[], torch.Tensor] = run, name: str = name) -> None:
            logprob_T = run()
            results[name] = [logprob_T.detach(), *torch.autograd.grad(-logprob_T.mean(), [hidden_TD, weight_VD])]

        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = _median(once, arguments.pairs)
        figure(f"logprobs/{name}/time", seconds * 1e3, "ms")
        if cuda:
            figure(f"logprobs/{name}/peak_memory", (torch.cuda.max_memory_allocated() - before) / 2**30, "GiB")
        for label, mine, expected in zip(("value", "dhidden", "dweight"), results[name], results["plain"], strict=True):
            error = (mine.float() - expected.float()).norm() / expected.float().norm()
            figure(f"logprobs/{name}/difference_{label}", float(error), "relative")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

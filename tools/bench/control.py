"""What the trust region costs: a training step under it over one without, in turns, all with the Stein hook; and under one that
measures the policy's drift, too.

The anchor's gates are recomputed here; those that actors log while decoding are cheaper still.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace

from tools.bench.stein import clock, describe, parse, settings

KINDS = ("without", "with", "with drift")
GOALS = {"tiny": 3.0, "33b": 1.0}  # per cent of a step


def main(argv: list[str]) -> int:
    """Measure and print. Takes the options of `tools.bench stein` (one process)."""
    arguments = parse(argv)
    from megatron_vp2o.megatron.platform.cpu import enable_cpu

    enable_cpu()
    import torch

    from megatron_vp2o.config.schema import ControlMode, TrustRegionConfig
    from megatron_vp2o.megatron.control.trust_region import TrustRegion
    from megatron_vp2o.megatron.learner.policy import MegatronPolicy
    from megatron_vp2o.megatron.platform import world
    from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes
    from megatron_vp2o.megatron.stein.transform import SteinTransform
    from megatron_vp2o.rl.drift import SampledDrift
    from megatron_vp2o.rl.objectives import next_token
    from megatron_vp2o.rl.types import TrainBatch

    config, rows, micro, width = settings(arguments)
    config.optimizer.lr = 1e-5  # steps stay within the region: what is timed is the check
    world.set_threads(arguments.threads)
    with world.joined(config.parallel, config.seed) as groups:
        policy = MegatronPolicy(config, groups, vocab_size=64, optimizer_steps=10**6)
        transform = SteinTransform(
            ExpertPrototypes(policy.ddp, config.algorithm.stein, groups), optimizer=policy.optimizer
        )
        region = TrustRegion(
            policy, transform.prototypes, TrustRegionConfig(mode=ControlMode.enforce, delta=1.9), transform
        )
        region.set_anchor()
        drift = SampledDrift(policy, groups, share=TrustRegionConfig().drift_share, micro_batch_size=micro)
        tokens_NS = torch.randint(64, (rows, width), generator=torch.Generator().manual_seed(0))
        mask_NS = torch.ones(rows, width, dtype=torch.bool)
        mask_NS[:, : width // 2] = False
        batch = TrainBatch(tokens_NS, torch.full((rows,), width), mask_NS, temperature=1.0)
        batch = replace(batch, row_N=torch.arange(rows), behaviour_logprobs_NS=torch.zeros(rows, width))
        now, watcher = clock(torch), policy.watcher

        def step(kind: str) -> tuple[float, float]:
            bounded = kind != "without"
            policy.watcher = watcher if bounded else None
            region.drift = drift if kind == "with drift" else None
            begin = now()
            if bounded:
                region.begin(batch)
            measured = policy.accumulate_gradients(batch, next_token, micro)
            transform.apply()
            before = now()
            tokens = rows * width // 2
            assert not (region.step(measured) if bounded else policy.optimizer_step(tokens)).skipped
            return now() - begin, now() - before

        for _ in range(arguments.warmup):
            for kind in KINDS:
                step(kind)
        times = [{kind: step(kind) for kind in KINDS} for _ in range(arguments.pairs)]
        print(
            f"{arguments.layer}: {describe(config.model)}; {rows} rows of {width} tokens, {torch.get_num_threads()} threads"
        )
        for part, name in enumerate(("step", "optimizer")):
            for kind in KINDS:
                median = statistics.median(turn[kind][part] for turn in times)
                print(f"  {name + ' ' + kind:22}{median * 1e3:12,.2f} ms")
        aim = f"goal: {GOALS[arguments.layer]:.0f} %" if arguments.shrink == 1 else "shapes made smaller, no goal"
        for kind, base, said in (("with", "without", aim), ("with drift", "with", "goal: 3 % more")):
            more = 100 * statistics.median(turn[kind][0] / turn[base][0] - 1 for turn in times)
            check = 100 * statistics.median((turn[kind][1] - turn[base][1]) / turn["without"][0] for turn in times)
            print(f"  {kind} over {base}: {more:.1f} % of a step ({said}); after the gradients alone {check:.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

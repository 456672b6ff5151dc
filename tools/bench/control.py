"""What the trust region costs: a training step under it over one without, in turns, both with the Stein transform.

The anchor's gates are recomputed here; those that actors log while decoding are cheaper still.
"""

from __future__ import annotations

import statistics
import sys

from tools.bench.stein import clock, describe, parse, settings

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
        tokens_NS = torch.randint(64, (rows, width), generator=torch.Generator().manual_seed(0))
        mask_NS = torch.ones(rows, width, dtype=torch.bool)
        mask_NS[:, : width // 2] = False
        batch = TrainBatch(tokens_NS, torch.full((rows,), width), mask_NS, temperature=1.0)
        now, watcher = clock(torch), policy.watcher

        def step(bounded: bool) -> tuple[float, float]:
            policy.watcher = watcher if bounded else None
            begin = now()
            if bounded:
                region.begin(batch)
            policy.forward_backward(batch, next_token, micro)
            transform.apply()
            before = now()
            assert not (region.step(rows * width // 2) if bounded else policy.optimizer_step(1)).skipped
            return now() - begin, now() - before

        for _ in range(arguments.warmup):
            step(True), step(False)
        times = [(step(True), step(False)) for _ in range(arguments.pairs)]
        print(
            f"{arguments.layer}: {describe(config.model)}; {rows} rows of {width} tokens, {torch.get_num_threads()} threads"
        )
        for name, values in (
            ("step without", [plain[0] for _, plain in times]),
            ("step with", [bounded[0] for bounded, _ in times]),
            ("optimizer without", [plain[1] for _, plain in times]),
            ("optimizer with", [bounded[1] for bounded, _ in times]),
        ):
            print(f"  {name:18}{statistics.median(values) * 1e3:12,.2f} ms")
        more = 100 * statistics.median(bounded[0] / plain[0] - 1 for bounded, plain in times)
        check = 100 * statistics.median((bounded[1] - plain[1]) / plain[0] for bounded, plain in times)
        aim = f"goal: {GOALS[arguments.layer]:.0f} %" if arguments.shrink == 1 else "shapes made smaller, no goal"
        print(f"  overhead          {more:12.1f} % of a step ({aim}); snapshot and check alone {check:.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

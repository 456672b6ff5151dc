"""The first minute on a CUDA machine: is there a device, does everything import, does a tiny model decode, score and train.

Runs the work of tests/megatron/policy_job.py in float32, in bfloat16, and in bfloat16 with replayed routes, and says how far
decoding and scoring are apart.
"""

from __future__ import annotations

import sys
import time
import traceback

CASES = {"fp32": ("fp32", "off", 1e-3), "bf16": ("bf16", "off", float("inf")), "bf16_replay": ("bf16", "R3", 0.1)}
"""Precision, router replay, and the largest difference of log-probabilities between decoding and scoring that is rounding. In
bfloat16 a near-tie in the router chooses other experts, unless routes are replayed: that difference is only printed."""


def main() -> int:
    """Returns 1 where one of the cases fails; all are tried."""
    begin = time.perf_counter()
    from megatron_vp2o.megatron.platform.cpu import enable_cpu

    patches = enable_cpu()
    import torch

    from megatron_vp2o.config.schema import Implementation, Precision, RouterReplay
    from megatron_vp2o.megatron.platform import world
    from tests.megatron import policy_job

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{device}; imports took {time.perf_counter() - begin:.1f} s; {len(patches)} CPU patches")
    status = 0
    for name, (precision, replay, bound) in CASES.items():
        config = policy_job.small_config()
        config.model.precision = Precision[precision]
        config.rollout.router_replay = RouterReplay[replay]
        config.model.implementation = Implementation.torch
        begin = time.perf_counter()
        try:
            result = policy_job.train(config)
            print(f"figure smoke/{name}/mismatch {max(result['mismatch']):.6g} nats")
            print(f"figure smoke/{name}/seconds {time.perf_counter() - begin:.6g} s")
            print(f"{name}: loss {result['loss']}, gradient norms {result['grad_norm']}")
            status |= int(not max(result["mismatch"]) <= bound)
        except Exception:  # the others are tried, too
            traceback.print_exc()
            status = 1
        finally:
            world.stop_model_parallel()
    world.stop()
    return status


if __name__ == "__main__":
    sys.exit(main())

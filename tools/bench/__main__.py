"""Runs one benchmark, or all that need nothing but this environment: `python -m tools.bench {NAME,all} [options]`."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "startup": "seconds from the command to its help text",
    "step": "tokens/s of rollouts and training, seconds of each phase of a step",
    "stein": "the Stein transform: its phases, and a training step with it over one without",
    "memory": "peak memory of training beside the plan; --long: 16,384 tokens over 151,936 ids in 24 GiB",
    "control": "the trust region: a training step under it over one without",
    "variants": "shaping of rewards by each variant over GRPO's, as a share of a tiny step",
    "packing": "trained tokens/s of rows of skewed lengths, padded and packed",
    "prefix": "forward and backward pass of groups, each prompt once a row and once a group",
    "context": "what gathering keys and values costs under context parallelism (started by torchrun)",
    "experts": "the experts' forward pass on the CPU: one at a time, together, torch's grouped product",
    "gpu": "on a CUDA device: ceilings, layers of large models with and without VP2O, the hook by experts, decoding",
    "convert": "seconds a GB and memory of converting a checkpoint with the names of Qwen3-30B-A3B, both ways",
    "rows": "a start of task=rows over a thousand and a million rows: seconds, memory",
    "rewards": "answers a second: mathematics, bad answers among them, programs in the sandbox",
    "rollouts": "tokens/s of the client of vLLM servers beside vLLM's own, and seconds of a sync (make vllm-env first)",
    "transfer": "seconds of a weight sync by files and by broadcast, in turn (make vllm-env first)",
    "overlap": "a step with rollout.ahead=1 over one without, with servers that take as long as training",
    "peers": "whole GRPO steps of TRL and ours in turn (make bench-peers)",
}
IN_ALL = ("startup", "step", "stein", "control")


def main() -> int:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name != "all" and name not in BENCHMARKS:
        print("usage: python -m tools.bench {NAME,all} [options]\n")
        print("\n".join(f"  {key:10} {text}" for key, text in BENCHMARKS.items()))
        return 0 if name in ("-h", "--help") else 2
    status = 0
    for chosen in IN_ALL if name == "all" else (name,):
        print(f"== {chosen}: {BENCHMARKS[chosen]}", flush=True)
        status |= importlib.import_module(f"tools.bench.{chosen}").main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())

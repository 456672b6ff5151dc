"""Trained tokens/s of rows of skewed lengths, padded and packed, the two in turn in one process.

Shape legend: N rows, S longest length.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time

import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

if not torch.cuda.is_available():
    enable_cpu()

from megatron_vp2o.config.schema import GRPOConfig, ModelConfig, TrainConfig
from megatron_vp2o.core.objective import GRPOObjective
from megatron_vp2o.megatron.learner.micro_batches import TokenBudget, token_budget
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.platform import world
from megatron_vp2o.rl.objectives import OnRollouts
from megatron_vp2o.rl.types import TrainBatch

VOCAB = 1024


def main(argv: list[str]) -> int:
    """Print medians and their ratio."""
    parser = argparse.ArgumentParser(prog="tools.bench packing", description=__doc__)
    parser.add_argument("--rows", type=int, default=64, help="of an optimizer step")
    parser.add_argument("--longest", type=int, default=512, help="S; half of the rows are at most an eighth as long")
    parser.add_argument("--micro-batch-size", type=int, nargs="+", default=[64, 8], help="padded rows of a micro-batch")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="packed tokens of a micro-batch")
    parser.add_argument("--pairs", type=int, default=5, help="counted, after one pair of warm-up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}.items():
        os.environ.setdefault(name, value)
    config = TrainConfig(
        algorithm=GRPOConfig(micro_batch_tokens=given.micro_batch_tokens),
        model=ModelConfig(max_sequence_length=given.longest, vocab_size=VOCAB),
    )
    groups = world.start(config.parallel, config.seed)
    policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=100)
    budget, batch = token_budget(config), skewed(given.rows, given.longest, given.seed)
    valid = int(batch.length_N.sum())
    print(
        f"{given.rows} rows of {valid} tokens: median {int(batch.length_N.median())}, longest {int(batch.length_N.max())}; "
        f"packed into at most {given.micro_batch_tokens}"
    )
    for size in given.micro_batch_size:
        padded: list[float] = []
        packed: list[float] = []
        for _ in range(1 + given.pairs):
            padded.append(_seconds(policy, batch, None, size))
            packed.append(_seconds(policy, batch, budget, size))
        ratios = sorted(a / b for a, b in zip(padded[1:], packed[1:], strict=True))
        print(
            f"micro_batch_size={size}: padded {valid / statistics.median(padded[1:]):8,.0f} tokens/s, packed "
            f"{valid / statistics.median(packed[1:]):8,.0f}; ratio {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )
    world.stop()
    return 0


def skewed(rows: int, longest: int, seed: int) -> TrainBatch:
    """Log-normal lengths: median an eighth of the longest one, which there is."""
    chance = random.Random(seed)
    lengths = [min(longest, max(4, round(longest / 8 * chance.lognormvariate(0.0, 0.8)))) for _ in range(rows)]
    lengths[chance.randrange(rows)] = longest
    length_N, position_S = torch.tensor(lengths), torch.arange(longest)
    generator = torch.Generator().manual_seed(seed)
    return TrainBatch(
        tokens_NS=torch.randint(VOCAB, (rows, longest), generator=generator),
        length_N=length_N,
        loss_mask_NS=(position_S >= 2) & (position_S < length_N[:, None]),
        behaviour_logprobs_NS=torch.full((rows, longest), -7.0),
        advantages_N=torch.randn(rows, generator=generator),
    )


def _seconds(policy: MegatronPolicy, batch: TrainBatch, budget: TokenBudget | None, size: int) -> float:
    objective = OnRollouts(GRPOObjective(clip_epsilon_low=0.2, clip_epsilon_high=0.2, kl_coef=0.0, entropy_coef=0.0))
    policy.token_budget = budget
    # One thread's own time on a CPU, whatever else the machine does meanwhile.
    clock = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    start = clock()
    policy.forward_backward(batch, objective, size)
    return clock() - start

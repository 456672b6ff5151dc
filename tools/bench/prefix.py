"""Forward and backward pass of groups with long and short prompts: each prompt once a row, and once a group, the two in turn.

Shape legend: N rows, S longest length.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from dataclasses import replace

import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

if not torch.cuda.is_available():
    enable_cpu()

from megatron_vp2o.config.schema import GRPOConfig, ModelConfig, PrefixSharing, TrainConfig
from megatron_vp2o.core.objective import GRPOObjective
from megatron_vp2o.megatron.learner.micro_batches import TokenBudget, token_budget
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.platform import world
from megatron_vp2o.rl.objectives import OnRollouts
from megatron_vp2o.rl.types import TrainBatch

VOCAB = 1024


def main(argv: list[str]) -> int:
    """Print, for each shape, medians and their ratio."""
    parser = argparse.ArgumentParser(prog="tools.bench prefix", description=__doc__)
    parser.add_argument("--rows", type=int, default=64, help="of an optimizer step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument(
        "--shapes", nargs="+", default=["8x32", "32x32", "256x32"], help="PROMPTxRESPONSE: longest ones, tokens"
    )
    parser.add_argument("--micro-batch-tokens", type=int, default=16384, help="tokens of a micro-batch")
    parser.add_argument("--pairs", type=int, default=5, help="counted, after one pair of warm-up")
    parser.add_argument("--even", action="store_true", help="all prompts and responses as long as the longest")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29534"}.items():
        os.environ.setdefault(name, value)
    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes]
    config = TrainConfig(
        algorithm=GRPOConfig(micro_batch_tokens=given.micro_batch_tokens),
        model=ModelConfig(max_sequence_length=max(map(sum, shapes)), vocab_size=VOCAB),
    )
    groups = world.start(config.parallel, config.seed)
    policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=100)
    budget = token_budget(config)
    assert budget is not None
    for prompt, response in shapes:
        batch = grouped(given.rows, given.group_size, prompt, response, given.even, given.seed)
        apart: list[float] = []
        shared: list[float] = []
        for _ in range(1 + given.pairs):
            apart.append(_seconds(policy, batch, replace(budget, prefixes=PrefixSharing.off))[0])
            seconds, saved = _seconds(policy, batch, replace(budget, prefixes=PrefixSharing.on))
            shared.append(seconds)
        ratios = sorted(a / b for a, b in zip(apart[1:], shared[1:], strict=True))
        medians = [statistics.median(some[1:]) for some in (apart, shared)]
        print(
            f"{prompt} + {response} tokens, {given.rows} rows in groups of {given.group_size}: {medians[0]:.3f} s, "
            f"shared {medians[1]:.3f} s; ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), "
            f"{100 * saved:.0f} % of the tokens saved",
            flush=True,
        )
    world.stop()
    return 0


def grouped(rows: int, group_size: int, prompt: int, response: int, even: bool, seed: int) -> TrainBatch:
    """Groups with prompts and responses of any length from half of the longest on (responses from a quarter on)."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    width = prompt + response
    tokens_NS = torch.randint(VOCAB, (rows, width), generator=generator)
    prompts, lengths = [], []
    for row in range(rows):
        if row % group_size == 0:
            own = prompt if even else chance.randint(-(-prompt // 2), prompt)
            first = tokens_NS[row, :own].clone()
        tokens_NS[row, :own] = first
        prompts.append(own)
        lengths.append(own + (response if even else chance.randint(-(-response // 4), response)))
    length_N, position_S = torch.tensor(lengths), torch.arange(width)
    return TrainBatch(
        tokens_NS=tokens_NS,
        length_N=length_N,
        loss_mask_NS=(position_S >= torch.tensor(prompts)[:, None]) & (position_S < length_N[:, None]),
        behaviour_logprobs_NS=torch.full((rows, width), -7.0),
        advantages_N=torch.randn(rows, generator=generator),
    )


def _seconds(policy: MegatronPolicy, batch: TrainBatch, budget: TokenBudget) -> tuple[float, float]:
    """Of a forward and backward pass, and the share of tokens that were saved."""
    objective = OnRollouts(GRPOObjective(clip_epsilon_low=0.2, clip_epsilon_high=0.2, kl_coef=0.0, entropy_coef=0.0))
    policy.token_budget = budget
    # One thread's own time on a CPU, whatever else the machine does meanwhile.
    clock = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    start = clock()
    metrics = policy.forward_backward(batch, objective, 1)
    return clock() - start, metrics.get("packing/tokens_shared", 0.0)

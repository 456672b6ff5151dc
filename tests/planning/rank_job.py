"""What tests of this folder run on real ranks."""

from __future__ import annotations

from typing import Any

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_vp2o.config.compose import compose  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes  # noqa: E402
from megatron_vp2o.megatron.stein.transform import SteinTransform  # noqa: E402
from megatron_vp2o.planning.simulate import static_memory  # noqa: E402
from megatron_vp2o.rl.objectives import next_token  # noqa: E402
from megatron_vp2o.rl.types import TrainBatch  # noqa: E402
from tools.bench.stein import count_bytes  # noqa: E402

IDS, WIDTH = 104, 16


def stein(overrides: list[str]) -> dict[str, Any]:
    """Bytes that this rank gives away in the exchange of one real step, and what it holds."""
    config = compose("train", overrides)
    groups = world.start(config.parallel, 0)
    try:
        policy = MegatronPolicy(config, groups, vocab_size=IDS, optimizer_steps=10)
        transform = SteinTransform(
            ExpertPrototypes(policy.ddp, config.algorithm.stein, groups), optimizer=policy.optimizer
        )
        policy.forward_backward(_batch(groups.dp_rank), next_token, 4)
        sent = count_bytes(dist, transform.apply)
        policy.optimizer_step(1)
        return {"sent": sent, "memory": static_memory(policy)}
    finally:
        world.stop()


def losses(overrides: list[str], steps: int) -> list[float]:
    """Losses of some steps with a large learning rate, each rank having its own data."""
    config = compose("train", [*overrides, "optimizer.lr=0.01", "model.num_layers=2"])
    groups = world.start(config.parallel, 0)
    try:
        policy = MegatronPolicy(config, groups, vocab_size=IDS, optimizer_steps=100)
        found = []
        for step in range(steps):
            found.append(policy.forward_backward(_batch(10 * step + groups.dp_rank), next_token, 4)["loss"])
            policy.optimizer_step(1)
        return found
    finally:
        world.stop()


def _batch(seed: int) -> TrainBatch:
    tokens = torch.randint(IDS, (4, WIDTH), generator=torch.Generator().manual_seed(seed))
    return TrainBatch(tokens, torch.full((4,), WIDTH), torch.ones(4, WIDTH, dtype=torch.bool), temperature=1.0)

"""In one process: verl replays given routes (R2), and the statistics are those of the routes that it replays."""

from __future__ import annotations

import os
from functools import partial

import torch
import torch.distributed as dist
from tensordict import TensorDict
from verl.utils import tensordict_utils
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.workers.config import EngineRouterReplayConfig
from verl.workers.utils.losses import sft_loss

from tests.plugins.verl_equal_job import STEIN, verl_engine

ROWS, LENGTH, LAYERS, USED = 4, 9, 2, 3
"""Routes go to the first three of eight experts only, which the untrained router would not do."""


def nested(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    engine = verl_engine(os.environ["MODEL"], {"stein": STEIN}, router_replay=EngineRouterReplayConfig(mode="R2"))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 64, (LENGTH,), generator=generator) for _ in range(ROWS)]
    first = torch.randint(USED, (ROWS, LENGTH, LAYERS, 1), generator=generator)
    routes = torch.cat([first, (first + 1) % USED], dim=-1)
    batch = TensorDict(
        {
            "input_ids": nested(rows),
            "loss_mask": nested([torch.ones(LENGTH, dtype=torch.bool) for _ in rows]),
            "position_ids": nested([torch.arange(LENGTH) for _ in rows]),
            "routed_experts": nested(list(routes)),
        },
        batch_size=[ROWS],
    )
    tensordict_utils.assign_non_tensor(
        batch,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=1,
        temperature=1.0,
        global_batch_size=ROWS,
        calculate_entropy=False,
        use_remove_padding=False,
        pad_mode=DatasetPadMode.NO_PADDING,
        enable_routing_replay=True,
    )
    with engine.train_mode():
        output = engine.train_batch(batch, loss_function=partial(sft_loss, None))
    metrics = output["metrics"]
    assert metrics["vp2o/moe/expert_utilisation"] == USED / 8, metrics
    pairs = sum(1.0 for i in range(8) for j in range(8) if i != j and i < USED and j < USED) / 56
    assert abs(metrics["vp2o/stein/coactivation_sparsity"] - (1 - pairs)) < 1e-6, metrics
    print("replayed")


if __name__ == "__main__":
    main()

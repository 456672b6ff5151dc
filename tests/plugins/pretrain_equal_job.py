"""Five steps of this project's trainer from the weights, and on the rows, of a run of `pretrain()`; how far the ends are apart."""

from __future__ import annotations

from typing import Any

import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.config.schema import (  # noqa: E402
    LRDecay,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RepulsionScale,
    SteinConfig,
    TrainConfig,
)
from megatron_vp2o.core.objective import supervised_objective  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes  # noqa: E402
from megatron_vp2o.megatron.stein.transform import SteinTransform  # noqa: E402
from megatron_vp2o.rl.types import TrainBatch  # noqa: E402

ROWS, LENGTH, VOCAB = 8, 16, 128
"""Of test_pretrain.py's arguments; the vocabulary is padded to a multiple of 128."""


def apart(result: str, steps: int, lr: float, layout: dict[str, Any]) -> dict[str, float]:
    """Largest differences of a weight: between the two trainers' ends, and between start and end."""
    torch.set_num_threads(1)
    config = TrainConfig(
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            num_query_groups=4,
            kv_channels=8,
            qk_layernorm=False,
            layernorm_epsilon=1e-5,
            num_moe_experts=8,
            moe_router_topk=2,
            moe_ffn_hidden_size=32,
            moe_aux_loss_coeff=0.0,
            vocab_size=VOCAB,
        ),
        optimizer=OptimizerConfig(
            lr=lr, weight_decay=0.0, adam_beta2=0.999, clip_grad=1.0, lr_decay_style=LRDecay.constant
        ),
        parallel=ParallelConfig(**layout),
    )
    groups = world.start(config.parallel, 1)
    policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=steps)
    saved = torch.load(f"{result}.{groups.rank}.pt")
    policy.model.load_state_dict(saved["start"], strict=False)
    policy.optimizer.reload_model_params()
    names = {name for name, _ in policy.model.named_parameters()}
    assert names == saved["start"].keys(), names ^ saved["start"].keys()
    settings = SteinConfig(enabled=True, neighbours=2, repulsion_scale=RepulsionScale.relative)
    transform = SteinTransform(ExpertPrototypes([policy.ddp], settings), optimizer=policy.optimizer)
    # The host's model never sees a row's last token: here it is padding, which is predicted and not routed.
    policy.length_multiple = LENGTH + 1
    share = ROWS // groups.dp_size
    for step in range(steps):
        first = ROWS * step + groups.dp_rank * share
        index = torch.arange(first, first + share)[:, None]
        tokens_NS = (torch.arange(LENGTH + 1) + 7 * index) % VOCAB
        mask_NS = torch.ones_like(tokens_NS, dtype=torch.bool)
        mask_NS[:, 0] = False
        batch = TrainBatch(tokens_NS, torch.full((share,), LENGTH), mask_NS)
        counted = policy.forward_backward(
            batch, lambda logprobs, _, part: supervised_objective(logprobs, part.loss_mask_NS), micro_batch_size=2
        )
        transform.apply()
        policy.optimizer_step(int(counted["tokens"]))
    end = dict(policy.model.named_parameters())
    found = {
        "trainers": max((end[name].detach() - value).abs().max().item() for name, value in saved["end"].items()),
        "moved": max((saved["start"][name] - value).abs().max().item() for name, value in saved["end"].items()),
    }
    world.stop_model_parallel()
    world.stop()
    return found

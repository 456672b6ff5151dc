"""Under torchrun in verl's environment: five steps of verl's engine with the plug-in, and five of this project's trainer, from the
same weights on the same rows. Writes what came out as JSON to $RESULT.rank.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
from verl.workers.engine import EngineRegistry
from verl.workers.utils.losses import sft_loss

from megatron_vp2o.config.schema import (
    Algorithm,
    Implementation,
    LRDecay,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    SteinConfig,
    SupervisedConfig,
    TrainConfig,
)
from megatron_vp2o.core.objective import supervised_objective
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.settings import run_settings
from megatron_vp2o.hf.tensor_files import config_of
from megatron_vp2o.megatron.hf.load import load_hf
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.platform.world import current_groups
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes
from megatron_vp2o.megatron.stein.transform import SteinTransform
from megatron_vp2o.rl.types import TrainBatch

STEPS, ROWS, LR = 5, 8, 3e-4
STEIN: dict[str, Any] = {"enabled": True, "neighbours": 2, "eta": 0.01, "repulsion_scale": "relative"}


def rows(step: int) -> list[torch.Tensor]:
    """The step's rows over all ranks, of different lengths."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(5, 17, (ROWS,), generator=generator).tolist()
    return [torch.cat([torch.tensor([1]), torch.randint(3, 64, (n,), generator=generator)]) for n in lengths]


def mine(step: int) -> list[torch.Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    return rows(step)[rank * ROWS // size : (rank + 1) * ROWS // size]


def verl_engine(folder: str, settings: dict[str, Any], **further: Any) -> Any:
    overrides = {
        "use_cpu_initialization": True,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "moe_grouped_gemm": False,
        "moe_permute_fusion": False,
        "attention_backend": "unfused",
        "bf16": False,
        "variable_seq_lengths": True,
    }
    config = McoreEngineConfig(
        expert_model_parallel_size=dist.get_world_size(),
        vanilla_mbridge=True,
        use_remove_padding=False,
        use_distributed_optimizer=True,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2,
        override_transformer_config=overrides,
        override_mcore_model_config={"vp2o": settings},
        **further,
    )
    object.__setattr__(config, "dtype", "float32")  # verl offers bf16 and fp16 only
    engine = EngineRegistry.new(
        "language_model",
        "megatron",
        model_config=HFModelConfig(
            path=folder, use_remove_padding=False, override_config={"attn_implementation": "eager"}
        ),
        engine_config=config,
        optimizer_config=McoreOptimizerConfig(
            lr=LR, lr_warmup_steps=0, total_training_steps=STEPS, weight_decay=0.0, lr_decay_style="constant"
        ),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def verl_batch(step: int) -> TensorDict:
    def nested(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    found = mine(step)
    masks = [torch.ones(len(row), dtype=torch.bool) for row in found]
    for mask in masks:
        mask[0] = False
    batch = TensorDict(
        {
            "input_ids": nested(found),
            "loss_mask": nested(masks),
            "position_ids": nested([torch.arange(len(row)) for row in found]),
        },
        batch_size=[len(found)],
    )
    tensordict_utils.assign_non_tensor(
        batch,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2,
        temperature=1.0,
        global_batch_size=ROWS,
        calculate_entropy=False,
        use_remove_padding=False,
        pad_mode=DatasetPadMode.NO_PADDING,
    )
    return batch


def verl_steps(engine: Any, first: int, last: int) -> list[dict[str, float]]:
    found = []
    for step in range(first, last):
        with engine.train_mode():
            output = engine.train_batch(verl_batch(step), loss_function=partial(sft_loss, None))
            engine.lr_scheduler_step()
        found.append({k: float(v) for k, v in output["metrics"].items() if k.startswith("vp2o/")})
    return found


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}


def own_steps(folder: str) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """This project's learner and transform."""
    config = TrainConfig(
        algorithm=SupervisedConfig(name=Algorithm.supervised),
        optimizer=OptimizerConfig(
            lr=LR, weight_decay=0.0, adam_beta2=0.999, clip_grad=1.0, lr_decay_style=LRDecay.constant
        ),
        parallel=ParallelConfig(expert_parallel=dist.get_world_size(), distributed_optimizer=True),
    )
    model = architecture(config_of(Path(folder)))
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), run_settings(model))
    config.model = cast(ModelConfig, OmegaConf.to_object(merged))
    config.model.precision, config.model.implementation = Precision.fp32, Implementation.local
    config.model.moe_aux_loss_coeff = 0.0
    groups = current_groups()
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)  # set by verl's model; Megatron refuses another choice beside it
    policy = MegatronPolicy(config, groups, vocab_size=model.vocab_size, optimizer_steps=STEPS)
    load_hf(policy.model, Path(folder), groups)
    policy.optimizer.reload_model_params()
    stein = {k: v for k, v in STEIN.items() if k != "repulsion_scale"}
    settings = SteinConfig(**stein, repulsion_scale=type(SteinConfig().repulsion_scale)["relative"])
    transform = SteinTransform(ExpertPrototypes([policy.ddp], settings), optimizer=policy.optimizer)
    metrics = []
    for step in range(STEPS):
        found = mine(step)
        width = max(map(len, found))
        tokens_NS = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in found])
        length_N = torch.tensor([len(row) for row in found])
        mask_NS = (torch.arange(width) < length_N[:, None]) & (torch.arange(width) > 0)
        batch = TrainBatch(tokens_NS, length_N, mask_NS)
        counted = policy.forward_backward(
            batch, lambda logprobs, _, part: supervised_objective(logprobs, part.loss_mask_NS), micro_batch_size=2
        )
        metrics.append({f"vp2o/{k}": v for k, v in transform.apply().items()})
        policy.optimizer_step(int(counted["tokens"]))
    return weights(policy.model), metrics


def main() -> None:
    torch.set_num_threads(1)
    folder, checkpoint = os.environ["MODEL"], os.environ["CHECKPOINT"]
    dist.init_process_group("gloo")
    engine = verl_engine(folder, {"stein": STEIN})
    start = weights(engine.module[0].module)
    metrics = verl_steps(engine, 0, 3)
    engine.save_checkpoint(checkpoint, global_step=3)
    metrics += verl_steps(engine, 3, STEPS)
    engine_weights = weights(engine.module[0].module)
    state = engine.plugged.installed.state_dict()

    resumed = verl_engine(folder, {"stein": STEIN})
    resumed.load_checkpoint(checkpoint, del_local_after_load=False)
    verl_steps(resumed, 3, STEPS)
    resumed_state = resumed.plugged.installed.state_dict()

    own, own_metrics = own_steps(folder)

    def worst(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
        assert left.keys() == right.keys(), left.keys() ^ right.keys()
        return max((left[name] - right[name]).abs().max().item() for name in left)

    layers = state["layers"]
    result = {
        "moved": worst(start, engine_weights),
        "own": worst(own, engine_weights),
        "resumed": worst(weights(resumed.module[0].module), engine_weights),
        "state": max(
            (layers[n][k] - resumed_state["layers"][n][k]).abs().max().item() for n in layers for k in layers[n]
        ),
        "steps": resumed_state["steps"],
        "metrics": metrics,
        "own_metrics": own_metrics,
    }
    Path(f"{os.environ['RESULT']}.{dist.get_rank()}").write_text(json.dumps(result))


if __name__ == "__main__":
    main()

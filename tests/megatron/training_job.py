"""Training runs of a tiny GPTModel through Megatron's own DDP, optimizers, schedules and checkpoints, for test_layouts.py.

Every rank of a world runs `run(cases)`: one process group, and model parallelism taken down and set up between the cases.
A global batch is cut into `micro_batches` whatever the layout, because the router's auxiliary losses are means over a
micro-batch; data-parallel ranks share them out.

Shape legend: N rows, S sequence length.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy  # noqa: E402
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402

from megatron_vp2o.config.schema import Implementation, ModelConfig, ParallelConfig, Precision  # noqa: E402
from megatron_vp2o.megatron.model.build import DTYPES, initialise, transformer_config  # noqa: E402
from megatron_vp2o.megatron.model.norm import RMSNorm  # noqa: E402
from megatron_vp2o.megatron.model.specs import layer_specs  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.megatron.platform.compat import _tracked_losses, mark_expert_parameters, replace_in_spec  # noqa: E402
from megatron_vp2o.parallel.groups import Groups  # noqa: E402
from tests.megatron.cases import Case  # noqa: E402

VOCABULARY, ROWS, LENGTH = 64, 8, 16


def run(cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """All cases, each on the whole world. By name: losses and gradient norms by step, auxiliary losses of the last step."""
    torch.set_num_threads(1)
    results = {}
    for settings in cases:
        case = Case(**settings)
        groups = world.start(ParallelConfig(**case.layout), seed=1)
        results[case.name] = _train(case, groups)
        world.stop_model_parallel()
    world.stop()
    return results


def _build(case: Case, parallel: ParallelConfig, groups: Groups) -> GPTModel:
    model = ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        max_sequence_length=LENGTH,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_ffn_hidden_size=64,
        moe_aux_loss_coeff=1e-2,
        moe_z_loss_coeff=1e-3,
        share_embeddings_and_output_weights=case.tied,
        precision=Precision.bf16 if case.bf16 else Precision.fp32,
        implementation=Implementation.local,
    )
    config = transformer_config(model, parallel)
    if case.project_spec:
        spec = layer_specs(config, model.implementation)
    else:
        stock = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
        spec = replace_in_spec(stock, {WrappedTorchNorm: RMSNorm})
    gpt = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=case.tied,
        position_embedding_type="rope",
    )
    initialise(gpt, model, groups, seed=1)
    mark_expert_parameters(gpt)
    return gpt


def _batches(step: int, micro_batches: int, groups: Groups) -> list[tuple[Tensor, Tensor, Tensor]]:
    """This rank's micro-batches (tokens, labels, loss mask) [N, S] of a task that can be learnt: say the first half again."""
    generator = torch.Generator().manual_seed(step)
    half = torch.randint(2, 16, (ROWS, LENGTH // 2), generator=generator)
    tokens_NS = torch.cat([half, half], dim=1)
    labels_NS = tokens_NS.roll(-1, dims=1)
    mask_NS = torch.zeros(ROWS, LENGTH)
    mask_NS[:, LENGTH // 2 - 1 : LENGTH - 1] = 1
    assert micro_batches % groups.dp_size == 0
    mine = torch.arange(ROWS).chunk(micro_batches)[groups.dp_rank :: groups.dp_size]
    return [(tokens_NS[rows], labels_NS[rows], mask_NS[rows]) for rows in mine]


def _forward_step(batches: Iterator[tuple[Tensor, Tensor, Tensor]], model: Any) -> tuple[Tensor, Any]:
    tokens_NS, labels_NS, mask_NS = next(batches)
    position_NS = torch.arange(LENGTH).expand_as(tokens_NS)

    def loss(per_token_NS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = (per_token_NS.float() * mask_NS).sum()
        tokens = mask_NS.sum()
        return total, tokens.int(), {"sums": torch.stack([total, tokens]).detach()}

    return model(tokens_NS, position_NS, None, labels=labels_NS), loss


def _train(case: Case, groups: Groups) -> dict[str, Any]:
    began = time.monotonic()
    parallel = ParallelConfig(**case.layout)
    gpt = _build(case, parallel, groups)
    config, dtype = gpt.config, DTYPES[Precision.bf16 if case.bf16 else Precision.fp32]
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
        ),
        Float16Module(config, gpt) if case.bf16 else gpt,
    )
    ddp.broadcast_params()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=2e-3,
            weight_decay=0.01,
            clip_grad=1.0,
            bf16=case.bf16,
            params_dtype=dtype,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
        ),
        [ddp],
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = ddp.no_sync
    if parallel.overlap_grad_reduce:
        config.grad_sync_func = ddp.start_grad_sync
    if parallel.overlap_param_gather:
        config.param_sync_func = ddp.start_param_sync

    first = 0 if case.load is None else _load(case.load, gpt, optimizer, parallel)
    losses, norms, auxiliary = [], [], {}
    for step in range(first, first + case.steps):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        batches = _batches(step, case.micro_batches, groups)
        reported = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(batches),
            model=[ddp],
            num_microbatches=len(batches),
            seq_length=LENGTH,
            micro_batch_size=ROWS // case.micro_batches,
            forward_only=False,
        )
        stepped, norm, _ = optimizer.step()
        assert stepped
        sums = torch.zeros(2)
        if groups.is_last_stage and groups.tp.rank() == 0:
            sums += torch.stack([part["sums"] for part in reported]).sum(dim=0)
        dist.all_reduce(sums)
        losses.append((sums[0] / sums[1]).item())
        norms.append(float(norm))
        auxiliary = auxiliary_losses(len(batches))
    if parallel.overlap_param_gather:
        ddp.disable_forward_pre_hook()
    if case.save is not None:
        _save(case.save, gpt, optimizer, first + case.steps)
    for module in gpt.modules():
        if isinstance(module, MoELayer):
            # Megatron's dispatcher keeps the last graph, and with it this model and its groups.
            module.token_dispatcher.probs = None
    return {"losses": losses, "norms": norms, "auxiliary": auxiliary, "seconds": time.monotonic() - began}


def _sharded_state(gpt: GPTModel, optimizer: Any, step: int, *, loading: bool) -> dict[str, Any]:
    model = gpt.sharded_state_dict()
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    state = optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": state, "step": step}


def _save(folder: str, gpt: GPTModel, optimizer: Any, step: int) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(_sharded_state(gpt, optimizer, step, loading=False), folder)


def _load(folder: str, gpt: GPTModel, optimizer: Any, parallel: ParallelConfig) -> int:
    strategy = None
    if parallel_state.get_data_parallel_world_size() > 1:  # each rank reads a part, and they exchange what they read
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(folder), parallel_state.get_data_parallel_group()
        )
    state = dist_checkpointing.load(_sharded_state(gpt, optimizer, 0, loading=True), folder, sharded_strategy=strategy)
    gpt.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def auxiliary_losses(micro_batches: int) -> dict[str, float]:
    """Mean per layer and micro-batch of the router losses since the last call, before their coefficients; clears them.

    A collective over all ranks of the model: call it everywhere.

    Returns:
        "moe/load_balancing_loss" and "moe/z_loss", those that are switched on; equal on all ranks.
    """
    from megatron.core import parallel_state

    result: dict[str, float] = {}
    for name, entry in _tracked_losses().items():
        values_L = entry["values"]
        dist.all_reduce(values_L, group=parallel_state.get_pipeline_model_parallel_group())
        if entry["reduce_group"] is not None:
            dist.all_reduce(values_L, group=entry["reduce_group"])
        mean = values_L.sum() / (len(values_L) * micro_batches)
        # What a rank holds now is its own tokens' share or already the whole; a mean over all ranks serves both.
        dist.all_reduce(mean, op=dist.ReduceOp.AVG)
        key = "moe/z_loss" if name == "z_loss" else "moe/load_balancing_loss"
        result[key] = result.get(key, 0.0) + mean.item()
        values_L.zero_()
    return result

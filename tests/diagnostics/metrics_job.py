"""What the Stein hook says of a Hugging Face model once it is loaded into Megatron: the other side of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from megatron_vp2o.config.parameters import padded_vocab  # noqa: E402
from megatron_vp2o.config.schema import ParallelConfig, SteinConfig  # noqa: E402
from megatron_vp2o.hf.families import architecture  # noqa: E402
from megatron_vp2o.hf.tensor_files import config_of  # noqa: E402
from megatron_vp2o.megatron.hf import load as hf_load  # noqa: E402
from megatron_vp2o.megatron.hf import model as hf_model  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.megatron.stein.install import install  # noqa: E402


def metrics(folders: list[str], batches: list[list[Any]], layout: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The transform's metrics for each folder, after one step on the batches; rank r takes every (data-parallel size)th.

    Args:
        batches: (token ids, lengths) of each micro-batch; tokens beyond a row's length are padding.
    """
    torch.set_num_threads(1)
    parallel = ParallelConfig(**layout)
    groups = world.start(parallel, 1)
    found = {}
    for folder in folders:
        model = architecture(config_of(Path(folder)))
        rows = padded_vocab(model.vocab_size, parallel.tensor_parallel)
        gpt = hf_model.build(model, parallel, groups, vocab_rows=rows, dtype=torch.float32)
        hf_load.load_hf(gpt, Path(folder), groups)
        gpt.requires_grad_(True).train()
        ddp = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), gpt)
        gpt.config.finalize_model_grads_func = finalize_model_grads
        stein = install(ddp, None, SteinConfig(neighbours=2, eta=0.01))
        for ids, lengths in batches[groups.dp_rank :: groups.dp_size]:
            tokens_bs = torch.tensor(ids)
            position_s = torch.arange(tokens_bs.shape[1])
            padding_bs = position_s >= torch.tensor(lengths)[:, None]
            causal = torch.ones(1, 1, len(position_s), len(position_s), dtype=torch.bool).triu(1)
            ddp(tokens_bs, position_s.expand_as(tokens_bs), causal, padding_mask=padding_bs).sum().backward()
        gpt.config.finalize_model_grads_func([ddp])
        found[folder] = dict(stein.metrics)
        stein.remove()
    world.stop_model_parallel()
    world.stop()
    return found

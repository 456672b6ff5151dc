"""What ranks do in the tests of conversion: load a converted checkpoint under layouts, and say what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.config.parameters import padded_vocab  # noqa: E402
from megatron_vp2o.config.schema import ParallelConfig  # noqa: E402
from megatron_vp2o.errors import CheckpointError, ConfigError  # noqa: E402
from megatron_vp2o.hf.families import architecture  # noqa: E402
from megatron_vp2o.hf.output import CARRIED  # noqa: E402
from megatron_vp2o.hf.tensor_files import config_of, open_folder  # noqa: E402
from megatron_vp2o.megatron.hf import compare as hf_compare  # noqa: E402
from megatron_vp2o.megatron.hf import export as hf_export  # noqa: E402
from megatron_vp2o.megatron.hf import load as hf_load  # noqa: E402
from megatron_vp2o.megatron.hf import model as hf_model  # noqa: E402
from megatron_vp2o.megatron.hf import weights as hf_weights  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402


def computed(
    folders: list[str], layouts: list[dict[str, Any]], tokens: list[list[int]], count: int = 0
) -> dict[str, list[Any]]:
    """For each checkpoint and layout: logits and `count` greedy tokens, or why the model was refused."""
    torch.set_num_threads(1)
    found: dict[str, list[Any]] = {folder: [] for folder in folders}
    for layout in layouts:
        parallel = ParallelConfig(**layout)
        groups = world.start(parallel, 1)
        for folder in folders:
            model = architecture(config_of(Path(folder) / CARRIED))
            rows = padded_vocab(model.vocab_size, parallel.tensor_parallel)
            try:
                gpt = hf_model.build(model, parallel, groups, vocab_rows=rows, dtype=torch.float32)
            except ConfigError as error:
                found[folder].append({"refused": str(error)})
                continue
            hf_model.load(gpt, Path(folder))
            inputs = torch.tensor(tokens)
            values = hf_model.logits(gpt, inputs, groups, model.vocab_size)
            chosen = hf_model.greedy(gpt, inputs, groups, model.vocab_size, count)
            found[folder].append({"logits": values.tolist(), "greedy": chosen.tolist()})
        world.stop_model_parallel()
    world.stop()
    return found


def streamed(folders: list[str], layouts: list[dict[str, Any]], sources: list[str]) -> dict[str, list[Any]]:
    """For each checkpoint and layout: names in the order of `hf_tensors`, and those that are not the source's to the bit."""
    torch.set_num_threads(1)
    found: dict[str, list[Any]] = {folder: [] for folder in folders}
    for layout in layouts:
        parallel = ParallelConfig(**layout)
        groups = world.start(parallel, 1)
        for folder, source in zip(folders, sources, strict=True):
            model = architecture(config_of(Path(source)))
            files = open_folder(Path(source))
            rows = padded_vocab(model.vocab_size, parallel.tensor_parallel)
            try:
                gpt = hf_model.build(model, parallel, groups, vocab_rows=rows, dtype=torch.float32)
            except ConfigError as error:
                found[folder].append({"refused": str(error)})
                continue
            hf_model.load(gpt, Path(folder))
            names, wrong = [], []
            for name, tensor in hf_weights.hf_tensors(gpt, model, groups, bucket_bytes=20_000):
                names.append(name)
                entry = files.entries[name]
                if not torch.equal(tensor, files.read(entry, 0, entry.rows)) or not tensor.is_contiguous():
                    wrong.append(name)
            found[folder].append({"names": names, "wrong": wrong})
        world.stop_model_parallel()
    world.stop()
    return found


def exported(folder: str, source: str, target: str, layout: dict[str, Any]) -> str:
    """Write a live model to `target`, then try to write one with a NaN on the last rank's shard; returns that error."""
    torch.set_num_threads(1)
    parallel = ParallelConfig(**layout)
    groups = world.start(parallel, 1)
    config = config_of(Path(source))
    model = architecture(config)
    rows = padded_vocab(model.vocab_size, parallel.tensor_parallel)
    gpt = hf_model.build(model, parallel, groups, vocab_rows=rows, dtype=torch.float32)
    hf_model.load(gpt, Path(folder))
    hf_export.export_hf(gpt, config, groups, Path(target), shard_bytes=50_000, bucket_bytes=20_000)
    if groups.rank == groups.world_size - 1:
        next(p for name, p in gpt.named_parameters() if "linear_fc2" in name).data[0, 0] = float("nan")
    message = ""
    try:
        hf_export.export_hf(gpt, config, groups, Path(f"{target}-damaged"))
    except CheckpointError as error:
        message = str(error)
    world.stop()
    return message


def loaded(sources: list[str], layouts: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """For each Hugging Face folder and layout: what the comparison with transformers says once it is loaded as it is; of the whole
    model, of its first layers, and after one number of the last rank's part was changed. Or why the model was refused."""
    torch.set_num_threads(1)
    found: dict[str, list[Any]] = {source: [] for source in sources}
    for layout in layouts:
        parallel = ParallelConfig(**layout)
        groups = world.start(parallel, 1)
        for source in sources:
            model = architecture(config_of(Path(source)))
            rows = padded_vocab(model.vocab_size, parallel.tensor_parallel)
            try:
                gpt = hf_model.build(model, parallel, groups, vocab_rows=rows, dtype=torch.float32)
            except ConfigError as error:
                found[source].append({"refused": str(error)})
                continue
            hf_load.load_hf(gpt, Path(source), groups)
            said = [hf_compare.compare_live(gpt, Path(source), groups)]
            hf_compare.WHOLE, whole = 1000, hf_compare.WHOLE
            said.append(hf_compare.compare_live(gpt, Path(source), groups))
            hf_compare.WHOLE = whole
            if groups.rank == groups.world_size - 1:
                next(
                    p for name, p in reversed(list(gpt.named_parameters())) if "linear_proj.weight" in name
                ).data *= 1.01
            try:
                hf_compare.compare_live(gpt, Path(source), groups)
            except CheckpointError as error:
                said.append(f"error: {error}")
            found[source].append({"said": said})
        world.stop_model_parallel()
    world.stop()
    return found

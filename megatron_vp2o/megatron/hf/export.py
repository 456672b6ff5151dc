"""A live, sharded model written as a Hugging Face checkpoint: one rank writes what `hf_tensors` streams."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf import tensor_files
from megatron_vp2o.hf.convert import suspicion
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.mapping import Architecture, fill
from megatron_vp2o.hf.output import FORMAT, cast_dtype, create_files
from megatron_vp2o.hf.tensor_files import listed, write_from
from megatron_vp2o.hf.workspace import MANIFEST, Workspace, check_target
from megatron_vp2o.megatron.hf.weights import BUCKET, hf_tensors
from megatron_vp2o.parallel.groups import Groups


def export_hf(
    gpt: GPTModel,
    config: Mapping[str, Any],
    groups: Groups,
    target: Path,
    *,
    save_tokenizer: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    shard_bytes: int = 5 * 10**9,
    bucket_bytes: int = BUCKET,
) -> None:
    """Write the model to `target`, which appears whole or not at all. Collective.

    Args:
        gpt: this rank's GPTModel, without wrappers.
        config: config.json of the model; see `hf.settings.hf_config`.
        save_tokenizer: writes the tokenizer's files to a folder; called on one rank.

    Raises:
        CheckpointError: on all ranks: the model is not what `config` says, a weight is NaN or infinite, the target is taken or
            cannot be written.
    """
    model = architecture(config)
    output: _Output | None = None
    problem: str | None = None
    try:
        if groups.rank == 0:
            output, problem = _attempt(lambda: _Output(target, model, gpt.config.params_dtype, shard_bytes, overwrite))
        for name, tensor in hf_tensors(gpt, model, groups, bucket_bytes=bucket_bytes):
            if output is not None and problem is None:  # after an error, take what the other ranks still send
                _, problem = _attempt(lambda o=output, n=name, t=tensor: o.write(n, t.cpu()))  # type: ignore[misc]
        if output is not None and problem is None:
            _, problem = _attempt(lambda o=output: o.finish(config, save_tokenizer))  # type: ignore[misc]
    finally:
        if output is not None:
            output.close()
    shared: list[Any] = [problem]
    if groups.world_size > 1:
        dist.broadcast_object_list(shared, src=0, group=groups.world)
    if shared[0] is not None:
        raise CheckpointError(f"{target} was not written: {shared[0]}")


def _attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it returns, or what went wrong with the files."""
    try:
        return action(), None
    except (OSError, CheckpointError) as error:
        return None, str(error)


class _Output:
    """The files of the one rank that writes."""

    def __init__(
        self, target: Path, model: Architecture, dtype: torch.dtype, shard_bytes: int, overwrite: bool
    ) -> None:
        check_target(target, overwrite=overwrite)
        shapes = model.hf_tensors()
        kinds = {
            fill(part.name, layer, expert): cast_dtype(rule, torch.float32, dtype)
            for rule, layer, expert in model.instances()
            for part in rule.parts
        }
        self.family = model.family
        self.headers = tensor_files.shard([(name, kinds[name], shape) for name, shape in shapes.items()], shard_bytes)
        self.entries = tensor_files.entries_of(self.headers)
        self.left = set(self.entries)
        self.workspace = Workspace(target, {"export": os.getpid()}).open()
        self.files = create_files(self.workspace.folder, self.headers, self.entries, keep=False)
        self.suspect: list[str] = []

    def write(self, name: str, tensor: Tensor) -> None:
        entry = self.entries[name]
        if tuple(tensor.shape) != entry.shape or name not in self.left:
            raise CheckpointError(f"{name} {list(tensor.shape)} came twice or is not {list(entry.shape)}")
        self.left.remove(name)
        if (wrong := suspicion(tensor)) is not None and wrong != "is all zeros":  # training may make zeros
            self.suspect.append(f"{name} {wrong}")
        write_from(self.files[entry.file], tensor.to(entry.dtype).contiguous(), entry.start)

    def finish(self, config: Mapping[str, Any], save_tokenizer: Callable[[Path], None] | None) -> None:
        if self.left or self.suspect:
            problems = [*self.suspect, *(f"{name} was not there" for name in sorted(self.left))]
            raise CheckpointError(listed("these weights are not a model's", problems))
        folder = self.workspace.folder
        if save_tokenizer is not None:
            save_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        if list(self.headers) != [tensor_files.SINGLE]:
            (folder / tensor_files.INDEX).write_text(tensor_files.render_index(self.entries), encoding="utf-8")
        record = {"format": FORMAT, "direction": "export", "family": self.family, "tensors": []}
        (folder / MANIFEST).write_text(json.dumps(record) + "\n", encoding="utf-8")
        for descriptor in self.files.values():
            os.fsync(descriptor)
        self.workspace.publish()

    def close(self) -> None:
        """Give back what is held; an export that is not finished leaves nothing."""
        for descriptor in self.files.values():
            os.close(descriptor)
        shutil.rmtree(self.workspace.folder, ignore_errors=True)
        self.workspace.close()

"""Tensors of a checkpoint to and from Megatron's distributed format, with every error the same on all ranks."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.megatron.checkpoint import folder as files
from megatron_vp2o.parallel.groups import Groups


@contextmanager
def together(groups: Groups) -> Iterator[None]:
    """An OSError or CheckpointError of any rank in the body becomes a CheckpointError of every rank after it.

    No collectives in the body: a rank that fails would miss them.
    """
    problem: OSError | CheckpointError | None = None
    try:
        yield
    except (OSError, CheckpointError) as error:
        problem = error
    problems: list[Any] = [None if problem is None else str(problem)]
    if groups.world_size > 1:
        problems *= groups.world_size
        dist.all_gather_object(problems, problems[0], group=groups.world)
    for found in problems:
        if found is not None:
            raise CheckpointError(found) from problem


def write_tensors(tree: dict[str, Any], folder: Path, groups: Groups) -> None:
    """What `dist_checkpointing.save` does (serialization.py), with torch's own writer in place of Megatron's.

    Megatron's starts processes, for saving in the background, even where nothing is in the background, and a rank that
    cannot write leaves the others waiting. The files are the same; those of megatron-core 0.16 and 0.19 are alike.

    Raises:
        CheckpointError: on all ranks.
    """
    sharded, common = save_preprocess(tree)
    with together(groups):
        if groups.rank == 0:
            buffer = io.BytesIO()
            torch.save(common, buffer)
            files.write_bytes(folder / "common.pt", buffer.getvalue())
            files.write_json(folder / "metadata.json", vars(CheckpointingConfig("torch_dist", 1)))
    mine, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    try:
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(mine, False),
            storage_writer=_Writer(folder),
            planner=MCoreSavePlanner(flatten_state_dict=False),
        )
    except torch_checkpoint.CheckpointException as error:  # torch raises it on all ranks
        raise CheckpointError(_first_failure(error)) from error


class _Writer(torch_checkpoint.FileSystemWriter):
    """Reports write errors at flush(); raised inside torch.save they corrupt memory (`_Stream`)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = _Files()


class _Files(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with _Stream(io.FileIO(path, mode)) as stream:
            yield stream


class _Stream(io.BufferedWriter):
    """Keeps an error of `write` until the next `flush`, which torch.save calls at the end of each tensor.

    An exception that reaches torch.save's C++ writer through its Python stream corrupts memory (torch 2.13 on Python 3.12:
    segmentation fault in a later garbage collection).
    """

    _error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data) if self._error is None else len(data)
        except OSError as error:
            self._error = error
            return len(data)

    def flush(self) -> None:
        if self._error is not None:
            raise self._error
        super().flush()

    def fileno(self) -> int:
        self.flush()  # who asks wants to fsync
        return super().fileno()


def read_tensors(tree: dict[str, Any], path: Path, groups: Groups) -> dict[str, Any]:
    """Fill the tree from a checkpoint that has been checked. Raises CheckpointError on all ranks."""
    with together(groups), _without_deprecation():
        try:
            # Without the check of the requested shards, which is for wrong requests and has the ranks talk amid their reading.
            return dist_checkpointing.load(tree, str(path), validate_access_integrity=False)
        except torch_checkpoint.CheckpointException as error:
            raise CheckpointError(f"checkpoint {path} cannot be loaded: {_first_failure(error)}") from error
        except (CheckpointingException, RuntimeError) as error:
            raise CheckpointError(f"checkpoint {path} cannot be loaded: {error}") from error


def _first_failure(error: torch_checkpoint.CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"{cause} (rank {rank})" if isinstance(cause, OSError) else f"{type(cause).__name__}: {cause} (rank {rank})"


@contextmanager
def _without_deprecation() -> Iterator[None]:
    """megatron-core 0.19 warns on every rank that common.pt is the older of its two formats."""
    noisy = logging.getLogger("megatron.core.dist_checkpointing.strategies.common")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(level)

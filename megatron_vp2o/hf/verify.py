"""Whether a Hugging Face and a Megatron checkpoint hold the same weights, number by number, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.convert import (
    NOT_WEIGHTS,
    Progress,
    checksum,
    padded_rows,
    read_piece,
    suspicion,
)
from megatron_vp2o.hf.distributed_files import Region, StoredTensors
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.left_out import without_extras
from megatron_vp2o.hf.output import recorded_sums
from megatron_vp2o.hf.plan import Step, check_hf, check_stored, make_plan
from megatron_vp2o.hf.tensor_files import TensorFiles, bytes_of, config_of, listed, open_folder


def verify(hf: Path, megatron: Path, *, workers: int = 2, progress: Progress = lambda done, total: None) -> int:
    """Compare every tensor; where dtypes differ, after casting to Megatron's.

    Returns:
        How many Hugging Face tensors were compared.

    Raises:
        CheckpointError: listing each tensor that is missing, unknown, of another shape, damaged, or different, and where a
            manifest is there, which side has changed since the conversion.
    """
    problems: list[str] = []
    model = architecture(config_of(hf))
    files, _ = without_extras(open_folder(hf), model)
    stored = StoredTensors(megatron)
    plan = make_plan(model, padded_vocab=padded_rows(stored), stored=stored)
    for check in (
        lambda: check_hf(plan, files.entries, str(hf)),
        lambda: check_stored(plan, stored, str(megatron), prefixes=NOT_WEIGHTS),
    ):
        try:
            check()
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    sums = recorded_sums(megatron)
    steps = [step for step in plan.steps if step.pieces]
    total, done = sum(step.size for step in steps), 0
    with ThreadPoolExecutor(workers) as pool:
        # A bounded number of steps is in memory: those of the workers.
        for step, found in zip(steps, pool.map(lambda step: _compare(step, files, stored, sums), steps), strict=True):
            problems += found
            done += step.size
            progress(done, total)
    if problems:
        raise CheckpointError(listed(f"{hf} and {megatron} differ", problems))
    return len(files.entries)


def _compare(step: Step, files: TensorFiles, stored: StoredTensors, sums: Mapping[Region, bytes]) -> list[str]:
    names = ", ".join(map(str, step.pieces))
    parts, problems = [], []
    try:
        for piece in step.pieces:
            parts.append(read_piece(files, piece))
            if (wrong := suspicion(parts[-1])) is not None:
                problems.append(f"{piece} {wrong}")
        found = stored.read(step.region).reshape(step.shape)
    except CheckpointError as error:
        return [*problems, str(error)]
    expected = step.rule.operation.to_megatron(parts).to(found.dtype).contiguous()
    if not torch.equal(bytes_of(expected), bytes_of(found)):
        where = f"{step.region.key} {list(step.region.offsets)}"
        problems.append(f"{where} is not {names}: {_difference(expected, found)}{_blame(step, found, sums)}")
    return problems


def _difference(expected: Tensor, found: Tensor) -> str:
    different = (expected != found).sum().item()
    largest = (expected.double() - found.double()).abs().max().item()
    return f"{different} of {found.numel()} numbers, by up to {largest:.3g}"


def _blame(step: Step, found: Tensor, sums: Mapping[Region, bytes]) -> str:
    recorded = sums.get(step.region)
    if recorded is None:
        return ""
    side = "the Hugging Face" if bytes.fromhex(checksum(found)) == recorded else "the Megatron"
    return f" ({side} side has changed since the conversion)"

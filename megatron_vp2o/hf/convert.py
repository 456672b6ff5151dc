"""Conversion of whole checkpoints, step by step, in both directions.

Each step reads its tensors, checks the numbers, writes them on the other side, and reads back what it wrote; what it did is
recorded with checksums in `conversion.json`. Several threads take batches of steps; the memory is theirs times the largest
step (`plan.SLAB`), whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vp2o.config.parameters import padded_vocab
from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf import distributed_files, tensor_files
from megatron_vp2o.hf.distributed_files import Item, Region, StoredTensors
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.left_out import without_extras
from megatron_vp2o.hf.mapping import Architecture, Copy
from megatron_vp2o.hf.output import (
    CARRIED,
    FORMAT,
    carry,
    cast_dtype,
    create_files,
    file_headers,
    recorded_sums,
    write_companions,
    write_manifest,
)
from megatron_vp2o.hf.plan import Batch, Layout, Piece, Plan, Step, check_hf, check_stored, make_plan
from megatron_vp2o.hf.tensor_files import Entry, TensorFiles, config_of, listed, open_folder, raw, write_from
from megatron_vp2o.hf.workspace import Workspace, check_target, working

NOT_WEIGHTS = ("optimizer.", "actor.", "rng", "chained_", "rerun_state", "iteration")
"""Beginnings of the keys of a training checkpoint that are not the model's."""
_BATCH = (32 * 2**20, 2**30)
_BATCH_STEPS = 400

Progress = Callable[[int, int], None]
"""Called with the bytes done and in all."""


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        dtype: of the weights written; None for what they have.
        workers: threads, each with a step in memory.
        overwrite: replace an earlier conversion.
        suspect: take NaN, infinity and matrices of zeros as they are.
        read_back: read every chunk again once it is written, and compare.
    """

    dtype: torch.dtype | None = None
    workers: int = 2
    overwrite: bool = False
    suspect: bool = False
    read_back: bool = True
    progress: Progress = field(default=lambda done, total: None)


@dataclass(frozen=True)
class Report:
    """What a conversion did. `peak_bytes` is the process's largest resident memory so far."""

    target: Path
    tensors: int
    size: int
    seconds: float
    cpu_seconds: float
    resumed_bytes: int
    start_bytes: int
    peak_bytes: int
    left_out: tuple[str, ...] = ()
    """Sentences about tensors and files of the source that are not part of the model."""


def to_megatron(
    source: Path,
    target: Path,
    *,
    layout: Layout | None = None,
    options: Options | None = None,
    finish: Callable[[Path, Architecture], None] | None = None,
) -> Report:
    """A Hugging Face checkpoint as a Megatron distributed checkpoint.

    Args:
        layout: what the stored chunks are cut for; the result loads under any.
        finish: called with the finished folder, before it gets its name.

    Raises:
        CheckpointError: the source is damaged or cannot be converted, or the target is taken. Nothing is left behind.
    """
    options, layout = options or Options(), layout or Layout()
    begin = _Begin()
    model = architecture(config_of(source))
    files, left_out = without_extras(open_folder(source), model)
    _check_apart(source, target, options)
    _check_layout(model, layout)
    plan = make_plan(model, layout=layout, padded_vocab=padded_vocab(model.vocab_size, layout.tensor))
    check_hf(plan, files.entries, str(source))
    dtypes = _stored_dtypes(plan, files.entries, options.dtype)
    batches = _batches(plan, options.workers)
    fingerprint = {
        "format": FORMAT,
        "source": _identity(source, files.headers),
        "layout": asdict(layout),
        "dtype": str(options.dtype),
        "batches": len(batches),
    }
    needed = sum(math.prod(shape) * dtypes[key].itemsize for key, shape in plan.shapes.items())
    with working(target, fingerprint, overwrite=options.overwrite, needed=needed) as workspace:
        run = _Run(workspace, options, sum(batch.size for batch in batches))

        def convert(number: int, batch: Batch) -> Any:
            name = f"__{number}_0.distcp"
            records: list[Any] = []
            written: list[tuple[Item, int]] = []
            with (workspace.folder / name).open("wb") as stream:
                for step in plan.steps.batch(batch):
                    parts = [read_piece(files, piece) for piece in step.pieces]
                    for piece, part in zip(step.pieces, parts, strict=True):
                        run.inspect(str(piece), part)
                    tensor = _to_megatron(step, parts, dtypes[step.region.key])
                    for region, start in step.written():
                        chunk = _chunk(step, tensor, region, start)
                        written.append(distributed_files.write_item(stream, chunk, region, name))
                    records.append(_record(step, parts, tensor[: step.shape[0]]))
                    run.advance(step.size)
                stream.flush()
                os.fsync(stream.fileno())
            if options.read_back:
                for item in distributed_files.reads_back(workspace.folder / name, written):
                    run.problem(
                        f"{item.region.key} {list(item.region.offsets)} reads back otherwise than it was written"
                    )
            return {"records": records, "items": [_packed(item) for item, _ in written]}

        run.batches(batches, convert)
        count, tensors, size = len(batches), len(files.entries), files.size
        carry(source, files, workspace.folder / CARRIED)
        files.entries.clear()  # what is left to do needs memory of its own for every tensor
        files.headers.clear()
        items = (_unpacked(packed) for number in range(count) for packed in workspace.recorded(number)["items"])
        distributed_files.write_rest(workspace.folder, items, plan.shapes, plan.aliases, plan.nothings())
        more = {"layout": asdict(layout), "left_out": left_out}
        write_manifest(workspace, "to_megatron", source, model, count, more)
        report = begin.report(target, tensors, size, run.resumed, left_out)
        if finish is not None:
            finish(workspace.folder, model)
    return report


def to_hf(
    source: Path,
    target: Path,
    *,
    like: Path | None = None,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
    options: Options | None = None,
) -> Report:
    """A Megatron distributed checkpoint (converted, or saved by a training run) as a Hugging Face checkpoint.

    Args:
        like: a Hugging Face folder of the same model: its config, tokenizer and division into files are taken.
            None: what the checkpoint carries of its source.
        config: config.json to use where there is neither.
        shard_bytes: largest file where the division is not taken over.

    Raises:
        CheckpointError: as `to_megatron`.
    """
    options = options or Options()
    begin = _Begin()
    stored = StoredTensors(source)
    _check_apart(source, target, options)
    template = like or (source / CARRIED if (source / CARRIED / "config.json").is_file() else None)
    if template is None and config is None:
        raise CheckpointError(
            f"{source} carries no config.json (it was not converted from a Hugging Face checkpoint): name the folder of the "
            "model that the run started from, with --like"
        )
    config = config_of(template) if template is not None else config
    assert config is not None
    model = architecture(config)
    plan = make_plan(model, padded_vocab=padded_rows(stored), stored=stored)
    check_stored(plan, stored, str(source), prefixes=NOT_WEIGHTS)
    sums = recorded_sums(source)
    headers = file_headers(plan, stored, template, shard_bytes, options.dtype)
    entries = tensor_files.entries_of(headers)
    check_hf(plan, entries, "the output")
    batches = _batches(plan, options.workers)
    fingerprint = {
        "format": FORMAT,
        "source": _identity(source, {path.name: b"" for path in source.glob("*.distcp")}),
        "headers": hashlib.sha256(b"".join(headers[name] for name in sorted(headers))).hexdigest(),
        "config": config,
        "batches": len(batches),
    }
    needed = sum(entry.size for entry in entries.values())
    with working(target, fingerprint, overwrite=options.overwrite, needed=needed) as workspace:
        run = _Run(workspace, options, sum(batch.size for batch in batches))
        descriptors = create_files(workspace.folder, headers, entries, keep=bool(workspace.done))

        def convert(number: int, batch: Batch) -> Any:
            records = []
            touched = set()
            for step in plan.steps.batch(batch):
                if not step.pieces:
                    continue
                tensor = stored.read(step.region).reshape(step.shape)
                run.inspect(str(step.region.key) + str(list(step.region.offsets)), tensor)
                parts = [part.contiguous() for part in step.rule.operation.to_hf(tensor)]
                kept = []
                for piece, part in zip(step.pieces, parts, strict=True):
                    entry = entries[piece.name]
                    part = part.to(entry.dtype)
                    offset = entry.start + piece.first * entry.row_bytes
                    write_from(descriptors[entry.file], part, offset)
                    touched.add(entry.file)
                    kept.append(part)
                records.append(_record(step, kept, tensor))
                recorded = sums.get(step.region)
                if recorded not in (None, bytes.fromhex(records[-1]["megatron"]["sha256"])):
                    run.problem(f"{step.region.key} {list(step.region.offsets)} has changed since it was converted")
                run.advance(step.size)
            for name in touched:
                os.fsync(descriptors[name])
            if options.read_back:
                _read_back_hf(TensorFiles(workspace.folder, entries, headers, False), records)
            return {"records": records}

        try:
            run.batches(batches, convert)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
        write_companions(workspace.folder, source, template, config, headers, entries)
        write_manifest(workspace, "to_hf", source, model, len(batches), {})
        count = len(entries)
        entries.clear()  # before the same are read from what was written
        sums.clear()
        check_hf(plan, open_folder(workspace.folder).entries, str(workspace.folder))
    return begin.report(target, count, needed, run.resumed)


# --- one step ---------------------------------------------------------------------------------------------------------


def read_piece(files: TensorFiles, piece: Piece) -> Tensor:
    """What a step sees of a Hugging Face tensor."""
    rows = files.read(files.entries[piece.name], piece.first, piece.count)
    return rows[0] if piece.single else rows


def _to_megatron(step: Step, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The tensor with its padding."""
    if not parts:
        return torch.zeros((step.padding, *step.shape[1:]), dtype=dtype)
    tensor = step.rule.operation.to_megatron(parts).to(dtype)
    if step.padding:
        tensor = torch.cat([tensor, tensor.new_zeros((step.padding, *step.shape[1:]))])
    return tensor


def _chunk(step: Step, tensor: Tensor, region: Region, start: int) -> Tensor:
    axis = step.rule.split or 0
    size = region.sizes[len(region.sizes) - len(step.shape) + axis]
    return tensor.narrow(axis, start, size)


def checksum(tensor: Tensor) -> str:
    """SHA-256 of the bytes."""
    return hashlib.sha256(raw(tensor.contiguous())).hexdigest()


def _record(step: Step, parts: Sequence[Tensor], tensor: Tensor) -> dict[str, Any]:
    sums = [checksum(part) for part in parts]
    same = isinstance(step.rule.operation, Copy) and bool(parts) and parts[0].dtype == tensor.dtype
    return {
        "megatron": {
            "name": step.region.key,
            "offsets": list(step.region.offsets),
            "sizes": list(step.region.sizes),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "sha256": sums[0] if same else checksum(tensor),
        },
        "hf": [
            {
                "name": piece.name,
                "first": piece.first,
                "count": piece.count,
                "dtype": str(part.dtype).removeprefix("torch."),
                "sha256": total,
            }
            for piece, part, total in zip(step.pieces, parts, sums, strict=True)
        ],
    }


def _read_back_hf(files: TensorFiles, records: Sequence[dict[str, Any]]) -> None:
    for record in records:
        for part in record["hf"]:
            entry = files.entries[part["name"]]
            if checksum(files.read(entry, part["first"], part["count"])) != part["sha256"]:
                raise CheckpointError(f"{files.folder / entry.file}: {entry.name} reads back otherwise; check the disk")


def suspicion(tensor: Tensor) -> str | None:
    """What is wrong with the numbers of a weight: NaN, infinity, or a whole matrix of zeros (a hole in a file)."""
    low, high = (bound.item() for bound in torch.aminmax(tensor))
    if math.isnan(low) or math.isnan(high):
        return "has NaN"
    if math.isinf(low) or math.isinf(high):
        return "has infinities"
    if tensor.dim() > 1 and low == high == 0:
        return "is all zeros"
    return None


class _Run:
    """The batches of a conversion: threads, progress, and what was found wrong on the way."""

    def __init__(self, workspace: Workspace, options: Options, total: int) -> None:
        self.workspace, self.options, self.total = workspace, options, total
        self.problems: list[str] = []
        self.done = self.resumed = 0
        self._guard = threading.Lock()

    def inspect(self, name: str, tensor: Tensor) -> None:
        if not self.options.suspect and (problem := suspicion(tensor)):
            self.problem(f"{name} {problem} (--suspect takes it as it is)")

    def problem(self, text: str) -> None:
        with self._guard:
            self.problems.append(text)

    def advance(self, size: int) -> None:
        with self._guard:
            self.done += size
            self.options.progress(self.done, self.total)

    def batches(self, batches: Sequence[Batch], convert: Callable[[int, Batch], Any]) -> None:
        """Do what is not done yet. Raises CheckpointError listing all suspect tensors."""

        def one(number: int) -> None:
            result = convert(number, batches[number])
            if not self.problems:
                self.workspace.record(number, result)

        for number in self.workspace.done:
            self.resumed += batches[number].size
        self.advance(self.resumed)
        left = [number for number in range(len(batches)) if number not in self.workspace.done]
        with ThreadPoolExecutor(self.options.workers) as pool:
            futures = [pool.submit(one, number) for number in left]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if self.problems:
            raise CheckpointError(listed("the source is damaged", sorted(self.problems)))


# --- around the steps -------------------------------------------------------------------------------------------------


class _Begin:
    def __init__(self) -> None:
        self.time, self.cpu, self.memory = time.monotonic(), time.process_time(), peak_memory()

    def report(self, target: Path, tensors: int, size: int, resumed: int, left_out: Sequence[str] = ()) -> Report:
        seconds, cpu = time.monotonic() - self.time, time.process_time() - self.cpu
        return Report(target, tensors, size, seconds, cpu, resumed, self.memory, peak_memory(), tuple(left_out))


def peak_memory() -> int:
    """The largest resident memory that this process has had, in bytes."""
    # Not getrusage: what it says of a process begins with the memory of the one that started it.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def _batches(plan: Plan, workers: int) -> list[Batch]:
    """The steps in batches of about equal size, enough of them for all workers."""
    total = sum(step.size for step in plan.steps)
    return plan.steps.batches(min(_BATCH[1], max(_BATCH[0], total // (4 * workers))), _BATCH_STEPS)


def _check_apart(source: Path, target: Path, options: Options) -> None:
    if target.resolve() == source.resolve() or source.resolve().is_relative_to(target.resolve()):
        raise CheckpointError(f"the result cannot take the place of its source {source}: name another folder")
    check_target(target, overwrite=options.overwrite)


def _check_layout(model: Architecture, layout: Layout) -> None:
    problems = []
    groups = model.settings["num_query_groups"]
    for what, count, by, ways in (
        ("layers", model.num_layers, "pipeline", layout.pipeline),
        ("experts", model.num_experts, "expert", layout.expert),
        ("key/value heads", groups, "tensor", layout.tensor),
    ):
        if ways < 1 or count % ways:
            problems.append(f"{count} {what} are not divisible by {by} parallelism of {ways}")
    if problems:
        raise CheckpointError(listed("this layout does not divide the model", problems))


def _identity(folder: Path, files: Mapping[str, bytes]) -> list[Any]:
    """Tells a source from a changed one, without reading its data."""
    found: list[Any] = []
    for name in sorted(files):
        status = (folder / name).stat()
        found.append([name, status.st_size, status.st_mtime_ns, hashlib.sha256(files[name]).hexdigest()])
    return found


def _stored_dtypes(plan: Plan, entries: Mapping[str, Entry], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """One for each stored tensor. Raises CheckpointError where the tensors that it stacks differ."""
    found: dict[str, set[torch.dtype]] = {}
    for step in plan.steps:
        for piece in step.pieces:
            own = entries[piece.name].dtype
            found.setdefault(step.region.key, set()).add(cast_dtype(step.rule, own, dtype))
    mixed = [f"{key}: {', '.join(sorted(map(str, kinds)))}" for key, kinds in found.items() if len(kinds) > 1]
    if mixed:
        raise CheckpointError(listed("Megatron stores these as one tensor each; give --dtype", mixed))
    return {key: kinds.pop() for key, kinds in found.items()}


def padded_rows(stored: StoredTensors) -> int | None:
    """Rows of the stored embedding."""
    shape = stored.shapes.get("embedding.word_embeddings.weight")
    return None if shape is None else shape[0]


def _packed(item: Item) -> list[Any]:
    region = item.region
    kind = tensor_files.NAMES[item.dtype]
    return [region.key, list(region.offsets), list(region.sizes), kind, item.file, item.start, item.length]


def _unpacked(packed: Sequence[Any]) -> Item:
    key, offsets, sizes, kind, file, start, length = packed
    return Item(Region(key, tuple(offsets), tuple(sizes)), tensor_files.DTYPES[kind], file, start, length)

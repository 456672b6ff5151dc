"""Conversion of whole checkpoints, step by step, in both directions.

Each step reads its tensors, checks the numbers, writes them on the other side, and reads back what it wrote; what it did is
recorded with checksums in `conversion.json`. Several threads take batches of steps; the memory is theirs times the largest
step (`plan.SLAB`), whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf import distributed_files, tensor_files
from megatron_vp2o.hf.distributed_files import Item, Region, StoredTensors
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.mapping import Architecture, Copy, Rule
from megatron_vp2o.hf.plan import Layout, Piece, Plan, Step, check_hf, check_stored, make_plan
from megatron_vp2o.hf.tensor_files import Entry, TensorFiles, bytes_of, config_of, listed, open_folder, write_from
from megatron_vp2o.hf.workspace import MANIFEST, Workspace, check_target, working

FORMAT = 1
CARRIED = "hf"
"""Folder in a converted Megatron checkpoint with all files of the source but the weights, and the weights' headers."""
HEADERS = "headers"
NOT_WEIGHTS = ("optimizer.", "actor.", "rng", "chained_", "rerun_state", "iteration")
"""Beginnings of the keys of a training checkpoint that are not the model's."""
_BATCH = (32 * 2**20, 2**30)
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".index.json.lock")

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
    resumed_bytes: int
    start_bytes: int
    peak_bytes: int


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
    files = open_folder(source)
    _check_apart(source, target, options)
    model = architecture(config_of(source))
    _check_layout(model, layout)
    plan = make_plan(model, layout=layout, padded_vocab=padded_vocab(model.vocab_size, layout.tensor))
    check_hf(plan, files.entries, str(source))
    dtypes = _stored_dtypes(plan, files.entries, options.dtype)
    batches = _batches(plan.steps, options.workers)
    fingerprint = {
        "format": FORMAT,
        "source": _identity(source, files.headers),
        "layout": asdict(layout),
        "dtype": str(options.dtype),
        "batches": len(batches),
    }
    needed = sum(math.prod(shape) * dtypes[key].itemsize for key, shape in plan.shapes.items())
    with working(target, fingerprint, overwrite=options.overwrite, needed=needed) as workspace:
        run = _Run(workspace, options, sum(step_bytes(step) for step in plan.steps))

        def convert(number: int, steps: Sequence[Step]) -> Any:
            name = f"__{number}_0.distcp"
            records, items = [], []
            with (workspace.folder / name).open("wb") as stream:
                for step in steps:
                    parts = [read_piece(files, piece) for piece in step.pieces]
                    for piece, part in zip(step.pieces, parts, strict=True):
                        run.inspect(str(piece), part)
                    tensor = _to_megatron(step, parts, dtypes[step.region.key])
                    written = [
                        distributed_files.write_item(stream, _chunk(step, tensor, region, start), region, name)
                        for region, start in step.written()
                    ]
                    items += written
                    records.append(_record(step, parts, tensor[: step.shape[0]]))
                    run.advance(step_bytes(step))
                stream.flush()
                os.fsync(stream.fileno())
            if options.read_back:
                _read_back(workspace.folder, records, items, steps)
            return {"records": records, "items": [_packed(item) for item in items]}

        run.batches(batches, convert)
        done = [workspace.done[number] for number in range(len(batches))]
        items = [_unpacked(packed) for batch in done for packed in batch["items"]]
        distributed_files.write_rest(workspace.folder, items, plan.shapes, plan.aliases, plan.nothings())
        check_stored(plan, StoredTensors(workspace.folder), str(workspace.folder))
        _carry(source, files, workspace.folder / CARRIED)
        records = [record for batch in done for record in batch["records"]]
        _write_manifest(workspace.folder, "to_megatron", source, model, records, {"layout": asdict(layout)})
        if finish is not None:
            finish(workspace.folder, model)
    return begin.report(target, len(files.entries), files.size, run.resumed)


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
    headers = _headers(plan, stored, template, shard_bytes, options.dtype)
    entries = tensor_files.entries_of(headers)
    check_hf(plan, entries, "the output")
    batches = _batches(plan.steps, options.workers)
    fingerprint = {
        "format": FORMAT,
        "source": _identity(source, {path.name: b"" for path in source.glob("*.distcp")}),
        "headers": hashlib.sha256(b"".join(headers[name] for name in sorted(headers))).hexdigest(),
        "config": config,
        "batches": len(batches),
    }
    needed = sum(entry.size for entry in entries.values())
    with working(target, fingerprint, overwrite=options.overwrite, needed=needed) as workspace:
        run = _Run(workspace, options, sum(step_bytes(step) for step in plan.steps))
        descriptors = _create(workspace.folder, headers, entries, keep=bool(workspace.done))

        def convert(number: int, steps: Sequence[Step]) -> Any:
            records = []
            touched = set()
            for step in steps:
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
                recorded = sums.get((step.region.key, step.region.offsets, step.region.sizes))
                if recorded not in (None, records[-1]["megatron"]["sha256"]):
                    run.problem(f"{step.region.key} {list(step.region.offsets)} has changed since it was converted")
                run.advance(step_bytes(step))
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
        records = [record for number in range(len(batches)) for record in workspace.done[number]["records"]]
        _write_companions(workspace.folder, source, template, config, headers, entries)
        _write_manifest(workspace.folder, "to_hf", source, model, records, {})
        check_hf(plan, open_folder(workspace.folder).entries, str(workspace.folder))
    return begin.report(target, len(entries), needed, run.resumed)


def padded_vocab(vocab_size: int, tensor: int) -> int:
    """Rows of Megatron's embedding: the smallest multiple of 64 (of 8 * `tensor`, if that is more) that holds them all."""
    unit = max(64, 8 * tensor)
    return math.ceil(vocab_size / unit) * unit


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
    return hashlib.sha256(memoryview(bytes_of(tensor.contiguous()).numpy())).hexdigest()


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


def recorded_sums(folder: Path) -> dict[Any, str]:
    """(key, offsets, sizes) -> checksum, from the manifest of the conversion that made a Megatron checkpoint; empty where
    there is none. Raises CheckpointError for a manifest that cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        found = [record["megatron"] for record in json.loads(path.read_text(encoding="utf-8"))["tensors"]]
        return {(item["name"], tuple(item["offsets"]), tuple(item["sizes"])): item["sha256"] for item in found}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove it to go without its checksums") from error


def _read_back(folder: Path, records: Sequence[dict[str, Any]], items: Sequence[Item], steps: Sequence[Step]) -> None:
    """What was written is what was meant. Raises CheckpointError."""
    stored = StoredTensors.__new__(StoredTensors)
    by_key: dict[str, list[Item]] = {}
    for item in items:
        by_key.setdefault(item.region.key, []).append(item)
    stored.folder, stored._items = folder, by_key
    stored.dtypes = {key: found[0].dtype for key, found in by_key.items()}
    for record, step in zip(records, steps, strict=True):
        if step.pieces and checksum(stored.read(step.region)) != record["megatron"]["sha256"]:
            raise CheckpointError(
                f"{folder}: {step.region.key} reads back otherwise than it was written; check the disk"
            )


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

    def batches(self, batches: Sequence[Sequence[Step]], convert: Callable[[int, Sequence[Step]], Any]) -> None:
        """Do what is not done yet. Raises CheckpointError listing all suspect tensors."""

        def one(number: int) -> None:
            result = convert(number, batches[number])
            if not self.problems:
                self.workspace.record(number, result)

        for number in self.workspace.done:
            self.resumed += sum(step_bytes(step) for step in batches[number])
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
        self.time, self.memory = time.monotonic(), peak_memory()

    def report(self, target: Path, tensors: int, size: int, resumed: int) -> Report:
        return Report(target, tensors, size, time.monotonic() - self.time, resumed, self.memory, peak_memory())


def peak_memory() -> int:
    """The largest resident memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_bytes(step: Step) -> int:
    """A measure of a step's work: its bytes, if they were bfloat16."""
    return math.prod(step.shape) * 2 if step.pieces else 0


def _batches(steps: Sequence[Step], workers: int) -> list[list[Step]]:
    """Consecutive steps of about equal size, enough of them for all workers."""
    total = sum(map(step_bytes, steps))
    most = min(_BATCH[1], max(_BATCH[0], total // (4 * workers)))
    batches: list[list[Step]] = [[]]
    filled = 0
    for step in steps:
        if filled and filled + step_bytes(step) > most:
            batches.append([])
            filled = 0
        batches[-1].append(step)
        filled += step_bytes(step)
    return batches


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
            found.setdefault(step.region.key, set()).add(_cast(step.rule, own, dtype))
    mixed = [f"{key}: {', '.join(sorted(map(str, kinds)))}" for key, kinds in found.items() if len(kinds) > 1]
    if mixed:
        raise CheckpointError(listed("Megatron stores these as one tensor each; give --dtype", mixed))
    return {key: kinds.pop() for key, kinds in found.items()}


def _cast(rule: Rule, own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return own if dtype is None or rule.keeps_dtype else dtype


def padded_rows(stored: StoredTensors) -> int | None:
    """Rows of the stored embedding."""
    shape = stored.shapes.get("embedding.word_embeddings.weight")
    return None if shape is None else shape[0]


def _headers(
    plan: Plan, stored: StoredTensors, template: Path | None, shard_bytes: int, dtype: torch.dtype | None
) -> dict[str, bytes]:
    """The files to write: those of the template if its dtypes fit, else a division of our own."""
    tensors: dict[str, tuple[str, torch.dtype, tuple[int, ...]]] = {}
    shapes = plan.architecture.hf_tensors()
    for step in plan.steps:
        for piece in step.pieces:
            kind = _cast(step.rule, stored.dtypes[step.region.key], dtype)
            tensors[piece.name] = (piece.name, kind, shapes[piece.name])
    known = {} if template is None else _template_headers(template)
    entries = tensor_files.entries_of(known)
    if entries.keys() == tensors.keys() and all(
        (entry.dtype, entry.shape) == tensors[name][1:] for name, entry in entries.items()
    ):
        return known
    return tensor_files.shard(list(tensors.values()), shard_bytes)


def _template_headers(template: Path) -> dict[str, bytes]:
    if (template / HEADERS).is_dir():
        return {path.name: path.read_bytes() for path in sorted((template / HEADERS).iterdir())}
    if (template / tensor_files.INDEX).is_file() or (template / tensor_files.SINGLE).is_file():
        return open_folder(template).headers
    return {}


def _create(folder: Path, headers: Mapping[str, bytes], entries: Mapping[str, Entry], *, keep: bool) -> dict[str, int]:
    """Files of their final length with their headers, open for writing at any place."""
    sizes = {name: len(header) for name, header in headers.items()}
    for entry in entries.values():
        sizes[entry.file] += entry.size
    descriptors = {}
    for name, header in headers.items():
        descriptors[name] = os.open(folder / name, os.O_RDWR | os.O_CREAT | (0 if keep else os.O_TRUNC), 0o644)
        os.pwrite(descriptors[name], header, 0)
        os.ftruncate(descriptors[name], sizes[name])
    return descriptors


def companions(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder that are not weights, nor a record of ours."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.endswith(_WEIGHT_FILES) and path.name != MANIFEST
    )


def _carry(source: Path, files: TensorFiles, folder: Path) -> None:
    (folder / HEADERS).mkdir(parents=True, exist_ok=True)
    for path in companions(source):
        shutil.copyfile(path, folder / path.name)
    for name, header in files.headers.items():
        (folder / HEADERS / name).write_bytes(header)


def _write_companions(
    folder: Path,
    source: Path,
    template: Path | None,
    config: Mapping[str, Any],
    headers: Mapping[str, bytes],
    entries: Mapping[str, Entry],
) -> None:
    """Config, tokenizer and index."""
    own_division = template is None or _template_headers(template) != dict(headers)
    if template is not None:
        for path in companions(template):
            if path.name != tensor_files.INDEX or not own_division:
                shutil.copyfile(path, folder / path.name)
    else:
        _write_json(folder / "config.json", config)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if own_division:
        if list(headers) != [tensor_files.SINGLE]:
            (folder / tensor_files.INDEX).write_text(tensor_files.render_index(entries), encoding="utf-8")
        kinds = {str(entry.dtype).removeprefix("torch.") for entry in entries.values() if len(entry.shape) > 1}
        changed = dict(config) | ({"dtype": kinds.pop()} if len(kinds) == 1 else {})
        changed.pop("torch_dtype", None)  # the name before transformers 5
        if changed != config:
            _write_json(folder / "config.json", changed)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_manifest(
    folder: Path, direction: str, source: Path, model: Architecture, records: Sequence[Any], more: dict[str, Any]
) -> None:
    content = {
        "format": FORMAT,
        "direction": direction,
        "source": source.name,
        "family": model.family,
        "versions": {"torch": torch.__version__},
        **more,
        "tensors": list(records),
    }
    (folder / MANIFEST).write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


def _packed(item: Item) -> list[Any]:
    region = item.region
    kind = tensor_files.NAMES[item.dtype]
    return [region.key, list(region.offsets), list(region.sizes), kind, item.file, item.start, item.length]


def _unpacked(packed: Sequence[Any]) -> Item:
    key, offsets, sizes, kind, file, start, length = packed
    return Item(Region(key, tuple(offsets), tuple(sizes)), tensor_files.DTYPES[kind], file, start, length)

"""The files around the weights: which files a Hugging Face checkpoint is divided into, what is carried along with the
weights, and the record of a conversion."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf import tensor_files
from megatron_vp2o.hf.distributed_files import Region, StoredTensors
from megatron_vp2o.hf.mapping import Architecture, Rule
from megatron_vp2o.hf.plan import Plan
from megatron_vp2o.hf.tensor_files import Entry, TensorFiles, open_folder
from megatron_vp2o.hf.workspace import MANIFEST, Workspace

FORMAT = 1
CARRIED = "hf"
"""Folder in a converted Megatron checkpoint with all files of the source but the weights, and the weights' headers."""
HEADERS = "headers"
COMPARED = "compared.txt"
"""File in a converted Megatron checkpoint: a sentence on how its logits compare with those of transformers."""
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5")


def cast_dtype(rule: Rule, own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to write a tensor in that has `own`."""
    return own if dtype is None or rule.keeps_dtype else dtype


def file_headers(
    plan: Plan, stored: StoredTensors, template: Path | None, shard_bytes: int, dtype: torch.dtype | None
) -> dict[str, bytes]:
    """The files to write: those of the template if its dtypes fit, else a division of our own."""
    known = {} if template is None else _template_headers(template)
    entries = tensor_files.entries_of(known)
    kinds: dict[str, torch.dtype] = {}
    for step in plan.steps:
        for piece in step.pieces:
            kinds[piece.name] = cast_dtype(step.rule, stored.dtypes[step.region.key], dtype)
    shapes = plan.architecture.hf_tensors()
    if entries.keys() == kinds.keys() and all(
        (entry.dtype, entry.shape) == (kinds[name], shapes[name]) for name, entry in entries.items()
    ):
        return known
    return tensor_files.shard([(name, kind, shapes[name]) for name, kind in kinds.items()], shard_bytes)


def _template_headers(template: Path) -> dict[str, bytes]:
    if (template / HEADERS).is_dir():
        return {path.name: path.read_bytes() for path in sorted((template / HEADERS).iterdir())}
    if (template / tensor_files.INDEX).is_file() or (template / tensor_files.SINGLE).is_file():
        return open_folder(template).headers
    return {}


def create_files(
    folder: Path, headers: Mapping[str, bytes], entries: Mapping[str, Entry], *, keep: bool
) -> dict[str, int]:
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
    """The files of a Hugging Face folder that are not weights, nor a record of ours, nor an index of files not read."""
    other = {MANIFEST} | ({tensor_files.INDEX} if (folder / tensor_files.SINGLE).is_file() else set())
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.endswith(_WEIGHT_FILES) and path.name not in other
    )


def carry(source: Path, files: TensorFiles, folder: Path) -> None:
    (folder / HEADERS).mkdir(parents=True, exist_ok=True)
    for path in companions(source):
        shutil.copyfile(path, folder / path.name)
    for name, header in files.headers.items():
        (folder / HEADERS / name).write_bytes(header)


def write_companions(
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


def write_manifest(
    workspace: Workspace, direction: str, source: Path, model: Architecture, batches: int, more: dict[str, Any]
) -> None:
    """One JSON object, a tensor a line."""
    head = {
        "format": FORMAT,
        "direction": direction,
        "source": source.name,
        "family": model.family,
        "versions": {"torch": torch.__version__},
        **more,
    }
    with (workspace.folder / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(head)[:-1] + ', "tensors": [')
        separator = "\n"
        for number in range(batches):
            for record in workspace.recorded(number)["records"]:
                stream.write(separator + json.dumps(record, separators=(",", ":")))
                separator = ",\n"
        stream.write("\n]}\n")


def recorded_sums(folder: Path) -> dict[Region, bytes]:
    """The SHA-256 of every region, from the manifest of the conversion that made a Megatron checkpoint; empty where there is
    none. Raises CheckpointError for a manifest that cannot be read."""
    path = folder / MANIFEST
    found: dict[Region, bytes] = {}
    if not path.is_file():
        return found
    sizes: dict[tuple[int, ...], tuple[int, ...]] = {}  # shared: experts are many and alike
    try:
        with path.open(encoding="utf-8") as lines:  # one by one, as `write_manifest` wrote them
            line = next(lines)
            while not line.startswith("]"):
                line = next(lines)
                if line.startswith("{"):
                    item = json.loads(line.rstrip(",\n"))["megatron"]
                    size = tuple(item["sizes"])
                    region = Region(sys.intern(item["name"]), tuple(item["offsets"]), sizes.setdefault(size, size))
                    found[region] = bytes.fromhex(item["sha256"])
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} cannot be read ({why}): remove it to go without its checksums") from error
    return found

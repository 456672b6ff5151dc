"""Conversion of whole checkpoints: there and back to the last byte, and every way of damaging one is found and named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf import convert, workspace
from megatron_vp2o.hf.convert import Options, to_hf, to_megatron
from megatron_vp2o.hf.distributed_files import Region, StoredTensors
from megatron_vp2o.hf.plan import Layout
from megatron_vp2o.hf.tensor_files import open_folder
from megatron_vp2o.hf.verify import verify
from tests.hf import models
from tools.convert import main

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE in several files; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("source") / "qwen3"
    models.save("qwen3_moe", folder)
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    target = source.parent / "megatron"
    to_megatron(source, target, layout=Layout(tensor=2, expert_tensor=2))
    return target


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "hf"))


def _same_files(a: Path, b: Path) -> None:
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir() if path.name != workspace.MANIFEST)
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def _nothing_left(folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if path.name.startswith((".converting", "out"))] == []


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*models.FAMILIES, *models.VARIANTS])
def test_there_and_back_is_the_same_to_the_last_byte(tmp_path: Path, name: str) -> None:
    dtype = torch.bfloat16 if name in ("mixtral", "deepseek_v3") else torch.float32
    models.save(name, tmp_path / "hf", dtype=dtype)
    to_megatron(tmp_path / "hf", tmp_path / "megatron", layout=Layout(tensor=2, expert_tensor=2))
    to_hf(tmp_path / "megatron", tmp_path / "back")
    _same_files(tmp_path / "hf", tmp_path / "back")
    assert verify(tmp_path / "back", tmp_path / "megatron") == len(open_folder(tmp_path / "hf").entries)


def test_everything_but_the_weights_is_carried_along(source: Path, converted: Path, tmp_path: Path) -> None:
    to_hf(converted, tmp_path / "back")
    _same_files(source, tmp_path / "back")


def test_the_stored_numbers_are_the_transformed_ones(source: Path, converted: Path) -> None:
    """Against a naive reading of the layout."""
    entries = open_folder(source)
    stored = StoredTensors(converted)

    def hf(name: str) -> torch.Tensor:
        return entries.read(entries.entries[name], 0, entries.entries[name].rows)

    key = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    found = stored.read(Region(key, (1, 2, 0, 0), (1, 1, 32, 32))).view(32, 32)
    assert torch.equal(found[16:], hf(EXPERT))
    assert torch.equal(found[:16], hf(EXPERT.replace("up_proj", "gate_proj")))
    embedding = stored.read(Region("embedding.word_embeddings.weight", (0, 0), (128, 32)))
    assert torch.equal(embedding[:104], hf("model.embed_tokens.weight")) and not embedding[104:].any()
    pieces = {item.region.sizes for item in stored.items("decoder.layers.self_attention.linear_proj.weight")}
    assert pieces == {(1, 32, 32)}  # cut for two tensor-parallel ranks
    with pytest.raises(CheckpointError, match="numbers of"):
        stored.read(Region("output_layer.weight", (64, 0), (128, 32)))


def test_dtype_conversion_there_and_back(source: Path, tmp_path: Path) -> None:
    bf16 = Options(dtype=torch.bfloat16)
    to_megatron(source, tmp_path / "megatron", options=bf16)
    assert verify(source, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back")
    found, expected = open_folder(tmp_path / "back"), open_folder(source)
    for name, entry in found.entries.items():
        assert entry.dtype is torch.bfloat16
        whole = expected.read(expected.entries[name], 0, entry.rows)
        assert torch.equal(found.read(entry, 0, entry.rows), whole.bfloat16())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_files_of_another_size(source: Path, converted: Path, tmp_path: Path) -> None:
    """Where there is no division to take over, ours is as safetensors and transformers write it."""
    config = json.loads((source / "config.json").read_text())
    shutil.copytree(converted, tmp_path / "megatron", ignore=shutil.ignore_patterns("hf"))
    to_hf(tmp_path / "megatron", tmp_path / "one", config=config)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    save_file(whole, tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()
    to_hf(tmp_path / "megatron", tmp_path / "many", config=config, shard_bytes=50_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 4
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in whole.values())
    assert verify(tmp_path / "many", converted) == len(whole)
    with pytest.raises(CheckpointError, match="carries no config"):
        to_hf(tmp_path / "megatron", tmp_path / "none")


def test_slabs_and_partial_reads(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only large tensors meet, on small ones."""
    monkeypatch.setattr("megatron_vp2o.hf.plan.SLAB", 32 * 10)
    to_megatron(source, tmp_path / "slabs")
    monkeypatch.setattr("megatron_vp2o.hf.plan.SLAB", 2**30)
    to_megatron(source, tmp_path / "whole")
    monkeypatch.setattr("megatron_vp2o.hf.plan.SLAB", 32 * 7)
    monkeypatch.setattr("megatron_vp2o.hf.distributed_files._WHOLE", 100)
    for name in ("slabs", "whole"):
        to_hf(tmp_path / name, tmp_path / f"{name}-back")
        _same_files(source, tmp_path / f"{name}-back")


# --- damage -----------------------------------------------------------------------------------------------------------


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], *, index: bool = True) -> None:
    """Change the tensors of a checkpoint, and put them into one file with an index."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    if index:
        weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EXPERT.replace("experts.2", "experts.02")] = tensors.pop(EXPERT)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EXPERT][3, 5] = float("nan")
    tensors["model.norm.weight"][0] = float("inf")


def _truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(path, path.stat().st_size - 100)


def _duplicate(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    tensors = load_file(files[0])
    name, tensor = next(iter(load_file(files[1]).items()))
    save_file({**tensors, name: tensor}, files[0], metadata={"format": "pt"})


def _overlap(folder: Path) -> None:
    """A header that gives one tensor the bytes of another."""
    path = sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    first, second = [name for name in header if header[name].get("shape") == [16, 32]][:2]
    header[first]["data_offsets"] = header[second]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any], **kwargs: Any) -> Callable[[Path], None]:
    return lambda folder: _rewrite(folder, change, **kwargs)


DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing tensor": (_tensors(lambda t: t.pop(EXPERT)), ["missing", EXPERT]),
    "missing expert": (
        _tensors(lambda t: [t.pop(name) for name in list(t) if "layers.3.mlp.experts.3." in name]),
        [f"model.layers.3.mlp.experts.3.{part}_proj.weight" for part in ("gate", "up", "down")],
    ),
    "extra tensor": (_tensors(lambda t: t.update(extra=torch.ones(3))), ["unknown: extra"]),
    "renamed tensor": (_tensors(_rename), ["missing", EXPERT, "unknown", "experts.02"]),
    "wrong shape": (
        _tensors(lambda t: t.update({EXPERT: t[EXPERT].t().contiguous()})),
        ["wrong shape", EXPERT, "32, 16"],
    ),
    "NaN": (_tensors(_nan), [EXPERT, "has NaN", "model.norm.weight", "has infinities"]),
    "zeros, as of a hole in a file": (_tensors(lambda t: t[EXPERT].zero_()), [EXPERT, "all zeros"]),
    "integers": (_tensors(lambda t: t.update({EXPERT: t[EXPERT].to(torch.int32)})), ["not a weight", EXPERT]),
    "mixed dtypes": (_tensors(lambda t: t.update({EXPERT: t[EXPERT].bfloat16()})), ["linear_fc1", "--dtype"]),
    "truncated file": (_truncate, ["bytes, and its header describes"]),
    "missing file": (lambda f: sorted(f.glob("*.safetensors"))[0].unlink(), ["cannot be read", "00001-of"]),
    "tensor in two files": (_duplicate, ["is in model-00001"]),
    "overlapping tensors": (_overlap, ["malformed header"]),
    "not in the index": (_tensors(lambda t: None, index=False), ["cannot be read"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json cannot be read"]),
    "config of another size": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('_experts": 4', '_experts": 5')
        ),
        ["missing", "experts.4."],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_source_is_refused_by_name(copy: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    change, names = DAMAGE[damage]
    change(copy)
    assert main(["to-megatron", str(copy), str(copy.parent / "out")]) == 1
    said = capsys.readouterr().err
    for name in names:
        assert name in said, said
    _nothing_left(copy.parent)


def _flip(folder: Path) -> None:
    """One bit of one expert, and the file keeps its form."""
    stored = StoredTensors(folder)
    item = stored.items("decoder.layers.mlp.experts.experts.linear_fc2.weight")[5]
    path = folder / item.file
    content = bytearray(path.read_bytes())
    content[item.start + item.length // 2] ^= 1
    path.write_bytes(content)


def _metadata(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        change(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return apply


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch owned",)


_FC2 = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
MEGATRON_DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing tensor": (_metadata(lambda m: m.state_dict_metadata.pop(_FC2)), ["missing", _FC2]),
    "missing chunk": (_metadata(lambda m: m.state_dict_metadata[_FC2].chunks.pop()), ["not stored exactly once", _FC2]),
    "extra tensor": (
        _metadata(lambda m: m.state_dict_metadata.update(other=m.state_dict_metadata[_FC2])),
        ["other"],
    ),
    "truncated file": (lambda f: os.truncate(f / "__0_0.distcp", 1000), ["1000 bytes of"]),
    "missing file": (lambda f: (f / "__0_0.distcp").unlink(), ["__0_0.distcp is missing"]),
    "a pickle that runs code": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps(_Evil())),
        ["does not belong there"],
    ),
    "a pickle that reaches for code": (
        # GLOBAL with a dotted name: what the module imported, not what it defines
        lambda f: (f / ".metadata").write_bytes(
            b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\tos.system\x93\x8c\x0btouch owned\x85R."
        ),
        ["os.system, which does not belong there"],
    ),
    "a flipped bit": (_flip, [_FC2]),
}


@pytest.mark.parametrize("damage", MEGATRON_DAMAGE)
def test_a_damaged_megatron_checkpoint_is_refused(
    converted: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "megatron"))
    change, names = MEGATRON_DAMAGE[damage]
    change(folder)
    for command in (["to-hf", str(folder), str(tmp_path / "out")], ["verify", str(source), str(folder)]):
        assert main(command) == 1
        said = capsys.readouterr().err
        for name in names:
            assert name in said, said
    _nothing_left(tmp_path)
    assert not Path("owned").exists()


def test_verify_tells_what_differs_and_who_changed(
    copy: Path, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        other = EXPERT.replace("experts.2", "experts.3")
        tensors[EXPERT], tensors[other] = tensors[other].clone(), tensors[EXPERT].clone()

    _rewrite(copy, swap)
    assert main(["verify", str(copy), str(converted)]) == 1
    said = capsys.readouterr().err
    assert said.count("is not") == 2 and EXPERT in said and "the Hugging Face side has changed" in said


def test_suspect_numbers_can_be_taken(copy: Path) -> None:
    _rewrite(copy, _nan)
    to_megatron(copy, copy.parent / "out", options=Options(suspect=True))
    assert (copy.parent / "out" / workspace.MANIFEST).is_file()


# --- where it writes --------------------------------------------------------------------------------------------------


def test_a_folder_with_something_in_it_is_left_alone(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    to_megatron(source, target)  # empty is as good as absent
    with pytest.raises(CheckpointError, match="--overwrite"):
        to_megatron(source, target)
    before = (target / ".metadata").stat().st_ino
    to_megatron(source, target, options=Options(overwrite=True))
    assert (target / ".metadata").stat().st_ino != before
    (target / workspace.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="remove it yourself"):
        to_megatron(source, target, options=Options(overwrite=True))
    with pytest.raises(CheckpointError, match="cannot take the place of its source"):
        to_megatron(source, source, options=Options(overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_failed_overwrite_keeps_what_was_there(copy: Path) -> None:
    target = copy.parent / "kept"
    to_megatron(copy, target)
    _rewrite(copy, _nan)
    with pytest.raises(CheckpointError, match="NaN"):
        to_megatron(copy, target, options=Options(overwrite=True))
    assert StoredTensors(target).shapes
    assert sorted(path.name for path in copy.parent.iterdir()) == ["hf", "kept"]


def test_a_full_disk_is_said_beforehand(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="1,000 free"):
        to_megatron(source, tmp_path / "out")
    _nothing_left(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_vp2o.hf import convert, workspace
convert._BATCH = (30_000, 30_000)
record = workspace.Workspace.record
def killing(self, batch, entry):
    record(self, batch, entry)
    if len(self.done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
workspace.Workspace.record = killing
getattr(convert, sys.argv[1])(Path(sys.argv[2]), Path(sys.argv[3]), options=convert.Options(workers=1))
"""


@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_a_killed_conversion_goes_on(
    source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    start = source if direction == "to_megatron" else converted
    target = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, direction, str(start), str(target)], cwd=Path.cwd(), timeout=120
    )
    assert done.returncode == -signal.SIGKILL and not target.exists()
    assert workspace.temporary_folder(target).is_dir()
    monkeypatch.setattr(convert, "_BATCH", (30_000, 30_000))
    report = getattr(convert, direction)(start, target, options=Options(workers=1))
    assert 0 < report.resumed_bytes < report.size
    if direction == "to_megatron":
        assert verify(source, target)
    else:
        _same_files(source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_left_of_another_conversion_is_not_taken_over(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    left = workspace.Workspace(target, {"other": 1}).open()
    left.record(0, {"records": [], "items": []})
    with pytest.raises(CheckpointError, match="another process"):
        to_megatron(source, target)
    left.close()
    assert to_megatron(source, target).resumed_bytes == 0
    assert verify(source, target)

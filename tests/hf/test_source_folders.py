"""Hugging Face folders as they come: what transformers loads cleanly is taken, and said; what is damaged is refused by name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.convert import Options, to_hf, to_megatron
from megatron_vp2o.hf.distributed_files import StoredTensors
from megatron_vp2o.hf.tensor_files import INDEX, SINGLE
from megatron_vp2o.hf.verify import verify

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "head_dim": 8,
    "pad_token_id": None,
}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "head_dim": 4,
    "num_nextn_predict_layers": 1,
}


def save(folder: Path, shard: str = "5GB", **config: Any) -> Path:
    """A tiny random Qwen3-MoE (or what `model_type` says)."""
    made = transformers.AutoConfig.for_model(**{"model_type": "qwen3_moe", **SHAPE, **config})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).save_pretrained(
        folder, max_shard_size=shard
    )
    return folder


def add(folder: Path, **tensors: torch.Tensor) -> None:
    kept = load_file(folder / SINGLE)
    save_file({**kept, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}, folder / SINGLE)


def loads_cleanly(folder: Path) -> dict[str, Any]:
    """Transformers' own word on which tensors it did not expect."""
    _, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return dict(info)


def converts(folder: Path, *said: str) -> None:
    report = to_megatron(folder, folder.parent / "megatron")
    assert len(report.left_out) == len(said)
    for sentence, words in zip(report.left_out, said, strict=True):
        assert words in sentence
    assert json.loads((folder.parent / "megatron" / "conversion.json").read_text())["left_out"] == list(report.left_out)
    assert verify(folder, folder.parent / "megatron") > 10
    to_hf(folder.parent / "megatron", folder.parent / "back")
    loads_cleanly(folder.parent / "back")
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(path).eval()(torch.arange(40)[None]).logits
        for path in (folder, folder.parent / "back")
    )
    assert torch.equal(one, other)


def test_rotary_frequencies_are_left_out_and_said(tmp_path: Path) -> None:
    folder = save(tmp_path / "hf")
    add(folder, **{f"model__layers__{i}__self_attn__rotary_emb__inv_freq": torch.ones(4) for i in range(2)})
    loads_cleanly(folder)
    converts(folder, "2 tensors such as model.layers.0.self_attn.rotary_emb.inv_freq left out: rotary frequencies")


def test_a_stored_output_projection_beside_tied_embeddings(tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", tie_word_embeddings=True)
    add(folder, lm_head__weight=load_file(folder / SINGLE)["model.embed_tokens.weight"].clone())
    loads_cleanly(folder)
    converts(folder, "lm_head.weight left out")
    add(folder, lm_head__weight=torch.randn(40, 16))
    with pytest.raises(
        CheckpointError, match=r"tie_word_embeddings=true, and lm_head.weight is not model.embed_tokens"
    ):
        to_megatron(folder, tmp_path / "other")


def test_layers_for_multi_token_prediction_are_left_out_and_said(tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", model_type="deepseek_v3", **DEEPSEEK)
    add(folder, model__layers__2__eh_proj__weight=torch.randn(16, 32))
    converts(folder, "model.layers.2.eh_proj.weight left out: layers for multi-token prediction")
    add(folder, model__layers__3__eh_proj__weight=torch.randn(16, 32))
    with pytest.raises(CheckpointError, match=r"unknown: model.layers.3.eh_proj.weight"):
        to_megatron(folder, tmp_path / "other")


def test_a_single_file_is_read_before_an_index_as_transformers_does(tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", shard="10KB")
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    shutil.copy(whole / SINGLE, folder / SINGLE)
    assert (folder / INDEX).is_file() and verify(
        whole, _converted(folder, tmp_path / "megatron", "index.json left out")
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert not (tmp_path / "back" / INDEX).exists() and verify(tmp_path / "back", tmp_path / "megatron")


def _converted(folder: Path, target: Path, said: str) -> Path:
    assert said in " ".join(to_megatron(folder, target).left_out)
    return target


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "hf")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter.*Merge"):
        to_megatron(folder, tmp_path / "megatron")


# --- a hundred damaged folders ------------------------------------------------------------------------------------------


def _cut(folder: Path, rng: random.Random) -> None:
    path = _weights(folder, rng)
    size = path.stat().st_size
    content = path.read_bytes()
    path.write_bytes(
        content[: rng.choice([0, 5, 8, rng.randrange(size), size - 1])] if rng.random() < 0.8 else content + b"\0"
    )


def _weights(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _header(folder: Path, rng: random.Random) -> None:
    """Change a number, a name or the text of a header; its length is kept true, or is made wrong."""
    path = _weights(folder, rng)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    kind = rng.randrange(9)
    if kind == 0:
        entry["dtype"] = rng.choice(["F99", "F16", "I64", 3, None, []])
    elif kind == 1:
        entry["shape"] = rng.choice(
            [[], [-1], [1e9], ["3"], "16", None, [10**30], [True, 3], [[2]], entry["shape"] + [2]]
        )
    elif kind == 2:
        entry["data_offsets"] = rng.choice([[0], [5, 1], ["a", "b"], None, [-8, 8], [0, 10**18], [0.0, 8.0]])
    elif kind == 3:
        header[name + "x"] = header.pop(name)
    elif kind == 4:
        header[name] = rng.choice([None, [], 3, {}])
    text = json.dumps(header).encode()
    if kind == 5:
        text = rng.choice([b"[]", b"null", b"{", b"\xff\xfe", b'{"a":' * 5000, text.replace(b"{", b"", 1)])
    if kind == 6:  # the same name twice
        text = text[:-1] + b", " + json.dumps({name: entry}).encode()[1:]
    size = len(text) if kind != 7 else rng.choice([0, 2**63, len(text) - 3, len(text) + 3])
    if kind == 8:
        header.pop(name)
        text = json.dumps(header).encode()
        size = len(text)
    path.write_bytes(size.to_bytes(8, "little") + text + data)


def _json(name: str) -> Callable[[Path, random.Random], None]:
    def damage(folder: Path, rng: random.Random) -> None:
        path = folder / name
        text = path.read_bytes()
        kind = rng.randrange(6)
        if kind == 0:
            text = text[: rng.randrange(len(text) - 2)]
        elif kind == 1:
            text = rng.choice(
                [b"", b"[]", b"null", b"3", b'"x"', b"\xff\xfe\x00", b"[" * 20000, b"{" + b"9" * 6000 + b"}"]
            )
        elif kind == 2:  # a key twice
            key = rng.choice(list(json.loads(text)))
            text = text.rstrip()[:-1] + b', "' + key.encode() + b'": 3}'
        elif kind == 3 and name == INDEX:
            where = json.loads(text)
            where["weight_map"] = rng.choice(
                [None, [], {}, 3, {"a": 3}, {"a": "../x"}, {"a": "x\0y"}, {"a": "no.safetensors"}]
            )
            text = json.dumps(where).encode()
        elif kind == 4 and name == INDEX:
            where = json.loads(text)
            key = rng.choice(sorted(where["weight_map"]))
            where["weight_map"][key] = rng.choice([None, "other.safetensors", 7, ""])
            text = json.dumps(where).encode()
        elif kind == 5 and name == INDEX:
            where = json.loads(text)
            where["weight_map"].pop(rng.choice(sorted(where["weight_map"])))
            text = json.dumps(where).encode()
        else:
            text = text.replace(rng.choice([b'"', b":", b"{", b"}"]), b"", 1)
        path.write_bytes(text)

    return damage


def _missing(folder: Path, rng: random.Random) -> None:
    rng.choice([_weights(folder, rng), folder / INDEX, folder / "config.json"]).unlink()


def _numbers(folder: Path, rng: random.Random) -> None:
    path = _weights(folder, rng)
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = rng.randrange(6)
    if kind == 0:
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    elif kind == 1:
        tensor = tensor.to(rng.choice([torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn]))
    elif kind == 2:
        tensor = torch.cat([tensor, tensor]) if rng.random() < 0.5 else tensor[:-1].clone()
    elif kind == 3:
        tensor = tensor[None].clone()
    elif kind == 4 and tensor.dim() > 1:
        tensor = torch.zeros_like(tensor)
    else:
        tensor = tensor.bfloat16() if "experts" in name or "layers" in name else tensor[:1].clone()
    save_file({**tensors, name: tensor}, path)


def _twice(folder: Path, rng: random.Random) -> None:
    one, other = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    tensors = load_file(other)
    name = rng.choice(sorted(tensors))
    save_file({**load_file(one), name: tensors[name]}, one)


DAMAGES = (_cut, _header, _json("config.json"), _json(INDEX), _missing, _numbers, _twice)


def _everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_hundred_damaged_folders(tmp_path: Path) -> None:
    """One clear error each, and the earlier conversion, which was to be replaced, is untouched."""
    whole = save(tmp_path / "whole", shard="8KB")
    assert len(list(whole.glob("*.safetensors"))) > 2
    target = tmp_path / "megatron"
    to_megatron(whole, target)
    before = _everything(target)
    for number in range(100):
        rng = random.Random(number)
        damage = DAMAGES[number % len(DAMAGES)]
        folder = Path(shutil.copytree(whole, tmp_path / "damaged"))
        damage(folder, rng)
        with pytest.raises(CheckpointError) as raised:
            to_megatron(folder, target, options=Options(overwrite=True))
            pytest.fail(f"number {number} ({damage}) was converted")
        assert 20 < len(str(raised.value)) < 4000, number
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".converting")], number
        shutil.rmtree(folder)
    assert _everything(target) == before
    assert StoredTensors(target).shapes

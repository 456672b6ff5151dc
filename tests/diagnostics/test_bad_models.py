"""Folders and texts that the command line cannot measure: one line that says which, before anything is printed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from megatron_vp2o.diagnostics.__main__ import main
from tests.hf import word_model
from tools.tiny_qwen3_moe import tiny_config


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    word_model.save(str(folder))
    (folder / "texts.txt").write_text("w1 w2 w3\nw4 w5\n")
    return folder


def change(name: str, **values: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def dense(folder: Path) -> None:
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def without_pad(folder: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text())
            (folder / name).write_text(
                json.dumps({k: v for k, v in found.items() if k not in ("pad_token", "eos_token")})
            )


def small_vocabulary(folder: Path) -> None:
    transformers.AutoModelForCausalLM.from_config(tiny_config(4)).save_pretrained(folder)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "is no folder of a model: it has no config.json"),
    "no config.json": (lambda f: (f / "config.json").unlink(), "is no folder of a model: it has no config.json"),
    "config.json is torn": (lambda f: (f / "config.json").write_text('{"model_type'), "transformers cannot read the"),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[1]"), "transformers cannot read the"),
    "unknown family": (change("config.json", model_type="qwen9_moe"), "transformers cannot read the"),
    "more experts of a token than there are": (
        change("config.json", num_experts_per_tok=10**6),
        "num_experts_per_tok=1000000 must be between 1 and the 8 experts",
    ),
    "no expert of a token": (change("config.json", num_experts_per_tok=0), "must be between 1 and the 8 experts"),
    "torn weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "transformers cannot read the model",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "transformers cannot read the model"),
    "weights of another model": (change("config.json", hidden_size=32), "transformers cannot read the model"),
    "no tokenizer": (
        without_tokenizer,
        "its tokenizer gives the texts no token",  # transformers makes an empty one
    ),
    "no token for padding": (without_pad, "the tokenizer has neither a padding token nor one for the end"),
    "tokenizer of another model": (small_vocabulary, "and the model has 4: the two do not belong together"),
    "dense": (dense, "has no MoE layer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_folders_that_cannot_be_read(good: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    apply, message = BROKEN[name]
    apply(folder)
    assert main(["model", str(folder), "--texts", str(good / "texts.txt")]) == 2
    said = capsys.readouterr()
    (error,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert said.out == ""


def test_texts_and_numbers_that_cannot_be_used(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "bytes").write_bytes(b"w1\n\xff\xfe\n")
    texts = str(good / "texts.txt")
    for arguments, message in (
        (["--texts", str(tmp_path / "none")], "No such file"),
        (["--texts", str(tmp_path / "empty")], "has no text"),
        (["--texts", str(tmp_path / "bytes")], "is not UTF-8 text (invalid start byte at byte 3)"),
        (["--texts", texts, "--rows", "0"], "--rows 0 must be at least 1"),
        (["--texts", texts, "--length", "-3"], "--length -3 must be at least 1"),
    ):
        assert main(["model", str(good), *arguments]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err, said.err
    assert main(["model", str(good), "--texts", texts]) == 0
    assert json.loads(capsys.readouterr().out)["moe/router_entropy"] > 0


def test_odd_configurations_end_in_one_line_or_work(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many as VP2O_DIAGNOSTICS_FUZZ says; the seed of one that fails is in the message."""
    folder, outcomes = tmp_path / "model", {0: 0, 2: 0}
    shutil.copytree(good, folder)
    settings = json.loads((good / "config.json").read_text())
    for seed in range(int(os.environ.get("VP2O_DIAGNOSTICS_FUZZ", "400")) // 20):
        draw = random.Random(seed)
        odd = [None, True, "", "x", -1, 0, 1, 3, 0.5, 64, [], [1], {}, {"a": 1}]
        changed = {name: draw.choice(odd) for name in draw.sample(sorted(settings), draw.choice([1, 1, 2]))}
        (folder / "config.json").write_text(json.dumps(settings | changed))
        try:
            status = main(["model", str(folder), "--texts", str(good / "texts.txt")])
        except Exception as error:
            raise AssertionError(f"seed {seed}: {changed}") from error
        said = capsys.readouterr()
        outcomes[status] += 1
        if status == 0:
            json.loads(said.out)
        else:
            errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and said.out == "", (seed, changed, said.err)
    assert min(outcomes.values()) > 2

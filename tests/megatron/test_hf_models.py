"""Every family: a tiny model of transformers, converted, computes in Megatron what it does there, under every layout."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from megatron_vp2o.hf.convert import to_megatron
from megatron_vp2o.hf.plan import Layout
from megatron_vp2o.hf.tensor_files import open_folder
from megatron_vp2o.hf.verify import verify
from tests.distributed import run_distributed
from tests.hf import models

JOB = "tests.megatron.hf_job:computed"
NAMES = (*models.FAMILIES, *models.VARIANTS)
LAYOUTS = {
    "TP=2": {"tensor_parallel": 2},
    "EP=2": {"expert_parallel": 2},
    "PP=2": {"pipeline_parallel": 2},
    "TP=2 x EP=2": {"tensor_parallel": 2, "expert_parallel": 2},
    "ETP=2": {"expert_tensor_parallel": 2},
}
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Name -> the converted checkpoint and the model it was made from."""
    folder = tmp_path_factory.mktemp("families")
    found = {}
    for name in NAMES:
        model = models.save(name, folder / name)
        to_megatron(folder / name, folder / f"{name}-megatron", layout=Layout(tensor=2, expert_tensor=2))
        found[name] = (folder / f"{name}-megatron", model)
    return found


@pytest.fixture(scope="module")
def layouts(converted: dict[str, tuple[Path, Any]]) -> list[dict[str, list[Any]]]:
    """What two ranks compute, under each layout."""
    folders = [str(path) for path, _ in converted.values()]
    return run_distributed(JOB, 2, folders, list(LAYOUTS.values()), models.tokens().tolist(), timeout=240)


@pytest.fixture(scope="module")
def alone(converted: dict[str, tuple[Path, Any]]) -> dict[str, list[Any]]:
    """What one process computes, and generates."""
    folders = [str(path) for path, _ in converted.values()]
    prompts = models.tokens(2, 6).tolist()
    return run_distributed(JOB, 1, folders, [{}], prompts, NEW_TOKENS, timeout=240)[0]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_logits_agree_under_every_layout(
    converted: dict[str, tuple[Path, Any]], layouts: list[dict[str, list[Any]]], name: str
) -> None:
    path, model = converted[name]
    expected = models.logits(model, models.tokens())
    assert expected.std() > 0.3  # weights that would not show in the logits would prove nothing
    for rank, found in enumerate(layouts):
        for layout, values in zip(LAYOUTS, found[str(path)], strict=True):
            if "refused" in values:
                _check_refusal(name, layout, values["refused"])
                continue
            error = (torch.tensor(values["logits"]) - expected).abs().max().item()
            assert error < 1e-5, f"{name}, {layout}, rank {rank}: {error:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_greedy_generation_agrees_token_for_token(
    converted: dict[str, tuple[Path, Any]], alone: dict[str, list[Any]], name: str
) -> None:
    path, model = converted[name]
    prompts = models.tokens(2, 6)
    expected = models.greedy(model, prompts, NEW_TOKENS)
    if "refused" in alone[str(path)][0]:
        _check_refusal(name, "", alone[str(path)][0]["refused"])
        return
    assert alone[str(path)][0]["greedy"] == expected.tolist()
    assert len(set(expected.flatten().tolist())) > 4  # no fixed point


@pytest.mark.slow
@pytest.mark.distributed
def test_a_live_model_streams_the_tensors_it_was_made_from(converted: dict[str, tuple[Path, Any]]) -> None:
    """Every tensor once, bit for bit, on every rank, in one order for all layouts."""
    folders = [str(path) for path, _ in converted.values()]
    sources = [folder.removesuffix("-megatron") for folder in folders]
    ranks = run_distributed("tests.megatron.hf_job:streamed", 2, folders, [*LAYOUTS.values(), {}], sources, timeout=240)
    for name, folder in zip(NAMES, folders, strict=True):
        expected = set(open_folder(Path(folder.removesuffix("-megatron"))).entries)
        orders = set()
        for found in ranks:
            for layout, result in zip([*LAYOUTS, ""], found[folder], strict=True):
                if "refused" in result:
                    _check_refusal(name, layout, result["refused"])
                    continue
                assert result["wrong"] == [], (name, layout)
                assert len(result["names"]) == len(expected) and set(result["names"]) == expected
                orders.add(tuple(result["names"]))
        assert len(orders) <= 1, name


@pytest.mark.slow
@pytest.mark.distributed
def test_a_folder_is_loaded_as_it_is_under_every_layout(converted: dict[str, tuple[Path, Any]]) -> None:
    """And the comparison of the live model with transformers finds one changed matrix of one rank."""
    sources = [str(converted[name][0]).removesuffix("-megatron") for name in models.FAMILIES]
    layouts = {name: LAYOUTS[name] for name in ("PP=2", "TP=2 x EP=2", "ETP=2")}
    ranks = run_distributed("tests.megatron.hf_job:loaded", 2, sources, list(layouts.values()), timeout=280)
    for name, source in zip(models.FAMILIES, sources, strict=True):
        for found in ranks:
            for layout, result in zip(layouts, found[source], strict=True):
                if "refused" in result:
                    _check_refusal(name, layout, result["refused"])
                    continue
                whole, some, changed = result["said"]
                assert whole.startswith("logits of 96 random tokens differ"), (name, layout)
                assert some.startswith("hidden states of 96 random tokens after layer "), (name, layout)
                assert changed.startswith("error: ") and "more than rounding explains" in changed, (name, layout)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_live_model_is_exported_whole_or_not_at_all(converted: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    path, _ = converted["qwen3_moe"]
    source = str(path).removesuffix("-megatron")
    layout = {"tensor_parallel": 2, "expert_parallel": 2}
    errors = run_distributed("tests.megatron.hf_job:exported", 2, str(path), source, str(tmp_path / "hf"), layout)
    assert all("has NaN" in error and "down_proj" in error for error in errors)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]
    assert verify(tmp_path / "hf", path) == len(open_folder(tmp_path / "hf").entries)


def _check_refusal(name: str, layout: str, message: str) -> None:
    """Only what Megatron cannot run is refused."""
    if name == "gpt_oss":
        assert layout == "ETP=2" and "biases" in message
    else:
        assert name == "deepseek_v3_full_query" and "q_lora_rank=null" in message
        assert Version(importlib.metadata.version("megatron-core")) >= Version("0.17")

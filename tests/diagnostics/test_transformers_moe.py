"""A Hugging Face model that is watched from outside has the metrics that the Stein hook reports of it in Megatron."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_vp2o.diagnostics import observe
from megatron_vp2o.errors import ConfigError
from tests.distributed import run_distributed
from tests.hf import models

JOB = "tests.diagnostics.metrics_job:metrics"
COMMON = (
    "moe/router_entropy",
    "moe/expert_utilisation",
    "moe/effective_experts",
    "moe/load_violation",
    "moe/output_overlap",
    "stein/coactivation_sparsity",
    "stein/prototype_overlap",
    "stein/prototype_overlap_max",
    "stein/prototype_rank",
)
COMPARED = [name for name in models.FAMILIES if name != "gpt_oss"]
"""Megatron 0.16 cannot run the backward pass of experts with biases (a view modified in place, mlp.py:247)."""


def batches(seed: int = 3) -> list[tuple[Tensor, list[int]]]:
    """Four micro-batches of two rows each, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(4):
        width = int(torch.randint(9, 30, (1,), generator=generator))
        lengths = [width, int(torch.randint(3, width, (1,), generator=generator))]
        drawn.append((torch.randint(models.VOCAB, (2, width), generator=generator), lengths))
    return drawn


def mask(tokens: Tensor, lengths: list[int]) -> Tensor:
    return (torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]).long()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    folder = tmp_path_factory.mktemp("watched")
    return {name: (folder / name, models.save(name, folder / name)) for name in models.FAMILIES}


def watched(model: nn.Module, drawn: list[tuple[Tensor, list[int]]]) -> dict[str, float]:
    with observe(model) as seen, torch.no_grad():
        for tokens, lengths in drawn:
            model(input_ids=tokens, attention_mask=mask(tokens, lengths), use_cache=False)
        return seen.take().metrics


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"expert_parallel": 2}], ids=["alone", "EP=2"])
def test_the_metrics_are_those_of_the_hook_on_the_converted_weights(
    saved: dict[str, tuple[Path, Any]], layout: dict[str, int]
) -> None:
    drawn = batches()
    given = [[tokens.tolist(), lengths] for tokens, lengths in drawn]
    ranks = run_distributed(
        JOB, layout.get("expert_parallel", 1), [str(saved[name][0]) for name in COMPARED], given, layout, timeout=240
    )
    for name in COMPARED:
        path, model = saved[name]
        found = watched(model, drawn)
        assert set(COMMON) <= found.keys()
        for said in ranks:
            for metric in COMMON:
                expected = said[str(path)][metric]
                assert found[metric] == pytest.approx(expected, rel=1e-5, abs=1e-5), (name, metric)
        assert 0.0 < found["moe/output_overlap"] < 1.0
        assert found["stein/prototype_residual"] < 1e-3


def test_counts_are_those_of_a_loop_over_tokens(saved: dict[str, tuple[Path, Any]]) -> None:
    """Against plain Python on what transformers itself returns as router logits."""
    model = saved["qwen3_moe"][1]
    (tokens, lengths) = batches(11)[0]
    with observe(model) as seen, torch.no_grad():
        logits = model(
            input_ids=tokens,
            attention_mask=mask(tokens, lengths),
            use_cache=False,
            output_router_logits=True,
        ).router_logits
        report = seen.take(prototypes=False)
    valid = mask(tokens, lengths).flatten().tolist()
    for layer, logits_TE in enumerate(logits):
        pairs: dict[tuple[int, int], int] = {}
        for t, row_E in enumerate(logits_TE.tolist()):
            chosen = sorted(range(len(row_E)), key=lambda e: -row_E[e])[:2]
            for i in chosen if valid[t] else ():
                for j in chosen:
                    pairs[i, j] = pairs.get((i, j), 0) + 1
        for i in range(4):
            for j in range(4):
                assert report.counts_LEE[layer, i, j] == pairs.get((i, j), 0)
        assert report.tokens_L[layer] == sum(valid)
    assert len(set(report.layers)) == len(logits)


def test_padding_counts_only_where_asked(saved: dict[str, tuple[Path, Any]]) -> None:
    model = saved["olmoe"][1]
    tokens, lengths = batches(5)[0]
    given = {"input_ids": tokens, "attention_mask": mask(tokens, lengths), "use_cache": False}
    with observe(model) as left_out, observe(model, count_padding=True) as counted, torch.no_grad():
        model(**given)
        assert left_out.take(prototypes=False).tokens_L.tolist() == [sum(lengths)] * 4
        assert counted.take(prototypes=False).tokens_L.tolist() == [tokens.numel()] * 4
        changed = tokens.clone()
        changed[1, lengths[1] :] = (changed[1, lengths[1] :] + 17) % models.VOCAB
        model(**given)
        first = left_out.take(prototypes=False)
        model(**(given | {"input_ids": changed}))
        second = left_out.take(prototypes=False)
    assert torch.equal(first.counts_LEE, second.counts_LEE)
    assert torch.allclose(first.router_entropy_L, second.router_entropy_L)


def test_generation_with_a_cache_counts_each_token_once(saved: dict[str, tuple[Path, Any]]) -> None:
    model = saved["mixtral"][1]
    prompts = models.tokens(3, 7)
    with observe(model) as seen:
        models.greedy(model, prompts, 5)
        # the last token is drawn and not read
        assert seen.take(prototypes=False).tokens_L.tolist() == [3 * (7 + 4)] * 4


def test_training_is_untouched_and_recomputation_counts_once(saved: dict[str, tuple[Path, Any]]) -> None:
    model = saved["qwen3_moe"][1].__class__(saved["qwen3_moe"][1].config)
    tokens = models.tokens(2, 12)

    def gradients(*, checkpointing: bool, watch: bool) -> tuple[list[Tensor], list[float]]:
        model.zero_grad()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        else:
            model.gradient_checkpointing_disable()
        seen = observe(model) if watch else None
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        counted: list[float] = []
        if seen is not None:
            counted = seen.take(prototypes=False).tokens_L.tolist()
            seen.remove()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], counted

    plain, _ = gradients(checkpointing=False, watch=False)
    for checkpointing in (False, True):
        bare, _ = gradients(checkpointing=checkpointing, watch=False)
        found, counted = gradients(checkpointing=checkpointing, watch=True)
        assert counted == [24.0] * 4
        assert len(found) == len(plain) and all(torch.equal(a, b) for a, b in zip(found, bare, strict=True))


def test_removal_leaves_no_hook(saved: dict[str, tuple[Path, Any]]) -> None:
    model = saved["gpt_oss"][1]

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    seen = observe(model)
    assert hooks() > before
    seen.remove()
    assert hooks() == before


def test_what_is_no_moe_model_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="Sequential has no MoE layer as transformers 5 builds them"):
        observe(nn.Sequential(nn.Linear(3, 3)))


def test_a_mask_that_says_nothing_of_padding_is_refused(saved: dict[str, tuple[Path, Any]]) -> None:
    model = saved["qwen3_moe"][1]
    tokens = models.tokens(1, 6)
    with observe(model), pytest.raises(ConfigError, match=r"attention_mask \(\[1, 1, 6, 6\]\).*count_padding=True"):
        model(input_ids=tokens, attention_mask=torch.zeros(1, 1, 6, 6), use_cache=False)


def test_a_block_that_bypasses_its_router_is_reported(saved: dict[str, tuple[Path, Any]]) -> None:
    model = saved["qwen3_moe"][1]
    blocks = [layer.mlp for layer in model.model.layers]
    kept = [block.forward for block in blocks]
    for block in blocks:
        block.forward = lambda hidden: hidden
    try:
        with observe(model) as seen, torch.no_grad():
            model(input_ids=models.tokens(1, 6), use_cache=False)
            with pytest.raises(ConfigError, match=r"routers of its MoE layers .* were never called"):
                seen.take(prototypes=False)
    finally:
        for block, forward in zip(blocks, kept, strict=True):
            block.forward = forward


@pytest.mark.slow
def test_without_megatron_and_from_the_command_line(saved: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    """In a process in which `import megatron` fails, as where it is not installed."""
    (tmp_path / "rollouts.jsonl").write_text(
        '{"step": 1, "input": "a", "output": "1", "score": 1.0}\n{"step": 1, "input": "a", "output": "2", "score": 1.0}\n'
    )
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "hydra", "omegaconf"):
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Refuse())
import json, torch
from transformers import AutoModelForCausalLM
from megatron_vp2o.diagnostics import observe
from megatron_vp2o.diagnostics.__main__ import main
model = AutoModelForCausalLM.from_pretrained({str(saved["qwen3_moe"][0])!r}, dtype=torch.float32).eval()
with observe(model) as seen, torch.no_grad():
    model(input_ids=torch.arange(12)[None], use_cache=False)
    print(json.dumps(seen.take().metrics))
assert main(["rollouts", {str(tmp_path / "rollouts.jsonl")!r}]) == 0
assert "megatron" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    first, _, rest = done.stdout.partition("\n")
    assert json.loads(first)["moe/router_entropy"] > 0
    assert json.loads(rest)["rollout/distinct"] == 2.0

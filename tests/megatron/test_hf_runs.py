"""Runs and Hugging Face: what is trained here evaluates the same in transformers, and a run starts from a converted model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from megatron_vp2o.config.store import load_config
from megatron_vp2o.core.sampling import sample, uniform_N
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl.evaluate import evaluate
from megatron_vp2o.rl.types import Rollouts, SamplingParams, Split
from megatron_vp2o.tasks import make_task
from megatron_vp2o.tasks.tokenizer import load_tokenizer
from tests.hf import models
from tests.test_end_to_end import measured, train
from tools.convert import main

TRAINED = [
    "model=micro",
    "task.train_size=2000",
    "task.validation_size=64",
    "task.test_size=8",
    "evaluation.problems=64",
    "evaluation.samples=4",
    "evaluation.pass_at=[1,4]",
    "evaluation.interval=1000",
    "logging.tensorboard=false",
    "optimizer.lr=5e-3",
    "algorithm.steps=150",
    "algorithm.global_batch_size=64",
]


class TransformersEngine:
    """A rollout engine over a transformers model: no cache, one sequence at a time, the random numbers of ours."""

    version = 0

    def __init__(self, model: Any, vocab: int, eos_id: int, pad_id: int) -> None:
        self.model, self.vocab, self.eos_id, self.pad_id = model, vocab, eos_id, pad_id

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: SamplingParams, group_size: int = 1
    ) -> Rollouts:
        width = max(map(len, prompts)) + sampling.max_new_tokens
        rows, starts, ends, finished = [], [], [], []
        for prompt, uid in zip(prompts, uids, strict=True):
            batch = torch.tensor([list(prompt)] * group_size)
            uid_N = uid * group_size + torch.arange(group_size)
            for position in range(sampling.max_new_tokens):
                logits_NV = self.model(input_ids=batch, use_cache=False).logits[:, -1]
                token_N, _ = sample(
                    logits_NV,
                    uniform_N(sampling.seed, uid_N, position),
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    valid_vocab=self.vocab,
                )
                batch = torch.cat([batch, token_N[:, None]], dim=1)
            for row in batch.tolist():
                end = len(row)
                if self.eos_id in row[len(prompt) :]:
                    end = row.index(self.eos_id, len(prompt)) + 1
                rows.append(row[:end] + [self.pad_id] * (width - end))
                starts.append(len(prompt))
                ends.append(end)
                finished.append(row[end - 1] == self.eos_id)
        zeros = torch.zeros(len(rows), width)
        return Rollouts(
            torch.tensor(rows), torch.tensor(starts), torch.tensor(ends), zeros, zeros, torch.tensor(finished), 0
        )


def alone() -> Groups:
    """The groups of a world of one, without Megatron."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    assert world is not None
    names = [name for name in Groups.__dataclass_fields__ if name not in ("device", "timeout")]
    return Groups(**dict.fromkeys(names, world), device=torch.device("cpu"), timeout=None)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_transformers_reproduces_the_evaluation_of_an_exported_run(tmp_path: Path) -> None:
    """Every number, not only the accuracy: greedy, pass@k, distinct answers, lengths."""
    run = tmp_path / "run"
    train("countdown_tiny_supervised", run, *TRAINED)
    assert main(["to-hf", str(run), str(tmp_path / "hf")]) == 0
    assert main(["verify", str(tmp_path / "hf"), str(run)]) == 0
    config = load_config(run)
    tokenizer = load_tokenizer(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    assert model.config.eos_token_id == tokenizer.eos_id and model.config.model_type == "qwen3_moe"
    engine: Any = TransformersEngine(model, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    groups = alone()
    try:
        found, _ = evaluate(
            engine,
            make_task(config.task),
            Split.validation,
            config.evaluation,
            groups,
            max_new_tokens=config.rollout.sampling.max_new_tokens,
            seed=config.seed + 1,
            prefix="eval",
        )
    finally:
        dist.destroy_process_group()
    assert found["eval/greedy_accuracy"] > 0
    for key, value in found.items():
        assert measured(run, key)[-1] == pytest.approx(value, abs=1e-12), key


@pytest.mark.slow
def test_a_run_starts_from_a_converted_model_and_exports(tmp_path: Path) -> None:
    """The first evaluation is that of the converted weights: no step, and the way back is the same to the byte."""
    reference = models.save("qwen3_moe", tmp_path / "hf")
    hf, megatron = str(tmp_path / "hf"), str(tmp_path / "megatron")
    assert main(["to-megatron", hf, megatron, "--tp", "2"]) == 0
    assert main(["verify", hf, megatron, "--logits"]) == 0
    run = tmp_path / "run"
    settings = [
        "model.num_layers=4",
        "model.hidden_size=32",
        "model.kv_channels=16",
        "model.num_moe_experts=4",
        "model.moe_router_topk=2",
        "model.moe_ffn_hidden_size=16",
        "task.train_size=64",
        "task.validation_size=8",
        "task.test_size=8",
        "evaluation.problems=8",
        "logging.tensorboard=false",
        "optimizer.lr=1e-12",
        "optimizer.weight_decay=0",
        "optimizer.lr_warmup_steps=0",
        "algorithm.steps=1",
        "algorithm.global_batch_size=4",
    ]
    train("countdown_tiny_supervised", run, *settings, f"init_from={megatron}")
    back = tmp_path / "back"
    assert main(["to-hf", str(run), str(back), "--like", str(tmp_path / "hf")]) == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager").eval()
    tokens: Tensor = models.tokens()
    difference = (models.logits(exported, tokens) - models.logits(reference, tokens)).abs().max().item()
    assert difference < 1e-5
    assert sorted(path.name for path in back.iterdir() if path.name != "conversion.json") == sorted(
        path.name for path in (tmp_path / "hf").iterdir()
    )

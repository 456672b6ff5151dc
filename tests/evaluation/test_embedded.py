"""The embedded engine as a model: the same greedy answers as transformers, with one process and with two; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu
from tests.distributed import run_distributed
from tools.arithmetic_rows import write_checkpoint

enable_cpu()

from megatron_vp2o.config.schema import ParallelConfig  # noqa: E402
from megatron_vp2o.errors import CheckpointError, ConfigError  # noqa: E402
from megatron_vp2o.evaluation.benchmarks import BENCHMARKS  # noqa: E402
from megatron_vp2o.evaluation.data import load  # noqa: E402
from megatron_vp2o.evaluation.embedded import (  # noqa: E402
    Embedded,
    checkpoints,
    config_for,
    identity_of,
    tokenizer_of,
)
from megatron_vp2o.evaluation.results import Sample, path_of, read  # noqa: E402
from megatron_vp2o.tasks.tokenizer import CharTokenizer  # noqa: E402

LENGTH = 24
NOTHING_STORED: Any = SimpleNamespace(engine=None, groups=None)
"""For what looks at prompts only."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE with a chat template, with a long enough context."""
    made = tmp_path_factory.mktemp("hf") / "checkpoint-40"
    write_checkpoint(made)
    name = "config.json"
    settings = json.loads((made / name).read_text())
    (made / name).write_text(json.dumps({**settings, "max_position_embeddings": 1024}))
    return made


def _evaluate(folder: Path, out: Path, processes: int, *more: str) -> dict[str, list[Sample]]:
    arguments = (f"m={folder}", "--out", str(out), "--data", "own", "--suite", "gpqa,min_thinking_1")
    run_distributed(
        "megatron_vp2o.evaluate",
        processes,
        *arguments,
        *("--lengths", str(LENGTH), "--workers", "1", "--batch", "5", *more),
        timeout=240,
    )
    return {name: read(path_of(out, "m", 40, name, LENGTH))[1] for name in ("gpqa", "min_thinking_1")}


@pytest.mark.slow
@pytest.mark.distributed
def test_greedy_answers_are_those_of_transformers_and_of_two_processes(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    one = _evaluate(folder, tmp_path / "one", 1, "--temperature", "0")
    two = _evaluate(folder, tmp_path / "two", 2, "--temperature", "0")
    assert one == two
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, samples in one.items():
        questions = load(BENCHMARKS[name], "own", 0).questions
        assert [s.problem for s in samples] == [q.id for q in questions] and {s.sample for s in samples} == {0}
        for question, sample in zip(questions, samples, strict=True):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": question.prompt}], tokenize=False, add_generation_prompt=True
            )
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
            with torch.no_grad():
                found = network.generate(ids, max_new_tokens=LENGTH, do_sample=False)[0, ids.shape[1] :].tolist()
            ends = [n for n, token in enumerate(found) if token in (0, tokenizer.eos_token_id)]
            response = found[: ends[0]] if ends else found
            assert sample.solution_tokens == len(response) and sample.thinking_tokens == 0
            assert sample.truncated == (not ends)
            if all(token > 2 for token in response):  # no special token in the middle
                assert sample.text == tokenizer.decode(response)


def test_a_prompt_that_leaves_no_room_is_refused(folder: Path) -> None:
    (checkpoint,) = checkpoints("m", str(folder), "every")
    config = config_for(checkpoint, ParallelConfig(), 8, 1)
    assert config.model.max_sequence_length == 1024 and config.rollout.max_batch_size == 8
    model = Embedded(checkpoint, config, NOTHING_STORED, tokenizer_of(checkpoint), None)
    prompts = [question.prompt for question in load(BENCHMARKS["codeforces"], "own", 0).questions]
    model.check(prompts, 64)
    with pytest.raises(ConfigError, match=r"exceeds the model's 1024 .*choose at most --lengths") as error:
        model.check(prompts, 800)
    room = int(str(error.value).split("--lengths ")[1].split()[0])
    model.check(prompts[:1], room)
    with pytest.raises(ConfigError, match="no length leaves room for an answer; leave this benchmark out"):
        model.check(["1 + " * 1024 + "1 ="], 1)
    longer = config_for(checkpoint, ParallelConfig(), 8, 1, room=2048)
    Embedded(checkpoint, longer, NOTHING_STORED, tokenizer_of(checkpoint), None).check(prompts, 800)
    with pytest.raises(ConfigError, match=r"its tokenizer refuses the prompt 'ü"):
        Embedded(checkpoint, config, NOTHING_STORED, CharTokenizer(), None).check(["ü is no character here"], 8)
    with pytest.raises(ConfigError, match="not divisible by tensor"):
        config_for(checkpoint, ParallelConfig(tensor_parallel=2), 8, 1)


def test_which_checkpoints_a_place_means(folder: Path, tmp_path: Path) -> None:
    assert [c.step for c in checkpoints("a", str(folder), "every")] == [40]
    for step in (4, 8, 100):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step_{step:06d}" / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / "latest").write_text("step_000100\n")
    (tmp_path / "checkpoints" / ".tmp-step_000120").mkdir()
    run = str(tmp_path)

    def steps(which: str) -> list[int]:
        return [c.step for c in checkpoints("a", run, which)]

    assert steps("every") == [4, 8, 100] and steps("last") == [100] and steps("8,4") == [8, 4]
    assert [c.step for c in checkpoints("a", f"{run}/checkpoints/step_000008", "every")] == [8]
    with pytest.raises(CheckpointError, match="no checkpoint of step 5, only of 4, 8, 100"):
        steps("4,5")
    with pytest.raises(ConfigError, match="--steps all"):
        steps("all")
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints("a", f"{run}/none", "every")


def test_weights_that_differ_have_another_identity(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (checkpoint,), (other,) = checkpoints("a", str(folder), "every"), checkpoints("a", str(copy), "every")
    assert identity_of(checkpoint) == identity_of(other)
    tensors: dict[str, Any] = load_file(copy / "model.safetensors")
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
    assert identity_of(checkpoint) != identity_of(other)

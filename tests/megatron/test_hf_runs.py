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

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.store import load_config
from megatron_vp2o.config.validate import validate
from megatron_vp2o.core.sampling import sample, uniform_N
from megatron_vp2o.errors import CheckpointError, ConfigError
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.mapping import GateUp
from megatron_vp2o.hf.settings import run_settings
from megatron_vp2o.hf.tensor_files import config_of
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl.evaluate import evaluate
from megatron_vp2o.rl.types import Rollouts, SamplingParams, Split
from megatron_vp2o.tasks import make_task
from megatron_vp2o.tasks.tokenizer import CharTokenizer, load_tokenizer
from tests.hf import models
from tests.resume_job import Run, run_in_one_process
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
    "algorithm.steps=250",
    "algorithm.global_batch_size=64",
]

EXPORT = "checkpoint.export_hf=true"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

ONE_STEP = [
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
        *ONE_STEP,
        "model.num_layers=4",
        "model.hidden_size=32",
        "model.kv_channels=16",
        "model.num_moe_experts=4",
        "model.moe_router_topk=2",
        "model.moe_ffn_hidden_size=16",
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


def _hf_folder(folder: Path, name: str) -> Any:
    """A tiny model with a tokenizer, a chat template and generation settings beside it."""
    model = models.save(name, folder)
    CharTokenizer().save(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    return model


def _overrides(folder: Path) -> list[str]:
    settings = run_settings(architecture(config_of(folder)))
    return [f"model.{name}={'null' if value is None else value}" for name, value in settings.items()]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_starts_from_a_hugging_face_folder_and_gives_it_back(tmp_path: Path) -> None:
    """A family that a run from scratch could not be exported as: the source's files are unchanged, its config.json too but for the
    dtype, and the two ways of exporting give the same folder."""
    source, run = tmp_path / "hf", tmp_path / "run"
    reference = _hf_folder(source, "gpt_oss")
    job = [*ONE_STEP, "model=checkpoint", f"init_from={source}", EXPORT, "algorithm.data.pack=false"]
    said = train("countdown_tiny_supervised", run, *job)
    assert "logits of 96 random tokens differ from transformers' by at most" in said
    assert f"task.tokenizer={source}" in said
    assert main(["to-hf", str(run), str(tmp_path / "back")]) == 0
    assert main(["verify", str(run / "hf"), str(run), "--logits"]) == 0
    for folder in (run / "hf", tmp_path / "back"):
        for name in (*FILES, "chat_template.jinja", "generation_config.json"):
            assert (folder / name).read_bytes() == (source / name).read_bytes(), (folder, name)
        assert config_of(folder) == {**config_of(source), "dtype": "float32"}
    exported = transformers.AutoModelForCausalLM.from_pretrained(run / "hf", attn_implementation="eager").eval()
    difference = (models.logits(exported, models.tokens()) - models.logits(reference, models.tokens())).abs().max()
    assert difference.item() < 1e-5


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_sequences_over_two_ranks_come_from_and_go_to_hugging_face(tmp_path: Path) -> None:
    """A run with CP=2 starts from a folder and exports one; scored again from either, by one rank or two, it is the same model."""
    source, run = tmp_path / "hf", tmp_path / "run"
    reference = _hf_folder(source, "qwen3_moe")
    small = [word for word in ONE_STEP if not word.startswith(("optimizer.lr=", "algorithm.steps"))]
    job = ["--config-name=countdown_tiny_supervised", *small, "model=checkpoint"]
    context = "parallel.context_parallel=2"
    statuses = run_in_one_process(
        tmp_path / "first",
        [Run(str(run), [*job, context, "algorithm.steps=2", "optimizer.lr=1e-2", f"init_from={source}", EXPORT], 2)],
    )
    said = (tmp_path / "first" / "output-0.txt").read_text()
    assert statuses == [[0, 0]], said
    assert "logits of 96 random tokens differ from transformers' by at most" in said
    assert main(["to-hf", str(run), str(tmp_path / "back")]) == 0
    assert main(["verify", str(run / "hf"), str(run), "--logits"]) == 0
    assert main(["to-megatron", str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained(run / "hf", attn_implementation="eager").eval()
    assert (models.logits(exported, models.tokens()) - models.logits(reference, models.tokens())).abs().max() > 1e-2

    starts = [(run, 1), (tmp_path / "back", 2), (tmp_path / "again", 2)]
    runs = [
        Run(
            str(tmp_path / f"run-{number}"),
            [*job, f"init_from={start}", "algorithm.steps=1", *([context] if ranks == 2 else [])],
            ranks,
        )
        for number, (start, ranks) in enumerate(starts)
    ]
    statuses = run_in_one_process(tmp_path / "second", runs)
    assert statuses == [[0] * one.ranks for one in runs], statuses
    loss = measured(run, "supervised/validation_loss")
    assert loss[-1] < loss[0] - 1e-2
    for one in runs:
        assert measured(Path(one.run_dir), "supervised/validation_loss")[0] == pytest.approx(loss[-1], rel=2e-6)
        for key in ("eval/greedy_accuracy", "eval/response_length"):
            assert measured(Path(one.run_dir), key)[0] == measured(run, key)[-1], key


@pytest.mark.slow
def test_a_folder_of_another_model_is_one_clear_error(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    _hf_folder(source, "qwen3_moe")
    settings = [word for word in _overrides(source) if not word.startswith("model.hidden_size")]
    for other in (settings, ["model=checkpoint", "model.hidden_size=64"]):
        said = train("countdown_tiny_supervised", tmp_path / "run", *ONE_STEP, *other, f"init_from={source}", status=2)
        assert "is of another model" in said and "set model.hidden_size=32" in said and "Traceback" not in said
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_settings_that_no_weight_shows_are_compared(tmp_path: Path) -> None:
    """Of a converted checkpoint, and of a run's: weights fit with another rotary embedding, window or activation, too."""
    source, megatron, run = tmp_path / "hf", tmp_path / "megatron", tmp_path / "run"
    _hf_folder(source, "gpt_oss")
    assert main(["to-megatron", str(source), str(megatron), "--no-compare"]) == 0
    others = {
        "yarn_rotary_scaling_factor": "16.0",
        "yarn_beta_fast": "31.0",
        "yarn_correction_range_round_to_int": "true",
        "window_attn_skip_freq": "3",
        "activation_func": "silu",
    }
    given = [f"model.{name}={value}" for name, value in others.items()]
    job = ["--config-name=countdown_tiny_supervised", *ONE_STEP, "model=checkpoint", "algorithm.data.pack=false"]

    runs = [
        Run(str(run), [*job, f"init_from={megatron}"]),
        Run(str(tmp_path / "other"), [*job, f"init_from={megatron}", *given]),
        Run(str(tmp_path / "third"), [*job, f"init_from={run}", *given]),
    ]
    statuses = run_in_one_process(tmp_path / "job", runs)
    said = [(tmp_path / "job" / f"output-{number}.txt").read_text() for number in range(len(runs))]
    assert statuses == [[0], [2], [2]], said
    for text in said[1:]:
        assert "is of another model" in text
        for name in others:
            assert f"{name} is " in text, name
    # The conversion has imported megatron.core by now, as it must be imported.
    from megatron_vp2o.megatron.checkpoint import checkpointer, folder

    here = folder.read_manifest(megatron)["model"]
    old = {name: value for name, value in here.items() if name not in others and not name.startswith("yarn_")}
    checkpointer._same("model", megatron, old, here)  # of a version that did not know these settings
    with pytest.raises(CheckpointError, match="window_size is None there"):
        checkpointer._same("model", megatron, {**old, "window_size": None}, here)


def test_what_no_family_has_is_refused_before_the_run(tmp_path: Path) -> None:
    change = ["model.moe_shared_expert_intermediate_size=32", EXPORT, f"run_dir={tmp_path}"]
    with pytest.raises(
        ConfigError, match=r"export_hf=true: no Hugging Face family.*moe_shared_expert_intermediate_size"
    ):
        validate(compose("countdown_tiny_supervised", change))
    validate(compose("countdown_tiny_supervised", change[:1] + change[2:]))
    validate(compose("countdown_tiny_supervised", change[1:]))


@pytest.mark.slow
def test_a_conversion_that_computes_something_else_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong operation that is its own inverse: bytes go there and back, and only the logits show it."""
    models.save("mixtral", tmp_path / "hf")
    monkeypatch.setattr(GateUp, "to_megatron", lambda self, parts: torch.cat([parts[1], parts[0]]))
    command = ["to-megatron", str(tmp_path / "hf"), str(tmp_path / "megatron")]
    assert main(command) == 1
    assert "more than rounding explains" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert main([*command, "--no-compare"]) == 0
    assert "logits were not compared with transformers': --no-compare" in capsys.readouterr().out


@pytest.mark.slow
def test_a_conversion_to_bfloat16_computes_the_same_as_the_rounded_source(tmp_path: Path) -> None:
    models.save("qwen3_moe", tmp_path / "hf")
    hf, megatron = str(tmp_path / "hf"), str(tmp_path / "megatron")
    assert main(["to-megatron", hf, megatron, "--dtype", "bf16"]) == 0
    assert main(["verify", hf, megatron, "--logits"]) == 0

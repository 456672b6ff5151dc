"""Every documented setting is trained with: short real runs change each from its default and take two optimizer steps.

What a run changed is read from the config.yaml that it left, and what it did from its record, so nothing here is a list of
settings said to be tested. A new setting fails `test_every_setting_is_trained_with` until a run of RUNS changes it, or
NOT_TRAINED_WITH (tests/not_trained_with.py) says why none can.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.config.register import GROUPS
from megatron_vp2o.config.schema import Algorithm, TrainConfig
from megatron_vp2o.config.store import load_config
from megatron_vp2o.tasks.tokenizer import CharTokenizer
from megatron_vp2o.tracking.record import read
from tests.not_trained_with import NOT_TRAINED_WITH
from tests.resume_job import Run

ROOT = Path(__file__).resolve().parents[1]
STEPS = 2


def leaves(section: Any, prefix: str = "") -> dict[str, Any]:
    """Settings and their values by dotted name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        inner = leaves(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else None
        found |= inner if inner is not None else {f"{prefix}{field.name}": value}
    return found


SMALL = [
    "model=micro",
    "model.hidden_size=32",
    "model.moe_ffn_hidden_size=16",
    "task.validation_size=4",
    "task.test_size=4",
    "evaluation.problems=4",
    "evaluation.samples=2",
    "evaluation.pass_at=[1,2]",
    f"algorithm.steps={STEPS}",
    "optimizer.lr=2e-3",
    "logging.tensorboard=false",
    "threads=1",
]
GRPO = [
    *SMALL,
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=2",
    "algorithm.filter_uniform_groups=false",
    "algorithm.entropy_coef=0.1",  # a model that knows nothing earns no reward, and has no other gradient
    "algorithm.micro_batch_size=4",
    "rollout.sampling.max_new_tokens=6",
]
VP2O = ["algorithm=vp2o", *GRPO, "algorithm.trust_region.delta=0.5"]
COUNTDOWN = ["task.train_size=30"]

AGAIN = [
    "algorithm=supervised",
    *SMALL,
    *COUNTDOWN,
    "checkpoint.interval=2",
    "checkpoint.save_at_end=false",
    "checkpoint.export_hf=true",
]

# name -> (processes, arguments). {files}: a folder of files that runs read; {runs}: the folder of all runs.
RUNS: dict[str, tuple[int, list[str]]] = {
    "supervised": (
        1,
        [
            "algorithm=supervised",
            *SMALL,
            "algorithm.global_batch_size=6",
            "algorithm.micro_batch_size=3",
            "algorithm.sequence_length=40",
            "algorithm.data.pack=false",
            "model.num_layers=3",
            "model.kv_channels=16",
            "model.num_query_groups=1",
            "model.qk_layernorm=false",
            "model.position_embedding_type=yarn",
            "model.rotary_base=5000",
            "model.yarn_rotary_scaling_factor=4",
            "model.yarn_original_max_position_embeddings=32",
            "model.yarn_beta_fast=16",
            "model.yarn_beta_slow=2",
            "model.yarn_correction_range_round_to_int=true",
            "model.add_bias_linear=true",
            "model.softmax_type=learnable",
            "model.window_size=8",
            "model.window_attn_skip_freq=2",
            "model.layernorm_epsilon=1e-5",
            "model.max_sequence_length=48",
            "model.vocab_size=112",
            "model.init_method_std=0.05",
            "model.activation_func=quick_gelu",
            "model.glu_linear_offset=1",
            "model.activation_func_clamp_value=7",
            "model.moe_aux_loss_coeff=1e-2",
            "model.implementation=local",
            "model.recompute=true",
            "model.logits_chunk_mib=0.01",
            "optimizer.min_lr=1e-4",
            "optimizer.lr_warmup_steps=1",
            "optimizer.lr_decay_style=linear",
            "optimizer.weight_decay=0.1",
            "optimizer.adam_beta1=0.8",
            "optimizer.adam_beta2=0.9",
            "optimizer.adam_eps=1e-6",
            "optimizer.clip_grad=0.5",
            "task.seed=3",
            "task.train_size=40",
            "task.numbers=4",
            "task.min_number=2",
            "task.max_number=12",
            "task.min_target=5",
            "task.max_target=40",
            "evaluation.interval=1",
            "evaluation.temperature=0.8",
            "evaluation.top_p=0.9",
            "evaluation.final_split=false",
            "checkpoint.interval=1",
            "checkpoint.keep=1",
            "name=other",
            "seed=7",
            "notes={why: 'every setting'}",
            "logging.tensorboard=false",
            "logging.console_interval=2",
        ],
    ),
    "again": (1, AGAIN),
    "grpo": (
        1,
        [
            "task=shortest_path",
            *GRPO,
            "task.train_size=40",
            "task.rows=3",
            "task.columns=3",
            "task.blocked_probability=0.1",
            "task.answer_format=strict",
            "task.tokenizer={files}/tokenizer",
            "model.share_embeddings_and_output_weights=true",
            "model.moe_router_score_function=sigmoid",
            "model.moe_router_enable_expert_bias=true",
            "model.moe_router_load_balancing_type=seq_aux_loss",
            "model.moe_z_loss_coeff=1e-3",
            "model.moe_shared_expert_intermediate_size=16",
            "model.moe_token_dispatcher_type=allgather",
            "model.precision=bf16",
            "algorithm.minibatches=2",
            "algorithm.epochs=2",
            "algorithm.clip_epsilon_low=0.1",
            "algorithm.clip_epsilon_high=0.3",
            "algorithm.normalise_by_std=false",
            "algorithm.advantage_epsilon=1e-4",
            "algorithm.kl_coef=0.1",
            "algorithm.kl_reference=initial",
            "algorithm.kl_estimator=k2",
            "algorithm.mismatch.measure=true",
            "algorithm.mismatch.correction=icepop",
            "algorithm.mismatch.level=sequence",
            "algorithm.mismatch.low=0.4",
            "algorithm.mismatch.high=4",
            "algorithm.mismatch.stop_kl=2",
            "algorithm.answer_repulsion.form=leave_one_out",
            "algorithm.answer_repulsion.strength=0.4",
            "algorithm.answer_repulsion.spare_right=true",
            "algorithm.answer_repulsion.kernel=ngram",
            "algorithm.answer_repulsion.bandwidth=0.5",
            "algorithm.answer_repulsion.ngram=2",
            "algorithm.stein.monitor=true",
            "rollout.max_batch_size=3",
            "rollout.refresh_interval=2",
            "rollout.max_age=5",
            "rollout.store=true",
            "rollout.sampling.temperature=0.9",
            "rollout.sampling.top_p=0.95",
        ],
    ),
    "grpo from a run": (
        1,
        [
            *GRPO,
            *COUNTDOWN,
            "init_from={runs}/again",
            "resume=never",
            "algorithm.stein.enabled=true",
            "algorithm.max_consecutive_nonfinite_steps=3",
            "algorithm.advantage=w_reinforce",
            "algorithm.positive_weight=0.2",
            "algorithm.unlikeliness=0.3",
            "algorithm.pass_k=2",
            "algorithm.covariance_fraction=0.1",
            "algorithm.covariance_kl_coef=0.5",
            "algorithm.covariance_low=0.5",
            "algorithm.covariance_high=4",
            "algorithm.max_consecutive_empty_steps=4",
            "logging.sample_interval=1",
            "logging.sample_prompts=1",
            "logging.sample_responses=2",
        ],
    ),
    "vp2o": (
        1,
        [
            *VP2O,
            *COUNTDOWN,
            "model.moe_router_pre_softmax=true",
            "algorithm.objective=grpo",
            "algorithm.stein.eta=0.1",
            "algorithm.stein.repulsion_scale=relative",
            "algorithm.stein.normalisation=svgd",
            "algorithm.stein.neighbours=2",
            "algorithm.stein.coactivation_ema=0.5",
            "algorithm.stein.kernel=cosine",
            "algorithm.stein.tau=2",
            "algorithm.stein.temperature_scaling=none",
            "algorithm.stein.power_iterations=3",
            "algorithm.stein.initial_power_iterations=20",
            "algorithm.stein.prototype_interval=2",
            "algorithm.stein.chunk_mib=0.01",
            "algorithm.specialization.orthogonality_coef=0.01",
            "algorithm.specialization.orthogonality_scale=absolute",
            "algorithm.specialization.orthogonality=cosine",
            "algorithm.specialization.orthogonality_token_fraction=0.5",
            "algorithm.specialization.variance_coef=0.01",
            "algorithm.trust_region.contexts_per_rank=16",
            "algorithm.trust_region.max_backtracks=2",
            "algorithm.trust_region.delta_nats=0.2",
            "algorithm.trust_region.max_policy_drift=5",
            "algorithm.trust_region.drift_share=0.5",
            "algorithm.trust_region.max_consecutive_rejections=3",
            "algorithm.trust_region.snapshot_on_host=true",
            "algorithm.budget.max_drift=0.5",
            "algorithm.budget.min_ess=0.5",
            "algorithm.budget.temper=0.5",
            "algorithm.budget.ratio_length=sum",
            "algorithm.budget.max_age=1",
            "rollout.router_replay=R3",
        ],
    ),
    "vp2o with other modes": (
        1,
        [
            *VP2O,
            *COUNTDOWN,
            "algorithm.stein.attraction=false",
            "algorithm.stein.neighbours=null",
            "algorithm.stein.coactivation_threshold=0.1",
            "algorithm.budget.mode=monitor",
            "algorithm.trust_region.mode=monitor",
            "algorithm.objective=grpo",
            "algorithm.micro_batch_tokens=64",
            "algorithm.prefix_sharing=on",
            "rollout.router_replay=R2",
        ],
    ),
    "text": (
        1,
        [
            "algorithm=supervised",
            *SMALL,
            *COUNTDOWN,
            "algorithm.global_batch_size=4",
            "algorithm.data.source=jsonl",
            "algorithm.data.path={files}/text.jsonl",
            "algorithm.data.text_field=body",
            "algorithm.data.tokenizer={files}/tokenizer",
        ],
    ),
    "rows": (
        1,
        [
            "task=rows",
            *GRPO,
            "task.path={files}/rows.jsonl",
            "task.weights=[2.0]",
            "task.validation_path={files}/held_out.jsonl",
            "task.test_path={files}/held_out.jsonl",
            "task.columns.prompt=question",
            "task.columns.answer=result",
            "task.columns.completion=worked",
            "task.train_size=8",
            "task.seed=5",
            "task.prompt_format='Q: {prompt} A:'",
            "task.max_prompt_tokens=40",
            "task.on_long_prompt=refuse",
            "task.on_bad_row=skip",
            "task.on_duplicate=skip",
            "reward.path={files}/own.py:score",
            "reward.in_process=true",
            "reward.batch_size=4",
            "reward.workers=1",
            "reward.timeout_s=5",
            "reward.memory_mib=2048",
            "reward.overlong_buffer=2",
            "reward.overlong_penalty=0.5",
            "reward.mask_truncated=true",
            "rollout.sampling.max_new_tokens=60",  # so that some responses end before it
            "model.max_sequence_length=128",
            "reward.seed=3",
            *(f"reward.weights.{name}=0.1" for name in ("math", "choice", "exact", "regex", "instructions", "length")),
            "reward.weights.format=0.1",
            "reward.weights.own=0.5",
            "reward.choice.letters=ABCD",
            "reward.choice.last_letter=false",
            "reward.exact.ignore_case=true",
            "reward.exact.ignore_space=false",
            "reward.regex.pattern='[0-9]+'",
            "reward.format.pattern='.*'",
            "reward.length.full_words=2",
            "reward.length.zero_words=4",
            "reward.instructions.loose=true",
            "reward.instructions.score=share",
        ],
    ),
    "addends": (
        1,
        [
            "algorithm=supervised",
            "task=addends",
            *SMALL,
            "task.train_size=20",
            "task.addends=4",
            "task.min_target=15",
            "task.max_target=60",
            "task.min_answers=5",
        ],
    ),
    "coloring": (
        1,
        [
            "algorithm=supervised",
            "task=coloring",
            *SMALL,
            "task.train_size=20",
            "task.nodes=5",
            "task.edges=5",
            "task.colors=4",
        ],
    ),
    "linear order": (
        1,
        [
            "algorithm=supervised",
            "task=linear_order",
            *SMALL,
            "task.train_size=20",
            "task.letters=5",
            "task.precedences=4",
            "task.min_answers=5",
        ],
    ),
    "brackets": (
        1,
        [
            "algorithm=supervised",
            "task=brackets",
            *SMALL,
            "task.train_size=20",
            "task.pairs=6",
            "task.min_given=1",
            "task.max_given=3",
            "task.min_answers=5",
        ],
    ),
    "change": (
        1,
        [
            "algorithm=supervised",
            "task=change",
            *SMALL,
            "task.train_size=20",
            "task.kinds=4",
            "task.coins=6",
            "task.min_amount=12",
            "task.max_amount=30",
            "task.min_answers=5",
        ],
    ),
    "tensor and pipeline": (
        4,
        [
            *GRPO,
            *COUNTDOWN,
            "parallel.tensor_parallel=2",
            "parallel.pipeline_parallel=2",
            "parallel.expert_parallel=2",
            "parallel.sequence_parallel=true",
            "rollout.router_replay=R3",
            "parallel.timeout_minutes=3",
            "parallel.startup_minutes=3",
        ],
    ),
    "expert tensor and sharded optimizer": (
        2,
        [
            *GRPO,
            *COUNTDOWN,
            "parallel.expert_tensor_parallel=2",
            "parallel.distributed_optimizer=true",
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
        ],
    ),
    "context": (2, [*GRPO, *COUNTDOWN, "parallel.context_parallel=2"]),
    "again and resumed": (1, [*AGAIN, "algorithm.steps=4", "resume=must"]),
}
RUN_DIRS = {"again and resumed": "again"}


def every_setting() -> set[str]:
    """Settings of all algorithms and tasks."""
    pairs = ((algorithm, task) for algorithm in GROUPS["algorithm"].values() for task in GROUPS["task"].values())
    return {name for algorithm, task in pairs for name in leaves(TrainConfig(algorithm=algorithm(), task=task()))}


def changed(config: TrainConfig) -> set[str]:
    """Settings of a run that differ from the defaults of its classes."""
    base = TrainConfig(algorithm=type(config.algorithm)(), task=type(config.task)(), run_dir=f"runs/{config.name}")
    defaults = leaves(base)
    return {name for name, value in leaves(config).items() if value != defaults[name]}


def write_files(folder: Path) -> None:
    folder.mkdir()
    CharTokenizer().save(folder / "tokenizer")
    with (folder / "text.jsonl").open("w") as file:
        for number in range(40):
            print(json.dumps({"body": f"{number} and one is {number + 1}. " * 3}), file=file)
    (folder / "own.py").write_text(
        "def score(prompts, responses, rows):\n    return [len(text) % 3 / 2 for text in responses]\n"
    )
    asked = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    for name, size in (("rows", 12), ("held_out", 4)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(size):
                row = {
                    "question": f"{name} {number}",
                    "result": "ABCD"[number % 4],
                    "worked": f"It is {number}",
                    **asked,
                }
                print(json.dumps(row), file=file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, which have ended well."""
    folder = tmp_path_factory.mktemp("settings")
    write_files(folder / "files")
    jobs = []
    for name, (ranks, arguments) in RUNS.items():
        filled = [text.replace("{files}", str(folder / "files")).replace("{runs}", str(folder)) for text in arguments]
        jobs.append(Run(str(folder / RUN_DIRS.get(name, name)), filled, ranks=ranks))
    spec = folder / "runs.json"
    spec.write_text(json.dumps([asdict(job) for job in jobs]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.resume_job", str(spec)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr
    for number, (name, job) in enumerate(zip(RUNS, json.loads(spec.read_text()), strict=True)):
        assert set(job["statuses"]) == {0}, f"{name}: {(folder / f'output-{number}.txt').read_text()[-3000:]}"
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name not in RUN_DIRS])
def test_a_run_took_optimizer_steps(runs: Path, name: str) -> None:
    record = read(runs / name)
    config = load_config(runs / name)
    key = "supervised/loss" if config.algorithm.name is Algorithm.supervised else "policy/loss"
    measured = {
        name: [float(value) for value in record[name] if value is not None]
        for name in ("optimizer/steps", "optimizer/skipped", "optimizer/grad_norm", key)
    }
    assert measured["optimizer/steps"][-1] >= STEPS and measured["optimizer/skipped"][-1] == 0
    for name in (key, "optimizer/grad_norm"):
        assert len(measured[name]) >= STEPS and all(map(math.isfinite, measured[name]))
    assert max(measured["optimizer/grad_norm"]) > 0


@pytest.mark.slow
def test_every_setting_is_trained_with(runs: Path) -> None:
    trained = set().union(*(changed(load_config(runs / RUN_DIRS.get(name, name))) for name in RUNS))
    missing = every_setting() - trained - NOT_TRAINED_WITH.keys()
    assert not missing, f"change these from their defaults in a run of RUNS: {sorted(missing)}"
    assert not NOT_TRAINED_WITH.keys() & trained, "these are trained with: take them off the list"
    assert NOT_TRAINED_WITH.keys() <= every_setting(), "these are no settings any more"

"""Runs as a user starts them: warm-up, reinforcement from its checkpoint, report; alone and on several ranks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.tracking.record import read
from tests.distributed import ROOT, run_distributed

MICRO = [
    "model=micro",
    "task.train_size=200",
    "task.validation_size=8",
    "task.test_size=8",
    "evaluation.problems=8",
    "evaluation.samples=4",
    "evaluation.pass_at=[1,4]",
    "evaluation.interval=2",
    "logging.tensorboard=false",
    "optimizer.lr=3e-3",
]
WARM_UP = [*MICRO, "algorithm.steps=4", "optimizer.lr_warmup_steps=1", "algorithm.global_batch_size=8"]
REINFORCE = [
    *MICRO,
    "algorithm.steps=3",
    "optimizer.lr_warmup_steps=1",
    "algorithm.minibatches=1",
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=4",
    "algorithm.filter_uniform_groups=false",  # a random model is never right: without this there is nothing to train on
    "algorithm.entropy_coef=0.05",
    "model.moe_aux_loss_coeff=0",  # a product of micro-batch means: it depends on how data is dealt to ranks
]


def command_line(recipe: str, run_dir: Path, *overrides: str) -> list[str]:
    return ["--config-name", recipe, f"run_dir={run_dir}", *overrides]


def train(recipe: str, run_dir: Path, *overrides: str, ranks: int = 1, status: int = 0) -> str:
    """Run `python -m megatron_vp2o.train`; returns what it printed."""
    arguments = command_line(recipe, run_dir, *overrides)
    if ranks > 1:
        run_distributed("megatron_vp2o.train", ranks, *arguments, timeout=240)
        return ""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_vp2o.train", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def measured(run_dir: Path, key: str) -> list[float]:
    """A metric's values, steps at which it was not measured left out."""
    return [float(value) for value in read(run_dir)[key] if value is not None]


def without_times(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("time/")} for line in lines]


@pytest.fixture(scope="module")
def warm_up(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("warm-up") / "run"
    train("countdown_tiny_supervised", run_dir, *WARM_UP)
    return run_dir


@pytest.fixture(scope="module")
def reinforced(warm_up) -> Path:
    run_dir = warm_up.parent / "grpo"
    train("countdown_tiny_grpo", run_dir, *REINFORCE, f"init_from={warm_up}")
    return run_dir


@pytest.mark.smoke
def test_warm_up_learns_and_leaves_a_whole_run(warm_up):
    assert read(warm_up)["step"] == [0, 1, 2, 3, 4]
    losses = measured(warm_up, "supervised/loss")
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert len(measured(warm_up, "eval/greedy_accuracy")) == 3 and len(measured(warm_up, "test/greedy_accuracy")) == 1
    assert (warm_up / "config.yaml").is_file()
    checkpoint = warm_up / "checkpoints" / "step_000004"
    assert (checkpoint / "tokenizer.json").is_file()


@pytest.mark.smoke
def test_reinforcement_starts_from_the_warm_up(warm_up, reinforced):
    assert read(reinforced)["step"] == [0, 1, 2, 3]
    for key in ("eval/greedy_accuracy", "eval/pass@1", "eval/response_length"):
        assert measured(reinforced, key)[0] == measured(warm_up, key)[-1], key
    assert max(measured(reinforced, "policy/logprob_mismatch")) <= 1e-5
    assert measured(reinforced, "optimizer/steps") == measured(reinforced, "actor/refreshes") == [1, 2, 3]
    assert measured(reinforced, "samples")[-1] == 3 * 4 * 4
    for key in ("policy/entropy", "policy/approx_kl", "policy/loss", "optimizer/grad_norm"):
        values = measured(reinforced, key)
        assert len(values) == 3 and all(math.isfinite(value) for value in values), key


def test_the_same_seed_gives_the_same_record(warm_up, reinforced):
    again = warm_up.parent / "again"
    train("countdown_tiny_grpo", again, *REINFORCE, f"init_from={warm_up}")
    assert without_times(again) == without_times(reinforced)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ["parallel.expert_parallel=2"]),
        (4, ["parallel.tensor_parallel=2", "parallel.expert_parallel=2", "algorithm.micro_batch_tokens=80"]),
        (2, ["parallel.pipeline_parallel=2"]),
    ],
)
def test_layouts_draw_the_same_samples_and_learn_the_same(warm_up, reinforced, ranks, layout):
    run_dir = warm_up.parent / f"layout-{ranks}-{len(layout)}-{layout[0][9:11]}"
    train("countdown_tiny_grpo", run_dir, *REINFORCE, f"init_from={warm_up}", *layout, ranks=ranks)
    for key in ("rollout/response_length", "reward/mean", "policy/entropy", "policy/loss", "optimizer/grad_norm"):
        assert measured(run_dir, key) == pytest.approx(measured(reinforced, key), rel=1e-3, abs=1e-5), key
    assert max(measured(run_dir, "policy/logprob_mismatch")) <= 1e-5


def test_packed_rows_leave_the_record_of_padded_ones(warm_up, reinforced):
    run_dir = warm_up.parent / "packed"
    train("countdown_tiny_grpo", run_dir, *REINFORCE, f"init_from={warm_up}", "algorithm.micro_batch_tokens=70")
    ours, theirs = without_times(run_dir), without_times(reinforced)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine["packing/tokens_shared"] or 0) > 0 or mine["step"] == 0
        for key in reference.keys() - {"packing/tokens_shared"}:
            expected = reference[key] if reference[key] is None else pytest.approx(reference[key], rel=1e-3, abs=1e-5)
            assert mine[key] == expected, key
    moved = measured(run_dir, "optimizer/grad_norm")
    assert len(moved) == 3 and min(moved) > 0 and measured(run_dir, "optimizer/skipped")[-1] == 0
    assert len({line["eval/response_length"] for line in ours if line.get("eval/response_length")}) > 1


def test_stale_actors_minibatches_nucleus_and_reference(warm_up, tmp_path):
    settings = [
        "rollout.refresh_interval=2",
        "algorithm.minibatches=2",
        "algorithm.epochs=2",
        "rollout.sampling.top_p=0.9",
        "algorithm.kl_coef=0.1",
        "algorithm.kl_reference=initial",
        "optimizer.lr=1e-2",
        "checkpoint.export_hf=true",
    ]
    run_dir = tmp_path / "run"
    train("countdown_tiny_grpo", run_dir, *REINFORCE, f"init_from={warm_up}", *settings)
    assert measured(run_dir, "optimizer/steps")[-1] == 3 * 4
    assert measured(run_dir, "actor/age") == [1, 2, 1] and measured(run_dir, "actor/refreshes")[-1] == 2
    assert measured(run_dir, "actor/version") == [0, 0, 8]
    assert max(measured(run_dir, "policy/logprob_mismatch")) <= 1e-5
    assert measured(run_dir, "policy/kl_reference")[-1] > 0
    assert (run_dir / "hf" / "model.safetensors").is_file() and (run_dir / "hf" / "tokenizer.json").is_file()


def test_report_from_both_runs(warm_up, reinforced, tmp_path):
    page = tmp_path / "report.html"
    done = subprocess.run(
        [sys.executable, "tools/report.py", str(warm_up), str(reinforced), "--out", str(page)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert str(page) in done.stdout and "<svg" in page.read_text()


def test_training_on_text_lines(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"{a} plus {b} is {a + b}."}) + "\n" for a in range(9) for b in range(9))
    )
    run_dir = tmp_path / "run"
    train("text_tiny_supervised", run_dir, *WARM_UP, f"algorithm.data.path={text}")
    losses = measured(run_dir, "supervised/loss")
    assert losses[-1] < losses[0]


def test_errors_are_one_clear_line(warm_up, tmp_path):
    said = train("countdown_tiny_grpo", tmp_path / "run", "init_from=" + str(tmp_path / "nothing"), status=2)
    assert "Traceback" not in said and "error: init_from=" in said
    assert not (tmp_path / "run").exists()
    wider = ["model.hidden_size=32", f"init_from={warm_up}"]
    said = train("countdown_tiny_grpo", tmp_path / "run", *REINFORCE, *wider, status=2)
    assert "Traceback" not in said and "hidden_size" in said

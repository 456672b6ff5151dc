"""examples/pretrain_vp2o.py under Megatron-LM's own `pretrain()`, which megatron-core has from 0.19 on (Python 3.12)."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.killed import run_until
from tests.wheel import build_wheel, environment_with

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
EXAMPLE = ROOT / "examples" / "pretrain_vp2o.py"


def _ships_training() -> bool:
    spec = importlib.util.find_spec("megatron.core")
    return spec is not None and (Path(str(spec.origin)).parent.parent / "training").is_dir()


pytestmark = pytest.mark.skipif(not _ships_training(), reason="this megatron-core has no megatron.training (0.19 has)")

ARGUMENTS = shlex.split(
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32 "
    "--ffn-hidden-size 32 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 8 --lr 3e-3 "
    "--tokenizer-type NullTokenizer --vocab-size 63 --mock-data --transformer-impl local --use-cpu-initialization "
    "--no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion "
    "--no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion --distributed-backend gloo --eval-iters 0 "
    "--eval-interval 1000 --split 1,0,0 --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --lr-decay-iters 12 --log-interval 1 --moe-token-dispatcher-type alltoall "
    "--no-create-attention-mask-in-dataloader --hidden-dropout 0 --attention-dropout 0 --num-workers 0 --ckpt-format torch_dist"
)
ON = ["--vp2o", "stein.enabled=true", "stein.neighbours=2", "stein.repulsion_scale=relative"]


def host(folder: Path, ranks: int, iterations: int, *further: str) -> tuple[list[str], dict[str, str]]:
    """The command and its environment."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "2000",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PRETRAIN_RESULT": str(folder / "result"),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "tests.plugins.pretrain_on_cpu", str(EXAMPLE), *ARGUMENTS]
    command += [f"--expert-model-parallel-size={ranks}", f"--train-iters={iterations}", *further]
    return command, environment


def pretrain(folder: Path, ranks: int, iterations: int, *further: str) -> tuple[str, list[dict[str, Any]]]:
    """Returns what was printed, and each rank's losses and checksum of weights."""
    command, environment = host(folder, ranks, iterations, *further)
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout, [json.loads((folder / f"result.{rank}").read_text()) for rank in range(ranks)]


@pytest.mark.smoke
@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_train_save_and_resume_with_diagnostics_in_tensorboard(tmp_path: Path) -> None:
    saving = ["--save", str(tmp_path / "ck"), "--save-interval", "2"]
    board = ["--tensorboard-dir", str(tmp_path / "board")]
    output, straight = pretrain(tmp_path, 2, 4, *saving, *board, *ON)
    assert output.count("is active in Megatron-LM's pretrain(): Stein transform") == 1
    assert len(straight[0]["losses"]) == 4

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for name in ("vp2o/moe/router_entropy", "vp2o/stein/prototype_overlap", "vp2o/stein/repulsion_ratio"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4]
    assert events.Scalars("vp2o/stein/repulsion_ratio")[0].value == pytest.approx(0.01, rel=1e-3)

    _, resumed = pretrain(tmp_path, 2, 4, "--load", str(tmp_path / "ck"), "--ckpt-step", "2", *ON)
    assert [rank["weights"] for rank in resumed] == [rank["weights"] for rank in straight]
    assert len(resumed[0]["losses"]) == 2


@pytest.mark.distributed
@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_state(tmp_path: Path) -> None:
    """SIGKILL at iteration 5 of 6, with checkpoints of 2 and 4. That the state matters is shown in test_hosts.py."""
    _, straight = pretrain(tmp_path, 2, 6, *ON)
    saving = ["--save", str(tmp_path / "ck"), "--load", str(tmp_path / "ck"), "--save-interval", "2", *ON]
    command, environment = host(tmp_path, 2, 6, *saving)
    run_until("iteration        5/", command, cwd=tmp_path, env=environment)
    assert (tmp_path / "ck" / "latest_checkpointed_iteration.txt").read_text().strip() == "4"
    _, resumed = pretrain(tmp_path, 2, 6, *saving)
    assert len(resumed[0]["losses"]) == 2
    assert [rank["weights"] for rank in resumed] == [rank["weights"] for rank in straight]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_five_steps_are_those_of_the_projects_own_trainer(tmp_path: Path, ranks: int) -> None:
    # Wide weights: no token stands between two experts to within rounding.
    constant = ["--init-method-std", "0.2", "--lr", "3e-4", "--lr-decay-style", "constant", "--weight-decay", "0"]
    pretrain(tmp_path, ranks, 5, *constant, *ON)
    job = "tests.plugins.pretrain_equal_job:apart"
    for found in run_distributed(job, ranks, str(tmp_path / "result"), 5, 3e-4, {"expert_parallel": ranks}):
        assert found["moved"] > 1e-3
        assert found["trainers"] < 1e-5


@pytest.mark.slow
def test_switched_off_it_is_the_host_to_the_bit_and_loads_a_checkpoint_without_state(tmp_path: Path) -> None:
    bare = tmp_path / "bare.py"
    hook = "    config.post_wrap_hooks.append(post_wrap_hook(args.vp2o))\n"
    source = EXAMPLE.read_text()
    assert hook in source
    bare.write_text(source.replace(hook, ""))
    _, off = pretrain(tmp_path, 1, 3, "--save", str(tmp_path / "ck"))
    example = globals()["EXAMPLE"]
    try:
        globals()["EXAMPLE"] = bare
        _, without = pretrain(tmp_path, 1, 3)
    finally:
        globals()["EXAMPLE"] = example
    assert off == without
    _, on = pretrain(tmp_path, 1, 3, *ON)
    assert on[0]["weights"] != off[0]["weights"]
    load = ["--load", str(tmp_path / "ck"), "--dist-ckpt-strictness", "log_all"]
    output, _ = pretrain(tmp_path, 1, 5, *load, *ON)
    assert "has no state of the Stein transform" in output


@pytest.mark.slow
def test_a_wheel_beside_the_host_works_and_a_broken_one_ends_the_run(tmp_path: Path) -> None:
    """In an environment that has the wheel and nothing of the checkout."""
    python = environment_with(build_wheel(tmp_path / "build"), tmp_path / "environment")
    for source in (HERE / "pretrain_on_cpu.py", EXAMPLE):
        shutil.copy(source, tmp_path)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PRETRAIN_RESULT": str(tmp_path / "result"), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
        )

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "pretrain_on_cpu.py"]
    done = run(*torchrun, EXAMPLE.name, *ARGUMENTS, "--train-iters=2", *ON)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "is active in Megatron-LM's pretrain(): Stein transform" in done.stdout
    result = json.loads((tmp_path / "result.0").read_text())
    assert len(result["losses"]) == 2
    assert result["package"].startswith(str(tmp_path / "environment"))
    names = "import megatron_vp2o.plugins.slime as s; print(s.before_train_step.__name__, s.policy_loss.__name__)"
    assert run("-c", names).stdout.split() == ["before_train_step", "policy_loss"]
    (broken,) = (tmp_path / "environment").rglob("megatron_vp2o/plugins/hook.py")
    broken.write_text("raise RuntimeError('broken on purpose')\n")
    done = run(*torchrun, EXAMPLE.name, *ARGUMENTS, "--train-iters=2", *ON)
    assert done.returncode != 0 and "RuntimeError: broken on purpose" in done.stderr
    assert "iteration" not in done.stdout

"""NeMo compatibility: the `exp_manager` block and `hydra_runner`. What needs nemo-toolkit is skipped without it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.exp_manager import HONOURED, INSTEAD, exp_manager_problems
from megatron_vp2o.config.schema import LoggingConfig
from megatron_vp2o.config.validate import validate
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.tracking.trackers import make_trackers

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "countdown_tiny_supervised"
HAS_NEMO = find_spec("nemo") is not None
needs_nemo = pytest.mark.skipif(not HAS_NEMO, reason="nemo-toolkit is not installed")
without_nemo = pytest.mark.skipif(HAS_NEMO, reason="nemo-toolkit is installed")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (3, "exp_manager=3 must be a mapping of NeMo's settings"),
        ({"exp_dri": "x"}, "exp_manager has no setting 'exp_dri'; did you mean 'exp_dir'?"),
        (
            {"create_checkpoint_callback": True},
            "exp_manager.create_checkpoint_callback=True is NeMo's and does nothing",
        ),
        ({"ema": {"enable": True}}, "there is no moving average of weights"),
        ({"max_time_per_run": "00:03:00:00"}, "executor.time of the launcher stops a run in time"),
    ],
)
def test_what_would_be_ignored_is_refused(block: Any, expected: str) -> None:
    (problem,) = exp_manager_problems(block, elsewhere=True)
    assert expected in problem


def test_what_is_honoured_or_holds_anyway_passes() -> None:
    block = {
        "exp_dir": "x",
        "create_wandb_logger": False,
        "resume_if_exists": True,
        "create_checkpoint_callback": False,
    }
    assert list(exp_manager_problems(block, elsewhere=True)) == []
    assert list(exp_manager_problems(None, elsewhere=False)) == []


@without_nemo
def test_without_nemo_toolkit_a_block_is_one_clear_error() -> None:
    config = compose(RECIPE, ["exp_manager={exp_dir: results}"])
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert str(caught.value) == (
        "exp_manager is set and needs nemo-toolkit, which is not installed: pip install 'megatron-vp2o[nemo-toolkit]', or set "
        "exp_manager=null"
    )
    validate(config, elsewhere=True)  # the cluster may have it
    refused = python("-m", "megatron_vp2o.nemo_train", "--config-name", RECIPE)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: nemo-toolkit is not installed: pip install ")


def test_nemo_is_not_imported_unless_asked_for() -> None:
    code = (
        "import sys, megatron_vp2o.train, megatron_vp2o.tracking.trackers, megatron_vp2o.launch.__main__\n"
        "print([name for name in ('nemo', 'nemo_run', 'lightning') if name in sys.modules])"
    )
    assert python("-c", code).stdout.strip() == "[]"


@needs_nemo
def test_every_key_of_the_block_is_known() -> None:
    import dataclasses

    from nemo.utils.exp_manager import ExpManagerConfig

    names = {field.name for field in dataclasses.fields(ExpManagerConfig)}
    parameters = {name for name in names if name.endswith(("_params", "_kwargs")) or name == "fault_tolerance"}
    assert names - parameters - set(HONOURED) - set(INSTEAD) == {"create_ipl_epoch_stopper_callback"}
    assert set(HONOURED) | set(INSTEAD) <= names


@needs_nemo
def test_metrics_go_through_the_loggers_of_the_manager(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    block = {"exp_dir": str(tmp_path / "results"), "name": "tiny", "use_datetime_version": False}
    config = {"name": "tiny", "exp_manager": block}
    with make_trackers(LoggingConfig(tensorboard=False), tmp_path / "run", config, rank=0) as trackers:
        trackers.log(1, {"supervised/loss": 2.5, "step": 1})
        trackers.log(2, {"supervised/loss": 1.5, "absent": None})
    folder = tmp_path / "results" / "tiny" / "version_0"
    assert (folder / "cmd-args.log").exists()
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("supervised/loss")] == [(1, 2.5), (2, 1.5)]
    assert make_trackers(LoggingConfig(tensorboard=False), tmp_path / "run", config, rank=1)._trackers == []


@needs_nemo
def test_a_recipe_composes_under_hydra_runner() -> None:
    shown = python("-m", "megatron_vp2o.nemo_train", "--config-name", RECIPE, "--cfg", "job", "algorithm.steps=7")
    assert shown.returncode == 0, shown.stderr
    assert "name: countdown_tiny_supervised" in shown.stdout and "  steps: 7" in shown.stdout
    refused = python("-m", "megatron_vp2o.nemo_train", "--config-name", RECIPE, "algorithm.stesp=7")
    assert refused.returncode == 2
    assert "error: there is no setting 'algorithm.stesp'; did you mean 'algorithm.steps'?" in refused.stderr

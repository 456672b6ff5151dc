"""The plug-in in slime's own training loop, from a checkout that SLIME_HOME names (Python 3.12, megatron-core 0.19)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.plugins.test_pretrain import _ships_training

HOME = os.environ.get("SLIME_HOME", "")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not HOME, reason="SLIME_HOME names no checkout of slime"),
    pytest.mark.skipif(not _ships_training(), reason="slime needs megatron.training (megatron-core 0.19)"),
]


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    assert (Path(HOME) / "slime" / "backends" / "megatron_utils" / "model.py").is_file(), (
        f"SLIME_HOME={HOME} is no slime"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{HOME}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.syspath_prepend(HOME)
        return run_distributed(
            "tests.plugins.slime_job:loop", request.param, {"expert_parallel": request.param}, timeout=240
        )


def test_its_train_function_with_the_hook_is_the_projects_own_trainer(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["moved"] > 1e-2 and found["transform moved"] > 1e-3
        assert found["off"] == 0.0
        assert found["own"] < 1e-5


def test_its_trackers_get_the_metrics(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["logged"] == list(range(1, ranks[0]["steps"]))
    assert len(ranks[0]["losses"]) == ranks[0]["steps"]


def test_its_policy_loss_without_the_clip(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["loss"] == pytest.approx(
            found["by hand"] * len(ranks), rel=1e-5
        )  # as Megatron divides by the ranks
        assert abs(found["clipped"] - found["loss"]) > 1e-2


def test_what_is_broken_ends_its_run(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["missing settings"].startswith("ConfigError: the vp2o hook is set and its settings are not")
        assert found["no such function"].startswith("AttributeError: module 'megatron_vp2o.plugins.slime'")

"""Plug-ins in a loop that treats Megatron's model as slime and `pretrain()` do: equal to this project's trainer, off is off,
and the state survives a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed

LAYOUTS: dict[str, dict[str, Any]] = {"alone": {}, "EP=2": {"expert_parallel": 2}}


@pytest.fixture(scope="module", params=list(LAYOUTS))
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    layout = LAYOUTS[request.param]
    folder: Path = tmp_path_factory.mktemp("hosts")
    return run_distributed(
        "tests.plugins.host_job:hosts", layout.get("expert_parallel", 1), layout, str(folder), timeout=240
    )


@pytest.mark.distributed
@pytest.mark.slow
def test_switched_off_a_run_is_the_same_to_the_bit(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["plain moved"] > 1e-3
        assert found["slime off"] == 0.0
        assert found["pretrain off"] == 0.0
        assert found["pretrain off, function untouched"]


@pytest.mark.distributed
@pytest.mark.slow
def test_steps_are_those_of_the_projects_own_trainer(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["transform moved"] > 1e-3
        assert found["slime and own trainer"] < 1e-5
        assert found["pretrain and own trainer"] < 1e-5
        assert found["own steps"] == 6
        assert found["losses moved"] > 1e-4


@pytest.mark.distributed
@pytest.mark.slow
def test_the_hook_logs_every_step_but_the_last(ranks: list[dict[str, Any]]) -> None:
    """It is called before a step, and so reports the step before."""
    logged = ranks[0]["logged"]
    assert [line["vp2o/step"] for line in logged[:5]] == [1, 2, 3, 4, 5]
    assert all(line["vp2o/moe/router_entropy"] > 0 for line in logged)
    assert "stein/prototype_overlap" in ranks[0]["metrics"]
    assert all(found["logged"] == [] for found in ranks[1:])


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["EP=2"], indirect=True)
def test_the_state_survives_the_hosts_checkpoint(ranks: list[dict[str, Any]]) -> None:
    """Of two ranks; saving takes as long as all else."""
    for found in ranks:
        assert found["resumed and straight"] < 1e-6
        assert found["resumed without its state"] > 1e-5


@pytest.mark.distributed
@pytest.mark.slow
def test_what_is_broken_is_said_in_one_line(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for host in ("pretrain", "slime"):
            message = found[f"{host} twice"]
            assert message.startswith(
                "vp2o is in this model already, put there by the plug-in for Megatron-LM's pretrain()"
            )
            assert "\n" not in message
        assert len(found["warnings"]) == 1
        assert found["warnings"][0].startswith("megatron-vp2o was tested with megatron-core 0.1, and this is 0.1")
        assert found["critic untouched"]

"""Bad launches end before submission, each in one line; the cluster is a few stand-in commands on the PATH."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.launch import __main__ as command_line
from megatron_vp2o.launch import checks
from megatron_vp2o.launch.settings import ExecutorSettings, SlurmSettings, TorchrunSettings

PYXIS = "      --container-image=[USER@]IMAGE"


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *, nemo_run: bool) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        if name == "nemo_run":
            return real("json") if nemo_run else None
        return real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


class Cluster:
    """Stand-ins for Slurm's commands; each prints a text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.says("sbatch", "")
        self.says("sinfo", "batch 4\nh100 2\nh100 6\n")
        self.says("scontrol", "AccountingStorageEnforce = none\n")
        self.says("srun", "")
        self.says("sacctmgr", "")

    def says(self, command: str, text: str, status: int = 0) -> None:
        file = self.folder / command
        file.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
        file.chmod(0o755)

    def charges(self, accounts: str, default: str = "") -> None:
        self.says("scontrol", "AccountingStorageEnforce = associations,limits\n")
        file = self.folder / "sacctmgr"
        file.write_text(f"#!/bin/sh\ncase \"$*\" in *assoc*) printf '{accounts}';; *) printf '{default}';; esac\n")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    pretend_installed(monkeypatch, nemo_run=True)
    return Cluster(folder)


def refusal(executor: ExecutorSettings, *, submit: bool = True) -> str:
    with pytest.raises(ConfigError) as caught:
        checks.check(executor, submit=submit)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_good_launch_passes(cluster: Cluster, tmp_path: Path) -> None:
    image = tmp_path / "image.sqsh"
    image.touch()
    cluster.says("srun", PYXIS)
    cluster.charges("us\\nthem\\n")
    good = SlurmSettings(
        account="us", partition="h100", nodes=8, container_image=str(image), container_mounts=[f"{tmp_path}:/data:ro"]
    )
    checks.check(good, submit=True)
    checks.check(TorchrunSettings(), submit=True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"partition": "h10"}, "executor.partition=h10: this cluster has no such partition; did you mean 'h100'?"),
        ({"partition": "x"}, "executor.partition=x: this cluster has no such partition; there are: batch, h100"),
        ({"partition": "batch", "nodes": 5}, "executor.nodes=5 exceeds the 4 nodes of executor.partition=batch"),
        ({"nodes": 9}, "executor.nodes=9 exceeds the nodes of every partition"),
        ({"container_image": "nvcr.io/nvidia/nemo:25.04"}, "this cluster's srun has no --container-image, so Pyxis is"),
        ({"nodes": 0}, "executor.nodes=0 must be at least 1"),
        ({"time": "1 hour"}, "executor.time=1 hour is no time limit: write [DAYS-]HOURS:MINUTES:SECONDS"),
        ({"time": "00:05:00"}, "executor.signal_lead_s=300 is not below the 300 s of executor.time=00:05:00"),
        ({"gpus_per_node": 4, "ranks_per_node": 8}, "executor.ranks_per_node=8 exceeds executor.gpus_per_node=4"),
        ({"rendezvous_port": 80}, "executor.rendezvous_port=80 must be between 1024 and 65000"),
        ({"container_mounts": ["/data:/data"]}, "without a container: set executor.container_image"),
        ({"environment": {"A-B": "1"}}, "executor.environment has 'A-B', which is no name of a variable"),
        ({"workdir": "/nowhere"}, "executor.workdir=/nowhere is not a folder"),
        ({"python": "pyhton"}, "executor.python=pyhton is no program"),
    ],
)
def test_settings_that_cannot_work(cluster: Cluster, settings: dict[str, Any], expected: str) -> None:
    assert expected in refusal(SlurmSettings(**settings))


def test_containers_that_are_not_there(cluster: Cluster) -> None:
    cluster.says("srun", PYXIS)
    assert "executor.container_image=/no.sqsh: there is no such file" in refusal(
        SlurmSettings(container_image="/no.sqsh")
    )
    image = "nvcr.io/nvidia/nemo:25.04"  # an address, not a file
    for mount, expected in (("data", "write SOURCE:TARGET"), ("/no:/data", "and /no does not exist here")):
        assert expected in refusal(SlurmSettings(container_image=image, container_mounts=[mount]))


def test_accounts(cluster: Cluster) -> None:
    cluster.charges("us\\nthem\\n")
    message = refusal(SlurmSettings())
    assert message.startswith("executor.account is not set, this cluster charges an account, and ")
    assert message.endswith("has no default one: choose of them, us")
    assert "executor.account=you is none of the accounts of " in refusal(SlurmSettings(account="you"))
    cluster.charges("us\\nthem\\n", default="us")
    checks.check(SlurmSettings(), submit=True)


def test_no_slurm_here(cluster: Cluster) -> None:
    cluster.says("sinfo", "", status=1)
    assert "sinfo gets no answer, so no Slurm controller can be reached" in refusal(SlurmSettings())
    (cluster.folder / "sbatch").unlink()
    os.environ["PATH"] = str(cluster.folder)
    assert refusal(SlurmSettings()).startswith(
        "executor=slurm: there is no sbatch on this machine, so no Slurm to submit to"
    )
    checks.check(SlurmSettings(partition="unknown"), submit=False)  # a dry run needs none


def test_without_nemo_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_installed(monkeypatch, nemo_run=False)
    assert command_line.main(["--config-name", "countdown_tiny_supervised", "--dryrun"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "error: nemo-run is not installed, and the launcher submits through it: pip install 'megatron-vp2o[nemo]'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config-nam", "x"], "error: unrecognized arguments: --config-nam; --help says how"),
        (["--config-name"], "error: argument --config-name/-cn: expected one argument; --help says how"),
        (["--config-dir", "/nowhere", "--config-name", "x"], "error: --config-dir /nowhere is not a folder"),
    ],
)
def test_command_lines_that_make_no_sense(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(arguments) == 2
    assert capsys.readouterr().err == f"{expected}\n"


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--help"]) == 0
    text = capsys.readouterr().out
    for part in (
        "executor=local",
        "executor=slurm",
        "executor.requeue: ",
        "countdown_tiny_grpo",
        "seeds=[1,2,3]",
        "--dryrun",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("time", "expected"),
    [("00:01:00", 60), ("1-02:00:01", 93601), ("100:00:00", 360000), ("60", None), ("1:99:00", None)],
)
def test_time_limits(time: str, expected: int | None) -> None:
    assert checks.seconds(time) == expected

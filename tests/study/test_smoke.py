"""`make study STUDY=smoke`: killed in the middle and started again, with a variant that fails, it comes to the same table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_vp2o.cores import share_of_cores
from megatron_vp2o.study.__main__ import main
from megatron_vp2o.study.spec import FOLDER
from tests.distributed import ROOT


def start(study: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_vp2o.study", study, "--folder", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def table(folder: Path) -> list[str]:
    """Lines without what differs: folders are not in it, and commit and machine are the same here."""
    return (folder / "results.csv").read_text().splitlines()


def _difference(page: str, variant: str) -> float:
    """In distinct answers."""
    (line,) = [line for line in page.splitlines() if line.startswith((f"| {variant} |", f"| {variant} * |"))]
    return float(line.split("|")[6].split("[")[0])


def test_killed_and_resumed_it_gives_the_same_table(tmp_path):
    whole = start("smoke", tmp_path / "whole")
    output, _ = whole.communicate(timeout=400)
    assert whole.returncode == 0, output
    page = (tmp_path / "whole" / "results.md").read_text()
    assert "5 of 5 runs are finished" in page and "| grpo" in page and "| answers" in page
    assert len(table(tmp_path / "whole")) == 1 + 5
    configs = [yaml.safe_load(path.read_text()) for path in (tmp_path / "whole").rglob("config.yaml")]
    assert [config["config"]["threads"] for config in configs] == [share_of_cores(1)] * 5
    assert main(["smoke", "--folder", str(tmp_path / "whole"), "--against", "answers"]) == 0
    turned = (tmp_path / "whole" / "results_against_answers.md").read_text()
    assert _difference(turned, "grpo") == pytest.approx(-_difference(page, "answers"), abs=1e-9)
    assert main(["smoke", "--folder", str(tmp_path / "whole"), "--against", "nothing"]) == 2

    there = ["--records", str(tmp_path / "whole" / "records.jsonl")]
    assert main(["smoke", "--folder", str(tmp_path / "elsewhere"), *there]) == 0, "nothing is left to run"
    assert table(tmp_path / "elsewhere") == table(tmp_path / "whole")
    assert (tmp_path / "elsewhere" / "results.md").read_text() == page
    assert [path for path in (tmp_path / "elsewhere").rglob("*") if path.is_dir()] == []

    # the same study with a variant that cannot be: its runs fail, and the others do not care
    body = yaml.safe_load((ROOT / FOLDER / "smoke.yaml").read_text())
    body["variants"]["broken"] = ["algorithm.group_size=1"]
    (tmp_path / "smoke.yaml").write_text(yaml.safe_dump(body))
    folder = tmp_path / "killed"
    first = start(str(tmp_path / "smoke.yaml"), folder)
    run = folder / "addends" / "grpo" / "seed_1"
    deadline = time.time() + 300
    while not (run / "checkpoints").is_dir() and time.time() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=30)
    assert (run / "checkpoints").is_dir() and not (run / "done.json").exists(), "killed in the middle of a run"
    warm_up = (folder / "addends" / "warm_up" / "done.json").stat().st_mtime_ns

    second = start(str(tmp_path / "smoke.yaml"), folder)
    output, _ = second.communicate(timeout=400)
    assert second.returncode == 1, output
    assert "failed: addends/broken/seed_1" in output and "group_size=1" in output
    assert (folder / "addends" / "warm_up" / "done.json").stat().st_mtime_ns == warm_up, "nothing is run twice"
    assert table(folder) == table(tmp_path / "whole")
    assert "Failed: addends/broken/seed_2" in (folder / "results.md").read_text()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]

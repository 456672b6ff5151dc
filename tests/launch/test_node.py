"""A request to stop reaches the ranks under torchrun, whichever process gets it, and they end in peace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "everywhere"),
    # Slurm signals its own child under proctrack/cgroup, and all processes under proctrack/linuxproc.
    [(signal.SIGUSR1, False), (signal.SIGUSR1, True), (signal.SIGTERM, False)],
)
def test_a_request_to_stop_reaches_the_ranks(tmp_path: Path, number: signal.Signals, everywhere: bool) -> None:
    node = subprocess.Popen(
        [
            *(sys.executable, "-m", "megatron_vp2o.launch.node", "--standalone", f"--nproc-per-node={RANKS}"),
            *("--max-restarts=2", "-m", "tests.launch.signals_job", str(tmp_path)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while len(list(tmp_path.glob("ready-*"))) < RANKS:
            assert node.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        targets = [psutil.Process(node.pid)]
        if everywhere:
            targets += targets[0].children(recursive=True)
        for process in targets:
            process.send_signal(number)
        errors = node.communicate(timeout=60)[1]
    finally:
        for process in psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []:
            process.kill()
        node.kill()
    assert node.returncode == 0, errors
    assert len(list(tmp_path.glob("saved-*"))) == RANKS
    assert len(list(tmp_path.glob("ready-*"))) == RANKS


@pytest.mark.distributed
def test_ranks_that_start_again_find_each_other(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "megatron_vp2o.launch.node", "--standalone", f"--nproc-per-node={RANKS}"),
            *("--max-restarts=1", "-m", "tests.launch.restart_job", str(tmp_path)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    expected = {f"world-{attempt}-{rank}" for attempt in range(2) for rank in range(RANKS)}
    assert {file.name for file in tmp_path.iterdir()} == expected
    assert all(file.read_text() == str(RANKS) for file in tmp_path.iterdir())


def test_the_agents_status_is_the_nodes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_vp2o.launch.node", "--no-such-option"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr or "required" in done.stderr

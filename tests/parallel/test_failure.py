"""What becomes of a world when something happens to one of its ranks, apart from where in a training step that is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fault_job import Fault
from tests.test_faults import ROOT, check, do

pytestmark = pytest.mark.distributed
WORK, MAIN = "tests.parallel.failure_job:work", "tests.parallel.failure_job:main"


def case(folder: Path, what: str, *, kind: str = "error", fault: bool = True, ranks: int = 3, **more: object) -> Fault:
    startup = more.pop("startup", 60)
    place = WORK if fault else ""
    name = folder / f"{what}-{kind}".replace(" ", "-")
    return Fault(str(name), [what, str(startup)], ranks, place, 1, 5, kind, target=MAIN, **more)  # type: ignore[arg-type]


def test_whatever_the_others_do(tmp_path: Path) -> None:
    """They compute and never come to a collective; the failing rank has something to close that does not end."""
    faults = [
        case(tmp_path, "waits"),
        case(tmp_path, "computes"),
        case(tmp_path, "computes", kind="kill"),
        case(tmp_path, "computes", kind="refused"),
        case(tmp_path, "closes slowly"),
    ]
    for fault in faults:
        if "computes" in fault.arguments:
            fault.call = 1
    for fault in do(tmp_path, faults):
        check(fault)


def test_ranks_that_do_not_come_are_named(tmp_path: Path) -> None:
    absent, headless, never = do(
        tmp_path,
        [
            case(tmp_path, "absent", fault=False, ranks=4, absent=[1, 3], startup=2),
            case(tmp_path, "no rank 0", fault=False, absent=[0], startup=2),
            case(tmp_path, "one never joins", fault=False, startup=2),
        ],
    )
    for found in (absent, headless, never):
        assert all(seconds is not None and seconds < 10 for seconds in found.seconds) and all(found.statuses), found
    for text in absent.outputs:
        assert "ranks 1, 3 of 4 did not start within parallel.startup_minutes=0.0333" in text, absent
    for text in headless.outputs:
        assert "rank 0 of 3 did not start" in text and "Traceback" not in text, headless
    assert "rank 1 of 3 did not start" in never.outputs[0] and "rank 1 of 3 did not start" in never.outputs[2], never
    assert "something is not installed on this node" in never.outputs[1], never


def test_several_ranks_fail_or_none(tmp_path: Path) -> None:
    peace, refuse, own, late = do(
        tmp_path,
        [
            case(tmp_path, "ends in peace", fault=False),
            case(tmp_path, "all refuse", fault=False),
            case(tmp_path, "each has its own"),
            case(tmp_path, "sleeps", fault=False),
        ],
    )
    assert peace.statuses == [0, 0, 0] and peace.outputs == ["", "", ""], peace
    assert refuse.statuses == [2, 2, 2], refuse
    assert refuse.outputs == ["error: lr=0: choose a rate above 0\n", "", ""], refuse
    for rank in (0, 2):  # an error of one's own says more than another's
        assert f"ValueError: the reason of rank {rank}" in own.outputs[rank], own
    # Nobody failed: a collective took too long. The one that noticed says where it was.
    assert all(late.statuses) and all(seconds is not None and seconds < 15 for seconds in late.seconds), late
    assert any("failed" in text and "all_reduce" in text for text in late.outputs), late


def test_under_torchrun(tmp_path: Path) -> None:
    """Its table names the rank that failed first, and quotes it."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\n"
        "from tests.parallel import failure_job\n"
        "real = failure_job.work\n"
        "def work(rank, what):\n"
        "    if rank == 1: raise ValueError('the fault under torchrun')\n"
        "    real(rank, what)\n"
        "failure_job.work = work\n"
        "failure_job.main()\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), "computes", "60"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - began < 60
    assert "rank 1 failed" in done.stderr and "ValueError: the fault under torchrun" in done.stderr
    table = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in table, table

"""The helper that other tests start their ranks with."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import RanksFailed, run_distributed

pytestmark = pytest.mark.distributed


def describe(prefix: str, *, number: int) -> dict[str, Any]:
    """Runs on the ranks."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "OURS")
    return {"said": f"{prefix}{number}", **{name: os.environ.get(name) for name in names}}


def fail_on_one(rank: str) -> None:
    """Runs on the ranks."""
    if os.environ["RANK"] == rank:
        print("the reason")
        sys.exit(3)
    time.sleep(60)


def test_results_come_back_by_rank() -> None:
    results = run_distributed("tests.test_distributed:describe", 2, "a", number=1, env={"OURS": "x"})
    assert [result["RANK"] for result in results] == ["0", "1"]
    assert results[1] == {
        "said": "a1",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "OURS": "x",
    }


def test_one_failure_ends_all_and_is_quoted() -> None:
    began = time.monotonic()
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 ended with status 3.*rank 1: the reason"):
        run_distributed("tests.test_distributed:fail_on_one", 2, "1")
    assert time.monotonic() - began < 50


def test_time_runs_out() -> None:
    with pytest.raises(RanksFailed, match=r"ranks \[0\] still running after 1 s"):
        run_distributed("tests.test_distributed:fail_on_one", 1, "none", timeout=1)


def test_scripts_get_a_command_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, pathlib\npathlib.Path(sys.argv[1]).write_text(sys.argv[2])\n")
    assert run_distributed(str(script), 1, tmp_path / "out", 7) == [None]
    assert (tmp_path / "out").read_text() == "7"

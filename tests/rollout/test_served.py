"""Servers for a run of several ranks: all take part in a sync, all hear of its failure, a replica's ranks get the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import run_distributed


@pytest.mark.distributed
def test_four_ranks_and_two_servers(tmp_path: Path) -> None:
    ranks = run_distributed("tests.rollout.served_job:run", 4, str(tmp_path), timeout=280)
    for seen in ranks:
        assert "no server took version 2" in seen["failed"]
        assert len(seen["rows"]) == 5 and max(seen["differences"]) < 1e-5
        assert [row % 1000 for row in seen["rows"]] == [0, 1, 3, 3, 4]
    assert ranks[0]["rows"] == ranks[1]["rows"] and ranks[2]["rows"] == ranks[3]["rows"]
    assert ranks[0]["rows"] != ranks[2]["rows"]

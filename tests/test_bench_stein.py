"""The Stein benchmark's own arithmetic, and that it counts the bytes of a real exchange."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_vp2o.parallel import exchange
from tools.bench import stein


def test_report_is_made_of_medians_and_the_ratio_of_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    # the machine slows down by half: pairs of neighbours still say 10 %, of which the transform has 4
    times = [((0.11, 0.004), (0.10, 0.0)), ((0.11, 0.004), (0.10, 0.0)), ((0.165, 0.006), (0.15, 0.0))]
    stein.report(times, {"exchange": [0.001, 0.002, 0.009]}, goal=8.0)
    shown = capsys.readouterr().out
    assert "10.0 % of a step (goal: 8 %); the transform alone 4.0 %" in shown
    assert f"  {'  exchange':18}{2.0:12,.2f} ms" in shown and "prototypes" not in shown
    stein.report(times, {}, goal=None)
    assert "no goal" in capsys.readouterr().out


def test_options_of_other_benchmarks_are_passed_over() -> None:
    arguments = stein.parse(["--pairs", "3", "--steps", "9", "--layer", "33b"])
    assert (arguments.pairs, arguments.layer, arguments.ranks) == (3, "33b", 1)


def test_counted_bytes_are_those_that_leave_the_rank() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:

        def send() -> None:
            exchange.dist.all_to_all_single(torch.empty(6), torch.arange(6.0), [6], [6], group=dist.group.WORLD)

        assert stein.count_bytes(dist, send) == 0  # all of it stays
        assert exchange.dist is dist
    finally:
        dist.destroy_process_group()

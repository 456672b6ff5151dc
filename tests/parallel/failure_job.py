"""A small world that works until something happens to a rank: `main` is what each rank of test_failure.py runs.

Its command line: what the ranks do, and how many seconds they wait for each other at the start.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.parallel import failure


def work(rank: int, what: str) -> None:
    """Between two collectives. On rank 1 a fault may be laid here."""
    if what == "computes" and rank != 1:
        while True:  # never again in a collective
            pass
    if what == "sleeps" and rank == 1:
        time.sleep(20)
    if what == "all refuse":
        raise ConfigError("lr=0: choose a rate above 0")
    if what == "each has its own" and rank != 1:
        raise ValueError(f"the reason of rank {rank}")


class SlowToClose(AbstractContextManager[None]):
    """As a tracker that wants to reach its server."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            time.sleep(60)


def main() -> None:
    """Runs on the ranks."""
    what, startup = sys.argv[1], float(sys.argv[2])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if what == "one never joins" and rank == 1:
        raise ImportError("something is not installed on this node")
    with failure.ends_all_ranks():
        store = failure.join(timedelta(seconds=startup))
        assert store is not None
        limit = timedelta(seconds=2 if what == "sleeps" else 600)
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("world", store), rank=rank, world_size=size, timeout=limit
        )
        closing: AbstractContextManager[None] = SlowToClose() if what == "closes slowly" else failure.tells_all_ranks()
        with closing, failure.tells_all_ranks():
            total = torch.ones(1)
            for _ in range(3 if what == "ends in peace" else 10**9):
                work(rank, what)
                dist.all_reduce(total)
        dist.barrier()
        failure.leave()
        time.sleep(0.2 * rank)  # a process that has left may end when it likes
    dist.destroy_process_group()

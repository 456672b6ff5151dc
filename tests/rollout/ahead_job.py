"""Two ranks that train while servers generate, until something happens to rank 1; test_ahead.py starts it with a folder.

Prints for each thing that happens: statuses of both ranks, seconds until both had ended, what they printed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vp2o.parallel import failure
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rollout.contract import SAMPLING
from megatron_vp2o.rollout.launch import free_port
from megatron_vp2o.rollout.members import Member
from megatron_vp2o.rollout.served import ServedEngine
from tests.distributed import become_rank
from tests.rollout.fakes import make_pool
from tests.rollout.served_job import PROBE, TableSnapshot

HAPPENS = ("no server answers", "its pool has a bug", "training fails")


def rank_of(rank: int, port: int, what: str, folder: Path) -> None:
    """One rank. Nobody listens where its server should be."""
    become_rank(rank, 2, port, folder / f"{what}-{rank}.txt")
    with failure.ends_all_ranks():
        store = failure.join(timedelta(seconds=60))
        assert store is not None
        dist.init_process_group("gloo", store=dist.PrefixStore("world", store), rank=rank, world_size=2)
        world, alone = dist.group.WORLD, [dist.new_group([r]) for r in range(2)][rank]
        groups = Groups(**{name: alone for name in Groups.__dataclass_fields__} | {"world": world, "dp": world})  # type: ignore[arg-type]
        seconds = 1.0 if what == "no server answers" and rank == 1 else 100.0
        member = Member(f"http://127.0.0.1:{free_port()}")
        pool = make_pool([member], folder / str(rank), {"batch_timeout_s": seconds}, owner=False)
        pool.adopt(0, "weights")
        snapshot: Any = TableSnapshot()
        engine = ServedEngine(snapshot, pool, groups, stream=lambda: iter(()), probe_tokens=PROBE, tolerance=1.0)
        snapshot.version = engine._served = 0
        if what == "its pool has a bug" and rank == 1:
            pool.ends = None  # type: ignore[assignment]
            pool._batch = _bug  # type: ignore[method-assign,assignment]
        with failure.tells_all_ranks():
            engine.begin([[5, 6]], [rank], SAMPLING, 2)
            if what == "training fails" and rank == 1:
                raise KeyError("in the main thread")
            time.sleep(60)


async def _bug(*_: Any) -> Any:
    raise ZeroDivisionError("in the pool's thread")


def main() -> None:
    folder, fork = Path(sys.argv[1]), multiprocessing.get_context("fork")
    for what in HAPPENS:
        port, start = free_port(), time.monotonic()
        ranks = [fork.Process(target=rank_of, args=(rank, port, what, folder)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(50)
        seconds, statuses = time.monotonic() - start, [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        said = [(folder / f"{what}-{rank}.txt").read_text() for rank in range(2)]
        print(json.dumps([what, statuses, seconds, said]), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()

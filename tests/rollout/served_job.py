"""Run by test_served in four processes, two replicas of two tensor-parallel ranks: one pool of fake servers for all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.core.deferred import Deferred, known
from megatron_vp2o.errors import SyncError
from megatron_vp2o.parallel.groups import Groups, first_rank_says
from megatron_vp2o.rl.types import Rollouts, SamplingParams
from megatron_vp2o.rollout.board import meet
from megatron_vp2o.rollout.contract import SAMPLING
from megatron_vp2o.rollout.members import Member
from megatron_vp2o.rollout.pool import ServerPool
from megatron_vp2o.rollout.served import ServedEngine
from tests.rollout.fakes import VOCABULARY, FakeHarness, make_pool, table

PROBE = [[5, 6, 7, 9], [8, 3, 2, 11]]


class TableSnapshot:
    """The actor's weights on the learner's side: version v is model v % 2."""

    def __init__(self) -> None:
        self.version = -1

    def refresh(self, version: int) -> None:
        self.version = version

    def log_probs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        parts = table(self.version % 2)
        rows = torch.cat([parts[f"rows.{number}"] for number in range(8)])
        logp = ((rows + parts["bias"]) / temperature).log_softmax(-1)
        scored_NS = torch.zeros(rollouts.tokens_NS.shape)
        scored_NS[:, 1:] = logp[rollouts.tokens_NS[:, :-1], rollouts.tokens_NS[:, 1:]]
        return scored_NS * rollouts.response_mask_NS()

    def log_probs_and_routes(self, rollouts: Rollouts, temperature: float) -> tuple[Tensor, Tensor]:
        """A table has no layers."""
        return self.log_probs(rollouts, temperature), torch.zeros(*rollouts.tokens_NS.shape, 0, 0, dtype=torch.uint8)

    def checksum(self) -> Deferred[int]:
        return known(self.version)

    def generate(self, *_: Any) -> Rollouts:
        raise AssertionError("the servers generate")

    @contextmanager
    def at_learner_weights(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        """Nothing is held."""


class Late:
    """A pool that asks only when the first rank has had its rollouts for long."""

    def __init__(self, pool: ServerPool) -> None:
        self.pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)

    def generate(self, *arguments: Any) -> Rollouts:
        time.sleep(3)
        return self.pool.generate(*arguments)


PATIENT = {"request_timeout_s": 10.0, "startup_s": 90.0, "batch_timeout_s": 150.0}
"""Four ranks and two servers start anew on a machine that other tests keep busy."""


def groups_of_four() -> Groups:
    dist.init_process_group("gloo")
    world, rank = dist.group.WORLD, dist.get_rank()
    assert world is not None
    alone = [dist.new_group([r]) for r in range(4)][rank]
    tp = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    dp = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    values: dict[str, Any] = {
        **dict.fromkeys([field.name for field in fields(Groups)], alone),
        **{"world": world, "tp": tp, "dp": dp, "device": torch.device("cpu"), "timeout": None},
    }
    return Groups(**values)


def run(folder: str) -> dict[str, Any]:
    """What this rank saw of two good syncs, one that fails, one after it, a server that dies, and an owner that is done first."""
    groups = groups_of_four()
    board = meet(groups)
    harness = FakeHarness(Path(folder), servers=2, settings=PATIENT, board=board) if groups.rank == 0 else None
    urls = first_rank_says([m.url for m in harness.engine.members] if harness else [], groups.world)
    pool = harness.engine if harness else None
    if groups.is_data_source and pool is None:
        pool = make_pool([Member(url) for url in urls], Path(folder) / "other", PATIENT, board=board, owner=False)
    snapshot = TableSnapshot()

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in table(snapshot.version % 2).items():
            dist.barrier()  # hangs where a rank does not take all of them
            yield name, tensor

    engine = ServedEngine(snapshot, pool, groups, stream=stream, probe_tokens=PROBE, tolerance=1e-4)
    seen: dict[str, Any] = {"rows": [], "differences": [], "failed": ""}

    def generate() -> None:
        prompts = [[2 + (number + 7 * groups.dp_rank) % (VOCABULARY - 2), 5] for number in range(12)]
        rollouts = engine.generate(prompts, range(12), SAMPLING, 4)
        assert [int(row[0]) for row in rollouts.tokens_NS[::4]] == [prompt[0] for prompt in prompts]
        difference_NS = engine.log_probs(rollouts, 1.0) - rollouts.model_logprobs_NS
        seen["differences"].append(float(difference_NS.abs().max()))
        seen["rows"].append(int(rollouts.tokens_NS.sum()) * 1000 + rollouts.weight_version)

    for version in (0, 1):
        engine.refresh(version)
        generate()
    if harness:
        for server in (0, 1):
            harness.arm(server, "refuse", always=True)
            harness.processes[server].command = lambda *_: ["false"]  # and it cannot be started again
    dist.barrier()
    try:
        engine.refresh(2)
    except SyncError as error:
        seen["failed"] = str(error)
    if harness:
        good = FakeHarness(Path(folder) / "unused").processes[0].command
        for process in harness.processes:
            process.command = good
    engine.refresh(3)
    generate()
    if harness:
        harness.arm(0, "die_generating", after=4)
    dist.barrier()
    generate()
    snapshot.version = 4  # as a resumed run's checkpoint has it: the servers get it before they are asked
    if pool is not None and groups.dp_rank:
        engine.pool = Late(pool)  # type: ignore[assignment]
    generate()
    engine.close()
    assert isinstance(SAMPLING, SamplingParams)
    return seen

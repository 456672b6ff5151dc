"""Random faults, drawn by a seed, while three ranks ask two servers: every prompt is answered once, and the answers are those of an
undisturbed run. The servers are fakes whose samples depend on weights, prompt and place in the group only.

VP2O_ROLLOUT_FAULTS faults (4; `make soak`: 100) from VP2O_ROLLOUT_SEED (0).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_vp2o.rl.types import Rollouts
from megatron_vp2o.rollout.board import Board
from megatron_vp2o.rollout.contract import SAMPLING
from megatron_vp2o.rollout.members import Member
from megatron_vp2o.rollout.pool import ServerPool
from tests.rollout.fake_server import GENERATING, LOADING
from tests.rollout.fakes import FakeHarness, make_pool
from tests.rollout.test_pool import descendants, wait_for

FAULTS = int(os.environ.get("VP2O_ROLLOUT_FAULTS", "4"))
SEED = int(os.environ.get("VP2O_ROLLOUT_SEED", "0"))
GROUP = 3
SETTINGS = {"request_timeout_s": 2.0, "attempts": 30, "batch_timeout_s": 120.0}
LASTING = ("garbage", "short_logprobs", "foreign_ids", "no_json", "error")


class Ranks:
    """The owner of two servers and two ranks that only ask, as threads; each has its own prompts."""

    def __init__(self, folder: Path) -> None:
        store = dist.HashStore()
        self.harness = FakeHarness(folder, servers=2, settings=SETTINGS, board=Board(store), fixed=True)
        urls = [process.url for process in self.harness.processes]
        self.pools: list[ServerPool] = [self.harness.engine]
        for rank in (1, 2):
            members = [Member(url) for url in urls]
            self.pools.append(make_pool(members, folder / str(rank), SETTINGS, board=Board(store), owner=False))
        self.prompts = [[[2 + (7 * rank + n) % 22, 2 + n] for n in range(10 + rank)] for rank in range(3)]
        self.threads = ThreadPoolExecutor(3)

    def update(self, version: int) -> None:
        owner = self.pools[0]
        receipt = owner.update_weights(self.harness.weights(version % 2), version, self.harness.probe(version % 2))
        assert receipt.version == version
        for pool in self.pools[1:]:
            pool.adopt(version, owner.label, [member.lost for member in owner.members])

    def generate(self) -> list[Rollouts]:
        """Of each rank two batches, the second of which is asked for before the first is there."""

        def ask(pool: ServerPool, prompts: Sequence[Sequence[int]]) -> list[Rollouts]:
            parts = [prompts[:6], prompts[6:]]
            begun = [pool.begin(part, range(len(part)), SAMPLING, GROUP) for part in parts]
            return [one.result() for one in begun]

        return [rollouts for both in self.threads.map(ask, self.pools, self.prompts) for rollouts in both]

    def samples(self) -> int:
        return sum(member.samples for pool in self.pools for member in pool.members)

    def kill(self, server: int, seconds: float = 0.0) -> None:
        time.sleep(seconds)
        guard = self.harness.processes[server]._guard
        for pid in descendants(guard.pid)[:1] if guard is not None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def mended(self) -> bool:
        """Whether the owner knows of no server that is away."""
        return not any(member.trouble.is_set() for member in self.harness.engine.members)

    def waiting_fault(self, server: int) -> object:
        """A fault that has not happened yet."""
        with urllib.request.urlopen(f"{self.harness.processes[server].url}/fault", timeout=10) as answer:
            return json.loads(answer.read())

    def close(self) -> None:
        for pool in reversed(self.pools):
            pool.close()
        self.threads.shutdown()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    made = Ranks(tmp_path)
    yield made
    made.close()


def same(found: list[Rollouts], wanted: list[Rollouts]) -> bool:
    """Tokens and log-probabilities, bit for bit."""
    return all(
        torch.equal(here.tokens_NS, there.tokens_NS) and torch.equal(here.logprobs_NS, there.logprobs_NS)
        for here, there in zip(found, wanted, strict=True)
    )


@pytest.mark.timeout(60 + 10 * FAULTS)
def test_faults_change_nothing_of_what_is_generated(ranks: Ranks) -> None:
    undisturbed = {}
    for version in (0, 1):
        ranks.update(version)
        undisturbed[version] = ranks.generate()
    assert not same(undisturbed[0], undisturbed[1])
    rng = random.Random(SEED)
    batch = sum(map(len, ranks.prompts)) * GROUP
    kinds = [*GENERATING, *LOADING, "kill", "kill_in_a_sync"]
    for number in range(FAULTS):
        version, server = 2 + number, rng.randrange(2)
        kind = kinds[number] if FAULTS >= len(kinds) > number else rng.choice(kinds)  # each at least once in a long run
        lasting, after = kind in LASTING and rng.random() < 0.3, rng.randrange(1, 9)
        told = f"seed {SEED}, fault {number}: {kind} of server {server}, {'lasting' if lasting else f'after {after}'}"
        wait_for(ranks.mended)  # a server that the last fault ended may still be on its way back
        started = time.monotonic()
        try:
            if kind in LOADING:
                ranks.harness.arm(server, kind)
            elif kind == "kill_in_a_sync":
                ranks.threads.submit(ranks.kill, server, after / 40)
            ranks.update(version)
            if kind in GENERATING:
                ranks.harness.arm(server, kind, after=after, always=lasting)
            elif kind == "kill":
                ranks.kill(server)
            found = ranks.generate()
        except Exception as error:
            raise AssertionError(told) from error
        if not lasting and kind in (*GENERATING, *LOADING):
            wait_for(ranks.mended)
            assert ranks.waiting_fault(server) == {}, f"{told}: it did not happen"
        assert same(found, undisturbed[version % 2]), told
        assert ranks.samples() == batch * (3 + number), told
        assert {rollouts.weight_version for rollouts in found} == {version}, told
        print(f"{told}: {time.monotonic() - started:.1f} s, restarts {ranks.harness.engine.restarts}", flush=True)
    assert not any(member.lost for member in ranks.harness.engine.members)

"""A real vLLM server that takes weights by broadcast: what tests/rollout/test_vllm.py says of files, of the other way for them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.errors import SyncError
from megatron_vp2o.rollout.api import Server
from megatron_vp2o.rollout.contract import ClosingContract, EngineContract
from megatron_vp2o.rollout.transfer import HeldWeights
from megatron_vp2o.tracking.record import read
from tests.rollout.test_pool import alive, descendants
from tests.rollout.test_vllm import PYTHON, SERVED, VLLMHarness, _command_line, measured, train
from tests.rollout.whole_runs import servers
from tests.rollout.whole_runs import train as train_with

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
needs_vllm = pytest.mark.skipif(
    not PYTHON.is_file(), reason=f"no vLLM at {PYTHON}: make test-vllm makes its environment"
)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMHarness]:
    made = VLLMHarness(tmp_path_factory.mktemp("vllm"), broadcast=True)
    yield made
    made.engine.close()
    assert not made.process.running


@needs_vllm
class TestVLLMBroadcast(EngineContract):
    """The contract, by the module's server."""


@needs_vllm
@pytest.mark.parametrize("victim", ["api_server", "EngineCore"])
def test_a_process_is_killed_in_a_sync(harness: VLLMHarness, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    """kill -9 between two broadcasts: the trainer hears of it at once, the server is started anew without weights, its workers
    join a new group and get them all."""
    kill_in_a_sync(harness, monkeypatch, victim)


def kill_in_a_sync(harness: VLLMHarness, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    pool = harness.engine
    pool.update_weights(harness.weights(0), 1, harness.probe(0))
    restarts, guard = pool.restarts, harness.process._guard
    assert guard is not None
    processes = descendants(guard.pid)
    post, parts = Server._post, []

    async def kill_meanwhile(server: Server, path: str, *arguments: Any, **named: Any) -> Any:
        asked = asyncio.ensure_future(post(server, path, *arguments, **named))
        if path == "/update_weights":
            parts.append(path)
            if len(parts) == 3:
                os.kill(next(pid for pid in processes if victim in _command_line(pid)), signal.SIGKILL)
        return await asked

    monkeypatch.setattr(Server, "_post", kill_meanwhile)
    pool.update_weights(harness.weights(1), 2, harness.probe(1))
    harness.check(1)
    assert pool.restarts == restarts + 1 and len(parts) > 6
    assert not any(alive(pid) for pid in processes)


@needs_vllm
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_sync_that_is_not_whole(harness: VLLMHarness, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """A set that is whole by its own account, and has nothing or half of the model: three tries fail, the last after a restart. A
    whole good set puts all right again."""
    pool = harness.engine
    pool.update_weights(harness.weights(0), 1, harness.probe(0))
    take: Any = pool.transfer.take

    def spoilt(*arguments: Any) -> HeldWeights:
        held = take(*arguments)
        buckets = held.buckets[: int(share * len(held.buckets))]
        entries = [entry for bucket in buckets for entry in bucket.entries]
        return HeldWeights(held.folder, buckets, len(entries), 4 * sum(_numbers(shape) for _, _, shape in entries))

    monkeypatch.setattr(pool.transfer, "take", spoilt)
    with pytest.raises(SyncError, match="no server took version 2"):
        pool.update_weights(harness.weights(1), 2, harness.probe(1))
    monkeypatch.setattr(pool.transfer, "take", take)
    pool.update_weights(harness.weights(1), 3, harness.probe(1))
    harness.check(1)


def _numbers(shape: Any) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


@needs_vllm
def test_weights_of_another_model(harness: VLLMHarness) -> None:
    with pytest.raises(SyncError, match="log-probabilities differ from the trainer's by up to"):
        harness.engine.update_weights(harness.weights(1), 1, harness.probe(0))
    harness.engine.update_weights(harness.weights(0), 2, harness.probe(0))
    harness.check(0)


@needs_vllm
class TestVLLMBroadcastEnd(ClosingContract):
    """It closes the module's server."""


@needs_vllm
def test_two_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that splits layers over two processes: both join the group, and each takes its part; then one of them is killed."""
    made = VLLMHarness(tmp_path, broadcast=True, workers=2)
    try:
        for version, model in ((1, 0), (2, 1), (3, 0)):
            began = time.monotonic()
            made.engine.update_weights(made.weights(model), version, made.probe(model))
            print(f"sync {version}: {time.monotonic() - began:.2f} s")
            made.check(model)
        (group,) = made.engine.transfer._groups.values()  # type: ignore[attr-defined,union-attr]
        assert group.meeting.size == 3
        kill_in_a_sync(made, monkeypatch, "Worker")
    finally:
        made.engine.close()


@needs_vllm
def test_training_through_broadcasts(tmp_path: Path) -> None:
    """GRPO for eight steps: after each sync trainer and server compute the same."""
    shared = ["algorithm.steps=8", "init_from=null", "algorithm.prompts_per_step=16"]
    run = train("countdown_tiny_grpo", tmp_path / "run", *shared, *SERVED, "rollout.server.transfer=broadcast")
    mismatches = measured(run, "policy/logprob_mismatch")
    assert len(mismatches) == 8 and max(mismatches) <= 1e-4
    assert max(measured(run, "mismatch/kl")) <= 1e-8
    assert measured(run, "actor/refreshes")[-1] == 8
    syncs = measured(run, "time/sync_s")
    print(f"mismatch at most {max(mismatches):.1e}, syncs {[round(seconds, 2) for seconds in syncs]} s")


def test_the_record_is_that_of_files(tmp_path: Path) -> None:
    """With servers that draw by the bits of their weights, a run learns the same by either way, and says the same."""
    records = {}
    for way in ("files", "broadcast"):
        with servers(count=2) as urls:
            steps = ["algorithm.steps=4", f"rollout.server.transfer={way}"]
            train_with(tmp_path / way, urls, *steps)
        records[way] = read(tmp_path / way)
    same = [name for name in records["files"] if not name.startswith("time/") and not name.endswith("_s")]
    assert records["files"].keys() == records["broadcast"].keys() and len(same) > 50
    assert list(records["files"]["step"])[-1] == 4
    for name in same:
        assert repr(list(records["files"][name])) == repr(list(records["broadcast"][name])), name

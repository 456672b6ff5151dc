"""Weights by broadcast: what arrives is bit for bit what was sent, in all workers of a server, or an error says that it is not.

Receivers are real processes that run the code of vLLM's workers (`server_side/vp2o_broadcast.py`);
tests/rollout/test_vllm_broadcast.py does the same with vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vp2o.errors import SyncError
from megatron_vp2o.rollout.answers import BadAnswer
from megatron_vp2o.rollout.contract import SAMPLING, EngineContract
from megatron_vp2o.rollout.members import Member
from megatron_vp2o.rollout.server_side import vp2o_broadcast as wire
from megatron_vp2o.rollout.transfer import BroadcastTransfer, FileTransfer, HeldWeights
from tests.rollout.fakes import FakeHarness, make_pool
from tests.rollout.receiver import digest
from tests.rollout.test_pool import MANY, check_all, unwatch, wait_for

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def some_tensors(rng: random.Random) -> list[tuple[str, Tensor]]:
    """Of any type and shape, empty ones and single numbers among them, and views that are not contiguous."""
    found = []
    for number in range(rng.randint(1, 12)):
        shape = [rng.choice([0, 1, 2, 3, 5, 8, 33]) for _ in range(rng.randint(0, 3))]
        bits = torch.tensor([rng.randrange(256) for _ in range(torch.Size(shape).numel() * 8)], dtype=torch.uint8)
        dtype = rng.choice(TYPES)
        values = bits % 2 if dtype is torch.bool else bits
        tensor = values[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
        found.append(
            (f"layers.{number}", tensor.transpose(0, -1) if tensor.dim() > 1 and rng.random() < 0.3 else tensor)
        )
    return found


@pytest.mark.parametrize("seed", range(40))
def test_a_buffer_has_what_was_packed(seed: int) -> None:
    """And another bit of any tensor, or two that change places, make another checksum."""
    rng = random.Random(seed)
    tensors = some_tensors(rng)
    entries, buffer = wire.pack(tensors)
    entries = json.loads(json.dumps(entries))  # as it travels
    assert wire.buffer_bytes(entries) == len(buffer)
    arrived = list(wire.unpack(entries, buffer))
    assert [(name, digest(tensor)) for name, tensor in arrived] == [(name, digest(tensor)) for name, tensor in tensors]
    said = wire.checksum(buffer)
    if len(buffer) == 0:
        return
    assert wire.checksum(buffer.clone()) == said
    flipped = buffer.clone()
    flipped[rng.randrange(len(buffer))] ^= 1 << rng.randrange(8)
    assert wire.checksum(flipped) != said
    words = buffer.view(torch.int64).clone()
    here, there = rng.randrange(len(words)), rng.randrange(len(words))
    moved = words.clone()
    moved[[here, there]] = words[[there, here]]
    assert (wire.checksum(moved.view(torch.uint8)) == said) == bool(words[here] == words[there])


def test_a_checksum_sees_beyond_its_first_chunk() -> None:
    """Against the same sum with Python's whole numbers."""
    words = torch.randint(-(2**62), 2**62, (2 * 2**16 + 77,), generator=torch.Generator().manual_seed(3))
    total = 0
    for start in range(0, len(words), 2**16):
        part = 0
        for place, word in enumerate(words[start : start + 2**16].tolist(), 1):
            mixed = (place * 0x1E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
            part += word * ((mixed ^ (((mixed >> 29) * place + 2**63) % 2**64 - 2**63)) | 1)
        total = total * 0x7A3D70A3D70A3D71 + part
    assert wire.checksum(words.view(torch.uint8)) == total % 2**64


class Workers:
    """The workers of one server: processes. Has what `BroadcastTransfer` asks of `api.Server`."""

    def __init__(self, count: int) -> None:
        self.url = "http://127.0.0.1:1"
        self.processes = [self.begun() for _ in range(count)]
        self.held: list[dict[str, str]] = [{} for _ in range(count)]
        self.updates = 0
        self.meanwhile: Callable[[], object] = lambda: None
        for process in self.processes:
            self._read(process)

    @staticmethod
    def begun() -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).with_name("receiver.py"))]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        return json.loads(line) if line else {"error": f"a worker ended with {process.wait()}"}

    def restart(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait()
        self.processes[number] = self.begun()
        self._read(self.processes[number])

    async def workers(self) -> int:
        return len(self.processes)

    async def join(self, meeting: dict[str, Any], timeout: float) -> None:
        await self._all([{"join": meeting, "rank": rank} for rank in range(1, len(self.processes) + 1)], timeout)

    async def update(self, part: dict[str, Any], timeout: float) -> None:
        self.updates += 1
        threading.Timer(0.03, self.meanwhile).start()
        await self._all([{"update": part}] * len(self.processes), timeout)

    async def _all(self, told: list[dict[str, Any]], timeout: float) -> None:
        def one(number: int) -> dict[str, Any]:
            process = self.processes[number]
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(told[number]) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                return {"error": "a worker is gone"}
            return self._read(process)

        said = await asyncio.gather(*(asyncio.to_thread(one, n) for n in range(len(told))))
        if errors := [answer["error"] for answer in said if "error" in answer]:
            raise BadAnswer("; ".join(errors))
        self.held = [answer["tensors"] for answer in said]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def pair() -> Iterator[Workers]:
    """A server of two workers."""
    workers = Workers(2)
    yield workers
    workers.end()


def run(work: Coroutine[Any, Any, None], limit_s: float = 240.0) -> None:
    async def limited() -> None:
        async with asyncio.timeout(limit_s):
            await work

    asyncio.run(limited())


def taken(transfer: BroadcastTransfer, folder: Path, tensors: list[tuple[str, Tensor]]) -> Any:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
    return transfer.take(folder / "set", iter(tensors), shapes, lambda where: (where / "config.json").write_text("{}"))


def test_all_workers_get_all_tensors(pair: Workers, tmp_path: Path) -> None:
    """Several sets over one group, with buckets of any size; equal to what files would hold, with the receipt's numbers."""
    rng = random.Random(7)

    async def syncs() -> None:
        for seed in range(6):
            transfer = BroadcastTransfer(torch.device("cpu"), timeout_s=60, bucket_bytes=rng.choice([1, 300, 10**6]))
            await transfer.prepare(pair, 60)  # type: ignore[arg-type]
            for again in range(2):
                tensors = some_tensors(random.Random(100 * seed + again))
                weights = taken(transfer, tmp_path, tensors)
                await transfer.send(pair, weights, 60)  # type: ignore[arg-type]
                wanted = {name: digest(tensor) for name, tensor in tensors}
                assert all(wanted.items() <= held.items() for held in pair.held) and pair.held[0] == pair.held[1]
                shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
                files = FileTransfer().take(tmp_path / "files", iter(tensors), shapes, lambda where: None)
                assert (files.tensors, files.bytes) == (weights.tensors, weights.bytes)
            assert len(transfer._groups) == 1
            await transfer.close()
            assert not transfer._groups

    run(syncs())


BIG = [(f"layers.{number}", torch.full((2**22,), float(number))) for number in range(3)]
"""16 MiB each: more than a connection takes up of what nobody reads."""


@pytest.mark.parametrize("what", ["killed", "stopped"])
def test_a_worker_dies_in_the_middle(pair: Workers, tmp_path: Path, what: str) -> None:
    """The trainer hears of a dead one at once, and of one that does nothing when time is up; a new group then brings all."""
    at, limit_s = (2, 60.0) if what == "killed" else (1, 2.0)
    transfer = BroadcastTransfer(torch.device("cpu"), timeout_s=limit_s, bucket_bytes=2**20)
    weights = taken(transfer, tmp_path, BIG)

    struck: list[int] = []

    def strike() -> None:
        if pair.updates == at and not struck:  # timers may be late
            struck.append(at)
            number = signal.SIGKILL if what == "killed" else signal.SIGSTOP
            pair.processes[1].send_signal(number)

    async def broken() -> None:
        pair.updates, pair.meanwhile = 0, strike
        began = time.monotonic()
        with pytest.raises(BadAnswer):
            await transfer.send(pair, weights, 60)  # type: ignore[arg-type]
        assert time.monotonic() - began < 50
        assert not transfer._groups and pair.updates == at

    async def whole() -> None:
        pair.meanwhile = lambda: None
        pair.restart(1)
        transfer.timeout_s = 60.0
        await transfer.send(pair, weights, 60)  # type: ignore[arg-type]
        assert [held[name] for held in pair.held for name, _ in BIG] == 2 * [digest(tensor) for _, tensor in BIG]
        await transfer.close()

    if what == "stopped":  # its answer would be waited for for ever; a launched server is killed by who watches it
        timer = threading.Timer(5, pair.processes[1].kill)
        timer.start()
    run(broken())
    run(whole())


class Damaged(HeldWeights):
    """Not what it says that it is."""

    said = ""

    @property
    def digest(self) -> str:
        return Damaged.said


def test_other_bytes_are_refused(pair: Workers, tmp_path: Path) -> None:
    """A bit that changed on the way, a set that says less than it is, and none at all."""
    transfer = BroadcastTransfer(torch.device("cpu"), timeout_s=60, bucket_bytes=300)
    tensors = [(f"layers.{number}", torch.randn(40)) for number in range(9)]
    weights = taken(transfer, tmp_path, tensors)
    Damaged.said = weights.digest

    async def refused(kind: str, said: str) -> None:
        spoilt = list(weights.buckets)
        if kind == "bit":
            buffer = spoilt[1].buffer.clone()
            buffer[5] ^= 4
            spoilt[1] = type(spoilt[1])(spoilt[1].entries, buffer, spoilt[1].checksum)
        if kind == "half":
            spoilt = spoilt[: len(spoilt) // 2]
        if kind == "order":
            spoilt = spoilt[::-1]
        damaged = Damaged(weights.folder, tuple(spoilt), weights.tensors, weights.bytes)
        with pytest.raises(BadAnswer, match=said):
            await transfer.send(pair, damaged, 60)  # type: ignore[arg-type]
        assert not transfer._groups
        await transfer.send(pair, weights, 60)  # type: ignore[arg-type]

    async def all_of_them() -> None:
        await refused("bit", "has the checksum .* was sent")
        await refused("half", "the update is not whole")
        await refused("order", "the update is not whole")
        await transfer.close()

    run(all_of_them())


def test_a_killed_trainer_frees_the_workers(pair: Workers, tmp_path: Path) -> None:
    """kill -9 while they wait for its broadcast."""
    code = """
import sys, time, torch
import torch.distributed as dist
from datetime import timedelta
from megatron_vp2o.rollout.server_side.vp2o_broadcast import Group, Meeting
store = dist.TCPStore("localhost", 0, 3, True, timedelta(seconds=20), wait_for_workers=False)
meeting = Meeting("127.0.0.1", store.port, "x", 3, "gloo", 60, 90)
print(store.port, flush=True)
group = Group(meeting, 0, torch.device("cpu"), store=store)
print("joined", flush=True)
time.sleep(100)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    port = int(trainer.stdout.readline())
    meeting = wire.Meeting("127.0.0.1", port, "x", 3, "gloo", 60, 90)

    async def left() -> None:
        await pair.join(meeting.as_json(), 60)
        assert trainer.stdout is not None and trainer.stdout.readline() == "joined\n"
        pair.meanwhile = trainer.kill
        began = time.monotonic()
        with pytest.raises(BadAnswer, match=r"losed by peer|reset by peer"):
            await pair.update({"entries": [["a", "float32", [2**20]]], "digest": "0"}, 60)
        assert time.monotonic() - began < 50
        pair.meanwhile = lambda: None

    try:
        run(left())
    finally:
        trainer.kill()
        trainer.wait()


def test_nobody_comes(tmp_path: Path) -> None:
    """Neither a worker's side nor the trainer's waits for ever; whoever gives up does so at once."""
    store = torch.distributed.TCPStore("localhost", 0, 2, True, wait_for_workers=False)
    meeting = wire.Meeting("127.0.0.1", store.port, "x", 2, "gloo", 0.3, 5)
    with pytest.raises(RuntimeError, match=r"the others have not come within 0\.3 s"):
        wire.Group(meeting, 0, torch.device("cpu"), store=store)
    long = wire.Meeting("127.0.0.1", store.port, "y", 2, "gloo", 300, 5)
    asked = itertools.count()
    with pytest.raises(wire.Stopped):
        wire.Group(long, 0, torch.device("cpu"), store=store, stopped=lambda: next(asked) > 3)
    del store
    gone = wire.Meeting("127.0.0.1", meeting.port, "z", 2, "gloo", 0.3, 5)
    with pytest.raises(RuntimeError, match="the trainer cannot be reached at 127"):
        wire.Group(gone, 1, torch.device("cpu"))


# Pools of servers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHarness]:
    """Two servers that take weights by broadcast."""
    harness = FakeHarness(
        tmp_path_factory.mktemp("pool"), servers=2, settings={"sync_timeout_s": 8.0, "startup_s": 120.0}, broadcast=True
    )
    yield harness
    threads = [thread for thread in threading.enumerate() if thread.name == "left-broadcast"]
    harness.engine.close()
    wait_for(lambda: not any(thread.is_alive() for thread in threads), 60)


class TestBroadcast(EngineContract):
    @pytest.fixture
    def harness(self, made: FakeHarness) -> FakeHarness:
        return made


@pytest.mark.parametrize("kind", ["refuse", "load_nothing", "load_half", "load_other", "hang_receiving", "die_loading"])
def test_a_fault_in_a_sync(made: FakeHarness, kind: str) -> None:
    """A second, whole sync mends it, or a restart does; no sample comes from anything else."""
    pool = made.engine
    pool.update_weights(made.weights(0), 1, made.probe(0))
    restarts = pool.restarts
    made.arm(0, kind, after=3)  # of five broadcasts
    began = time.monotonic()
    receipt = pool.update_weights(made.weights(1), 2, made.probe(1))
    assert time.monotonic() - began < 100
    assert (receipt.version, receipt.tensors) == (2, 9) and not any(member.lost for member in pool.members)
    assert pool.restarts == restarts + (kind == "die_loading")
    check_all(made)
    for member in pool.members:
        assert member.samples > 0
    assert not list(pool._weights.folder.glob("*.safetensors"))  # type: ignore[union-attr]


def test_a_server_that_dies_between_syncs_gets_the_present_weights(made: FakeHarness) -> None:
    """It is started without weights, joins a new group, and gets those that the first rank kept."""
    pool = made.engine
    pool.update_weights(made.weights(0), 1, made.probe(0))
    pool.update_weights(made.weights(1), 2, made.probe(1))
    restarts = pool.restarts
    made.arm(1, "die_generating", after=3)
    check_all(made)
    wait_for(lambda: pool.restarts == restarts + 1 and pool.members[1].mends == 1)
    check_all(made)
    rollouts = pool.generate([[5]], [0], SAMPLING, group_size=8)
    for n in range(8):
        tokens = rollouts.tokens_NS[n, : int(rollouts.total_len_N[n])].tolist()
        assert rollouts.logprobs_NS[n, 1 : len(tokens)].tolist() == pytest.approx(
            made.log_probs(1, tokens, 1.0), abs=1e-5
        )


def test_somebody_elses_servers(made: FakeHarness, tmp_path: Path) -> None:
    """Named by URL: one that always fails is left out, and one that its owner restarted joins again and gets the weights."""
    pool = made.engine
    pool.update_weights(made.weights(0), 1, made.probe(0))
    unwatch(made)
    both = make_pool(
        [Member(member.url) for member in pool.members], tmp_path, {"sync_timeout_s": 20.0}, broadcast=True
    )
    try:
        both.check()
        made.arm(0, "refuse", always=True)
        both.update_weights(made.weights(1), 2, made.probe(1))
        assert both.members[0].lost and not both.members[1].lost
        rollouts = both.generate(MANY, range(len(MANY)), SAMPLING)
        assert both.members[0].samples == 0 and len(rollouts.total_len_N) == len(MANY)
        made.arm(1, "refuse", always=True)
        with pytest.raises(SyncError, match="no server took version 3"):
            both.update_weights(made.weights(1), 3, made.probe(1))
        for server in (0, 1):
            made.arm(server, "none")
        both.update_weights(made.weights(1), 4, made.probe(1))
        assert pool._weights is not None
        made.processes[1].start(pool._weights.folder)
        rollouts = both.generate(MANY, range(len(MANY)), SAMPLING)
        wait_for(lambda: both.members[1].mends == 1 or both.health().detail.startswith("2 of 2"))
        for n in range(len(MANY)):
            tokens = rollouts.tokens_NS[n, : int(rollouts.total_len_N[n])].tolist()
            found = rollouts.logprobs_NS[n, 2 : len(tokens)].tolist()
            assert found == pytest.approx(made.log_probs(1, tokens, 1.0)[1:], abs=1e-5)
    finally:
        both.close()
        with contextlib.suppress(SyncError):
            pool.update_weights(made.weights(0), 9, made.probe(0))

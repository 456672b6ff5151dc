"""The pool of servers passes the contract of engines, and loses nothing to faults. Servers are fakes in real processes;
tests/rollout/test_vllm.py does the same with vLLM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vp2o.errors import RolloutError, SyncError
from megatron_vp2o.rl.types import SamplingParams
from megatron_vp2o.rollout.contract import SAMPLING, ClosingContract, EngineContract, check_form
from megatron_vp2o.rollout.launch import GUARD, ServerProcess
from megatron_vp2o.rollout.members import STRIKES, Member
from tests.rollout.fakes import FAKE, FakeHarness, make_pool

MANY = [[2 + number % 20, 5] for number in range(24)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHarness]:
    harness = FakeHarness(tmp_path_factory.mktemp("pool"))
    yield harness
    harness.engine.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[FakeHarness]:
    """Two servers with the weights of model 0."""
    harness = FakeHarness(tmp_path, servers=2)
    harness.engine.update_weights(harness.weights(0), 1, harness.probe(0))
    yield harness
    harness.engine.close()


class TestPool(EngineContract):
    @pytest.fixture
    def harness(self, made: FakeHarness) -> FakeHarness:
        return made


class TestPoolEnd(ClosingContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> FakeHarness:
        return FakeHarness(tmp_path)


def check_all(harness: FakeHarness) -> None:
    """All samples of a batch are there, once, and of the present weights."""
    rollouts = harness.engine.generate(MANY, range(len(MANY)), SAMPLING, group_size=4)
    check_form(rollouts, [prompt for prompt in MANY for _ in range(4)], SAMPLING, harness)
    assert rollouts.weight_version == harness.engine.version


@pytest.mark.parametrize(
    "kind",
    ["die_generating", "slow", "garbage", "short_logprobs", "error", "foreign_ids", "twice", "no_json", "aborted"],
)
def test_a_fault_while_generating(two: FakeHarness, kind: str) -> None:
    """One of two servers fails at its third prompt: nothing is lost, nothing counts twice."""
    two.arm(0, kind, after=3)
    check_all(two)
    assert sum(member.samples for member in two.engine.members) == len(MANY) * 4
    assert not any(member.lost for member in two.engine.members)
    wait_for(lambda: two.processes[0].running and two.engine.health().detail.startswith("2 of 2"))
    assert two.engine.restarts == (kind == "die_generating")
    check_all(two)


def test_the_only_server_dies(tmp_path: Path) -> None:
    """It is started again with the present weights, not with those of its first start, and its prompts run again."""
    harness = FakeHarness(tmp_path)
    try:
        harness.engine.update_weights(harness.weights(0), 1, harness.probe(0))
        harness.engine.update_weights(harness.weights(1), 2, harness.probe(1))
        harness.arm(0, "die_generating", after=5)
        check_all(harness)
        assert harness.engine.restarts == 1
        rollouts = harness.engine.generate([[5]], [0], SAMPLING, group_size=8)
        for n in range(8):
            tokens = rollouts.tokens_NS[n, : int(rollouts.total_len_N[n])].tolist()
            wanted = harness.log_probs(1, tokens, 1.0)
            assert rollouts.logprobs_NS[n, 1 : len(tokens)].tolist() == pytest.approx(wanted, abs=1e-5)
    finally:
        harness.engine.close()


def test_one_that_always_answers_nonsense_is_restarted(two: FakeHarness) -> None:
    two.arm(1, "garbage", always=True)
    for _ in range(50):
        check_all(two)
        if two.engine.restarts:
            break
    wait_for(lambda: two.engine.restarts == 1 and two.engine.members[1].strikes == 0)
    for _ in range(20):  # the other one may be quick enough for a whole batch
        check_all(two)
        if two.engine.members[1].samples:
            break
    assert two.engine.members[1].samples > 0


@pytest.mark.parametrize("kind", ["die_loading", "load_nothing", "load_half", "load_other", "refuse"])
def test_a_fault_in_a_sync(two: FakeHarness, kind: str) -> None:
    """A second, whole sync mends it, or a restart does; no sample comes from anything else."""
    two.arm(0, kind)
    receipt = two.engine.update_weights(two.weights(1), 2, two.probe(1))
    assert receipt.version == 2 and not any(member.lost for member in two.engine.members)
    assert two.engine.restarts == (kind == "die_loading")
    rollouts = two.engine.generate(MANY, range(len(MANY)), SAMPLING)
    for n in range(len(MANY)):
        tokens = rollouts.tokens_NS[n, : int(rollouts.total_len_N[n])].tolist()
        found = rollouts.logprobs_NS[n, 2 : len(tokens)].tolist()
        assert found == pytest.approx(two.log_probs(1, tokens, 1.0)[1:], abs=1e-5)


@pytest.mark.parametrize("kind", ["load_nothing", "load_other", "refuse"])
def test_a_sync_that_never_succeeds(tmp_path: Path, kind: str) -> None:
    """Somebody else's server that cannot be restarted: it is left out; where it is the only one, the update fails."""
    harness = FakeHarness(tmp_path, servers=2)
    harness.engine.update_weights(harness.weights(0), 1)
    urls = [member.url for member in harness.engine.members]
    both = make_pool([Member(url) for url in urls], tmp_path / "theirs")
    only = make_pool([Member(urls[0])], tmp_path / "only")
    try:
        both.check()
        unwatch(harness)  # it would take its servers back
        harness.arm(0, kind, always=True)
        both.update_weights(harness.weights(1), 2, harness.probe(1))
        assert both.members[0].lost and not both.members[1].lost
        rollouts = both.generate(MANY, range(len(MANY)), SAMPLING)
        assert both.members[0].samples == 0 and len(rollouts.total_len_N) == len(MANY)
        with pytest.raises(SyncError, match="no server took version 3"):
            only.update_weights(harness.weights(1), 3, harness.probe(1))
        with pytest.raises(SyncError, match="no usable weights"):
            only.generate(MANY, range(len(MANY)), SAMPLING)
        harness.arm(0, "none")
        assert only.update_weights(harness.weights(1), 4, harness.probe(1)).version == 4
    finally:
        for pool in (both, only, harness.engine):
            pool.close()


def test_somebody_elses_server_that_lost_the_weights(tmp_path: Path) -> None:
    """Its owner restarted it: it lives and holds what it started with. It gets the present weights before a sample counts."""
    harness = FakeHarness(tmp_path)
    harness.engine.update_weights(harness.weights(0), 1)
    theirs = make_pool([Member(harness.engine.members[0].url)], tmp_path / "theirs")
    try:
        unwatch(harness)
        theirs.update_weights(harness.weights(1), 5, harness.probe(1))
        process = harness.processes[0]
        assert harness.engine._weights is not None
        process.start(harness.engine._weights.folder)
        wait_for(lambda: theirs.health().ready)
        rollouts = theirs.generate(MANY, range(len(MANY)), SAMPLING)
        for n in range(len(MANY)):
            tokens = rollouts.tokens_NS[n, : int(rollouts.total_len_N[n])].tolist()
            found = rollouts.logprobs_NS[n, 2 : len(tokens)].tolist()
            assert found == pytest.approx(theirs and harness.log_probs(1, tokens, 1.0)[1:], abs=1e-5)
    finally:
        theirs.close()
        harness.engine.close()


def test_what_cannot_be_mended_ends_with_reasons(tmp_path: Path) -> None:
    harness = FakeHarness(tmp_path, settings={"batch_timeout_s": 3.0, "request_timeout_s": 30.0})
    theirs = make_pool([Member("http://127.0.0.1:9")], tmp_path / "theirs")
    try:
        with pytest.raises(RolloutError, match=r"rollout\.urls has http://127\.0\.0\.1:9, which cannot be used"):
            theirs.check()
        harness.engine.update_weights(harness.weights(0), 1)
        harness.arm(0, "slow", always=True)
        with pytest.raises(RolloutError, match=r"24 of 24 prompts have no rollouts, because time is up after 3 s"):
            harness.engine.generate(MANY, range(len(MANY)), SAMPLING)
        harness.arm(0, "none")
        with pytest.raises(ValueError, match=r"top_p=0\.9"):
            harness.engine.generate(MANY, range(len(MANY)), SamplingParams(1.0, 0.9, 4, 0))
    finally:
        theirs.close()
        harness.engine.close()


def test_a_prompt_that_no_server_can_answer(tmp_path: Path) -> None:
    """A poisonous prompt ends the batch after some tries; servers are not restarted for ever."""
    harness = FakeHarness(tmp_path, settings={"attempts": STRIKES + 1})
    try:
        harness.engine.update_weights(harness.weights(0), 1)
        harness.engine.members[0].strikes = -100  # not restarted
        harness.arm(0, "garbage", always=True)
        with pytest.raises(RolloutError, match=r"prompt 0 failed 4 times .*last error: .*a response ended by 7"):
            harness.engine.generate([[5]], [0], SAMPLING)
    finally:
        harness.engine.close()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """Somebody else listens on the server's port: the update says so, with the server's last words."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        process = ServerProcess(
            lambda model, at: [sys.executable, str(FAKE), str(model), str(at)], {}, port, tmp_path / "server.log"
        )
        pool = make_pool([Member(process.url, process)], tmp_path)
        try:
            with pytest.raises(SyncError, match=r"ended while it started.*Address already in use"):
                pool.update_weights(FakeHarness.weights(None, 0), 1)  # type: ignore[arg-type]
        finally:
            pool.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_server_outlives_its_trainer(tmp_path: Path, number: signal.Signals) -> None:
    """The trainer is killed with requests in flight; the server and its own children are gone moments later."""
    code = textwrap.dedent(
        f"""
        import sys, threading, time
        from pathlib import Path
        from megatron_vp2o.rollout.launch import ServerProcess, free_port
        child = "import time; time.sleep(600)"
        code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', '" + child + "']); time.sleep(600)"
        process = ServerProcess(lambda *_: [sys.executable, "-c", code], {{}}, free_port(), Path({str(tmp_path)!r}, "log"))
        started = threading.Thread(target=process.start, args=(Path("."),))  # a thread that ends: its death must not matter
        started.start(); started.join()
        print("ready", flush=True)
        time.sleep(600)
        """
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None and trainer.stdout.readline() == "ready\n"
    wait_for(lambda: len(descendants(trainer.pid)) == 3)  # guard, server, the server's child
    left = descendants(trainer.pid)
    time.sleep(0.5)
    assert all(alive(pid) for pid in left)
    trainer.send_signal(number)
    trainer.wait()
    wait_for(lambda: not any(alive(pid) for pid in left))


def test_a_killed_guard_takes_the_server_with_it(tmp_path: Path) -> None:
    code = "import time; time.sleep(600)"
    process = ServerProcess(lambda *_: [sys.executable, "-c", code], {}, 1, tmp_path / "log")
    process.start(tmp_path)
    try:
        assert process._guard is not None
        guard = process._guard.pid
        wait_for(lambda: len(descendants(guard)) == 1)
        server = descendants(guard)[0]
        os.kill(guard, signal.SIGKILL)
        wait_for(lambda: not alive(server) and not process.running)
    finally:
        process.stop()


def test_a_guard_that_is_killed_as_it_starts_leaves_no_server() -> None:
    """At the first moment at which there is a server, when it may not have asked the kernel yet to die with its guard."""
    left = []
    for _ in range(10):
        process = subprocess.Popen([sys.executable, str(GUARD), str(os.getpid()), "sleep", "77"])
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (found := children.read_text().split()):
            assert process.poll() is None
        process.kill()
        process.wait()
        left.append(int(found[0]))
    wait_for(lambda: not any(alive(pid) for pid in left))


def unwatch(harness: FakeHarness) -> None:
    """Its pool does not look after its servers any more."""
    harness.engine._do(harness.engine._unwatch_all())


def wait_for(condition: object, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """Children and theirs, parents first."""
    found, todo = [], [pid]
    while todo:
        at = todo.pop(0)
        try:
            tasks = list(Path(f"/proc/{at}/task").iterdir())
            own = [int(word) for task in tasks for word in (task / "children").read_text().split()]
        except OSError:
            continue
        found += own
        todo += own
    return found

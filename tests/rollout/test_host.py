"""Servers that another process keeps, as on another machine: they work like launched ones, and no end of anybody leaves one."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_vp2o.errors import RolloutError
from megatron_vp2o.rollout.contract import SAMPLING
from megatron_vp2o.rollout.host import Lines, RemoteProcess, find_hosts, own_address
from megatron_vp2o.rollout.members import Member
from megatron_vp2o.rollout.pool import ServerPool
from tests.rollout.fakes import FakeHarness, make_pool, post, table

ROOT = Path(__file__).resolve().parents[2]
JOB = [sys.executable, "-m", "tests.rollout.host_job"]
SECONDS = 15.0
"""Within which everything ends, on a busy machine."""


@contextmanager
def job(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([*JOB, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def eventually(what: Callable[[], bool], within: float = SECONDS) -> None:
    deadline = time.monotonic() + within
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def servers_of(folder: Path) -> list[psutil.Process]:
    """Fake servers of a test, alive."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            text = " ".join(line)
            if "fake_server.py" in text and "guard.py" not in text and str(folder) in text:
                found += [process] if process.status() != "zombie" else []
        except psutil.Error:
            continue
    return found


def connect(folder: Path, hosts: int, servers: int) -> ServerPool:
    links = find_hosts(folder / "meet", hosts, servers, 60.0)
    processes = [RemoteProcess(link, number) for link in links for number in range(servers)]
    return make_pool([Member(process.url, process) for process in processes], folder / "pool")


def test_servers_of_two_hosts_are_used_and_restarted_like_ones_own(tmp_path: Path) -> None:
    """Rollouts have the log-probabilities of the weights; servers that die come back with the present ones."""
    draw = random.Random(3)
    with job("host", str(tmp_path), "2", "60") as one, job("host", str(tmp_path), "2", "60") as two:
        pool = connect(tmp_path, 2, 2)
        harness = FakeHarness(tmp_path / "only_its_table", servers=0)
        for version in (0, 1):
            pool.update_weights(harness.weights(version), version, harness.probe(version))
            if version:  # one dies while it is asked, one is killed
                post(f"{pool.members[draw.randrange(4)].url}/fault", {"kind": "die_generating", "after": 3})
                draw.choice(servers_of(tmp_path)).kill()
            prompts = [[2 + draw.randrange(20), 5 + number] for number in range(16)]
            rollouts = pool.generate(prompts, range(16), SAMPLING, 4)
            assert rollouts.weight_version == version and len(rollouts.tokens_NS) == 64
            for row, length in enumerate(rollouts.total_len_N.tolist()):
                tokens, start = rollouts.tokens_NS[row, :length].tolist(), int(rollouts.prompt_len_N[row])
                expected = harness.log_probs(version, tokens, SAMPLING.temperature)[start - 1 :]
                found = rollouts.model_logprobs_NS[row, start:length].tolist()
                assert found == pytest.approx(expected, abs=1e-4)
        eventually(lambda: len(servers_of(tmp_path)) == 4)
        assert pool.restarts >= 1
        pool.close()
        assert servers_of(tmp_path) == []
        for host in (one, two):
            assert host.communicate(timeout=SECONDS)[0] == "the trainer has ended\n" and host.returncode == 0
    assert list((tmp_path / "meet").iterdir()) == []


@pytest.mark.parametrize("victim", ["trainer", "host"])
def test_whoever_is_killed_no_server_is_left(tmp_path: Path, victim: str) -> None:
    with job("host", str(tmp_path), "2", "60") as host, job("trainer", str(tmp_path), "2") as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == "ready\n"
        assert len(servers_of(tmp_path)) == 2
        begin = time.monotonic()
        (trainer if victim == "trainer" else host).kill()
        eventually(lambda: servers_of(tmp_path) == [])
        print(f"{time.monotonic() - begin:.2f} s")
        if victim == "trainer":  # torchrun starts its ranks again: the host is there for them
            assert host.poll() is None
            pool = connect(tmp_path, 1, 2)
            pool.update_weights(table(1).items(), 1)
            assert len(servers_of(tmp_path)) == 2
            host.send_signal(signal.SIGUSR1)  # Slurm's, to the ranks: not for it
            host.send_signal(signal.SIGTERM)  # a host with a trainer waits for its end
            time.sleep(1.5)
            assert host.poll() is None and len(servers_of(tmp_path)) == 2
            host.send_signal(signal.SIGTERM)
            assert host.communicate(timeout=SECONDS)[0] == "it was asked to end twice\n"
            with pytest.raises(RolloutError, match=r"its host \S+ is gone: the connection was closed"):
                pool.generate([[5, 6]], [0], SAMPLING, 2)
            pool.close()
    assert servers_of(tmp_path) == []


def test_a_host_without_a_trainer_ends(tmp_path: Path) -> None:
    with job("host", str(tmp_path), "1", "1.5") as host:
        pool = connect(tmp_path, 1, 1)
        time.sleep(3)
        assert host.poll() is None  # it has one
        with pytest.raises(ValueError, match="a run fails"), closing(pool):  # and may be started again
            raise ValueError("a run fails")
        assert host.communicate(timeout=SECONDS)[0] == "no trainer has come back within 1.5 s\n"
    with job("host", str(tmp_path), "1", "60") as host:
        eventually(lambda: any((tmp_path / "meet").glob("*.json")))
        host.send_signal(signal.SIGTERM)
        assert host.communicate(timeout=SECONDS)[0] == "it was asked to end\n"


def test_hosts_that_do_not_come_are_named(tmp_path: Path) -> None:
    meet = tmp_path / "meet"
    meet.mkdir()
    # What a killed host leaves, and what is no card.
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    (meet / "host-dead-1.json").write_text(json.dumps({"address": "127.0.0.1", "port": port, "secret": "x"}))
    (meet / "host-bad-2.json").write_text("{")
    with job("host", str(tmp_path), "2", "60") as host:
        eventually(lambda: len(list(meet.glob(f"*-{host.pid}.json"))) == 1)
        with pytest.raises(
            RolloutError, match=rf"hosts=2: after 0.5 s .* have come to \S+: \S+-{host.pid}\. Start the others"
        ):
            find_hosts(meet, 2, 2, 0.5)
        with pytest.raises(RolloutError, match=r"has 2 servers, and rollout.server.count=3"):
            find_hosts(meet, 1, 3, 5.0)


def test_strangers_are_told_nothing(tmp_path: Path) -> None:
    """Without the secret nothing is started, whatever is said; and the host is there for its trainer afterwards."""
    with job("host", str(tmp_path), "1", "60"):
        eventually(lambda: any((tmp_path / "meet").glob("*.json")))
        (card,) = (tmp_path / "meet").glob("*.json")
        assert card.stat().st_mode & 0o077 == 0
        said = json.loads(card.read_text())
        for greeting in ({"secret": "guess"}, {"do": "start", "server": 0, "model": "/"}, 7, "x" * 100_000):
            with socket.create_connection((said["address"], said["port"])) as stranger:
                lines = Lines(stranger)
                lines.send(greeting)
                with pytest.raises(OSError):
                    while True:
                        assert lines.one(5.0) is None
        assert servers_of(tmp_path) == []
        pool = connect(tmp_path, 1, 1)
        pool.update_weights(table(0).items(), 0)
        pool.close()


def test_own_address_can_be_listened_on() -> None:
    with socket.create_server((own_address(), 0)) as listener:
        socket.create_connection(listener.getsockname(), timeout=5).close()


def test_a_host_is_refused_where_no_run_would_come(tmp_path: Path) -> None:
    """By its command line, which is that of the run; without torch, which the servers' machine may lack."""
    run = [
        sys.executable,
        "-m",
        "megatron_vp2o.serve",
        "--config-name",
        "countdown_tiny_grpo",
        f"run_dir={tmp_path}/run",
    ]
    served = ["rollout=vllm", "rollout.launch=true", f"rollout.server.python={sys.executable}"]
    for more, said in (
        ([], "rollout.launch=false and rollout.server.hosts=0: the run waits for no host of servers"),
        (served, "rollout.launch=true and rollout.server.hosts=0: the run waits for no host of servers"),
        ([*served, "rollout.server.hosts=1"], f"rollout.server.python={sys.executable} has no vLLM"),
    ):
        done = subprocess.run([*run, *more], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
    code = "import sys, megatron_vp2o.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

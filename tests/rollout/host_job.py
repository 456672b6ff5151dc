"""Both sides of servers on hosts, as processes that test_host can kill: `host_job.py host|trainer FOLDER SERVERS [...]`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from megatron_vp2o.rollout.host import Host, RemoteProcess, end_with_signals, find_hosts
from megatron_vp2o.rollout.launch import ServerProcess, free_port

FAKE = Path(__file__).with_name("fake_server.py")


def host(folder: Path, servers: int, idle_s: float) -> None:
    """A host of fake servers."""

    def command(model: Path, port: int) -> list[str]:
        return [sys.executable, str(FAKE), str(model), str(port)]

    name = f"{time.time_ns()}"
    processes = [ServerProcess(command, {}, free_port(), folder / f"{name}-{n}.log") for n in range(servers)]
    made = Host(processes, "127.0.0.1", folder / "meet", idle_s)
    end_with_signals(made)
    print(made.serve(), flush=True)


def trainer(folder: Path, servers: int) -> None:
    """Brings the servers up, says so, and waits to be killed."""
    from megatron_vp2o.rollout.members import Member
    from tests.rollout.fakes import make_pool, table  # torch, which the host does without

    links = find_hosts(folder / "meet", 1, servers, 30.0)
    processes = [RemoteProcess(link, number) for link in links for number in range(servers)]
    pool = make_pool([Member(process.url, process) for process in processes], folder / "trainer")
    pool.update_weights(table(0).items(), 0)
    print("ready", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    role, where, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if role == "host":
        host(where, count, float(sys.argv[4]))
    else:
        trainer(where, count)

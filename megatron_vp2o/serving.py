"""The rollout engine of a run: the embedded one, or servers with the embedded one as the snapshot of their weights.

With `session.py` part of the composition root.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vp2o.config.schema import EngineKind, RolloutConfig, RouterReplay, TrainConfig, WeightTransfer
from megatron_vp2o.errors import RolloutError
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.mapping import Architecture
from megatron_vp2o.megatron.actor.generation import MegatronEngine
from megatron_vp2o.megatron.hf import start as hf_start
from megatron_vp2o.megatron.hf.weights import hf_tensors
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.model.moe_layer import moe_layers
from megatron_vp2o.parallel.groups import Groups, first_rank_says
from megatron_vp2o.rl.interfaces import RolloutEngine, Tokenizer
from megatron_vp2o.rollout.answers import RoutesAsked
from megatron_vp2o.rollout.board import meet
from megatron_vp2o.rollout.host import RemoteProcess, find_hosts
from megatron_vp2o.rollout.launch import (
    ServerProcess,
    free_port,
    gpu_shares,
    run_command,
    visible_gpus,
    vllm_environment,
)
from megatron_vp2o.rollout.members import Member
from megatron_vp2o.rollout.pool import ServerPool
from megatron_vp2o.rollout.pool_settings import PoolSettings
from megatron_vp2o.rollout.served import ServedEngine
from megatron_vp2o.rollout.store import FOLDER, StoredEngine
from megatron_vp2o.rollout.transfer import BroadcastTransfer, FileTransfer, Transfer
from megatron_vp2o.rollout.weight_files import default_folder, random_probe_tokens

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""Largest difference of the probe's log-probabilities, nats, where the settings name none."""


def rollout_engine(
    config: TrainConfig, policy: MegatronPolicy, snapshot: MegatronEngine, tokenizer: Tokenizer, groups: Groups
) -> RolloutEngine:
    """What the training loop generates with, and keeps what it generated where the settings say so. See `_engine`.

    Raises also RolloutError: stored rollouts are damaged.
    """
    engine = _engine(config, policy, snapshot, tokenizer, groups)
    rollout = config.rollout
    routes = rollout.router_replay is RouterReplay.R3
    if rollout.replay is not None:
        return StoredEngine(engine, groups, replay=Path(rollout.replay), routes=routes)
    kept = rollout.engine is not EngineKind.embedded if rollout.store is None else rollout.store
    return StoredEngine(engine, groups, folder=Path(config.run_dir) / FOLDER, routes=routes) if kept else engine


def _engine(
    config: TrainConfig, policy: MegatronPolicy, snapshot: MegatronEngine, tokenizer: Tokenizer, groups: Groups
) -> MegatronEngine | ServedEngine:
    """Who generates. Collective; servers are started at the first refresh.

    Raises:
        CheckpointError: no Hugging Face family has the model, so that servers cannot run it.
        RolloutError: a server of rollout.urls cannot be used.
    """
    if config.rollout.engine is EngineKind.embedded:
        return snapshot
    settings, save_tokenizer = hf_start.described(config, policy, tokenizer)
    model = architecture(settings)

    def describe(folder: Path) -> None:
        save_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def stream() -> Iterator[tuple[str, Tensor]]:
        return hf_tensors(snapshot.actor, model, groups)

    dtype = policy.model.config.params_dtype
    routes, stage = _routes(config, snapshot, model)
    members = _members(config, groups)
    pool, board = None, meet(groups)
    if groups.is_data_source:
        pool = ServerPool(
            members,
            shapes=model.hf_tensors(),
            describe=describe,
            folder=_weights_folder(config, first=groups.rank == 0),
            ends=tokenizer.eos_ids,
            vocabulary=policy.valid_vocab,
            pad_id=tokenizer.pad_id,
            settings=_pool_settings(config.rollout),
            owner=groups.rank == 0,
            board=board,
            routes=routes,
            transfer=_transfer(config, groups),
        )
        if groups.rank == 0:
            pool.check()
    length = min(24, config.model.max_sequence_length - 1)
    return ServedEngine(
        snapshot,
        pool,
        groups,
        stream=stream,
        probe_tokens=random_probe_tokens(policy.valid_vocab, length=length),
        tolerance=config.rollout.server.probe_tolerance or TOLERANCE[dtype],
        stage=stage,
        in_flight=config.rollout.in_flight_updates,
    )


def _transfer(config: TrainConfig, groups: Groups) -> Transfer:
    server = config.rollout.server
    if server.transfer is WeightTransfer.files:
        return FileTransfer()
    return BroadcastTransfer(groups.device, server.trainer_address, timeout_s=server.sync_timeout_s)


def _routes(config: TrainConfig, snapshot: MegatronEngine, model: Architecture) -> tuple[RoutesAsked | None, list[int]]:
    """Of which layers servers are asked for routes, if they are; places of this pipeline stage's layers among these."""
    if config.rollout.router_replay is not RouterReplay.R3:
        return None, []
    own: Any = snapshot.actor.config
    layers = tuple(layer for layer, routed in enumerate(model.moe_layers) if routed)
    stage = [layers.index(layer.layer_number - 1) for layer in moe_layers(snapshot.actor)]
    return RoutesAsked(layers, int(own.num_moe_experts), int(own.moe_router_topk)), stage


def _members(config: TrainConfig, groups: Groups) -> list[Member]:
    """The servers; the first rank's have their processes. Collective."""
    rollout = config.rollout
    if not rollout.launch:
        return [Member(url.rstrip("/")) for url in rollout.urls]
    server = rollout.server
    if server.hosts:
        return _on_hosts(config, groups)
    ports = [free_port() if server.port is None else server.port + number for number in range(server.count)]
    ports = first_rank_says(ports, groups.world)
    if groups.rank != 0:
        return [Member(f"http://127.0.0.1:{port}") for port in ports]
    # The first GPUs of the node are the ranks'.
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shares = (
        [""] * server.count
        if groups.device.type == "cpu"
        else gpu_shares(visible_gpus(torch.cuda.device_count()), ranks, server.count, server.tensor_parallel)
    )
    return [
        _launched(config, groups, n, port, share) for n, (port, share) in enumerate(zip(ports, shares, strict=True))
    ]


def _on_hosts(config: TrainConfig, groups: Groups) -> list[Member]:
    """Servers of hosts, to which the first rank is connected. Raises RolloutError on all ranks if they do not come."""
    server, links, problem = config.rollout.server, [], ""
    if groups.rank == 0:
        folder = Path(server.meeting_dir or Path(config.run_dir) / "servers")
        try:
            links = find_hosts(folder, server.hosts, server.count, 60 * server.startup_minutes)
        except RolloutError as error:
            problem = str(error)
    urls, problem = first_rank_says(([link.urls for link in links], problem), groups.world)
    if problem:
        raise RolloutError(problem)
    if groups.rank != 0:
        return [Member(url) for of_host in urls for url in of_host]
    processes = [RemoteProcess(link, number) for link in links for number in range(server.count)]
    return [Member(process.url, process) for process in processes]


def _launched(config: TrainConfig, groups: Groups, number: int, port: int, gpus: str) -> Member:
    on_cpu = groups.device.type == "cpu"
    log = Path(config.run_dir) / f"server{number}.log"
    process = ServerProcess(run_command(config, cpu=on_cpu), vllm_environment(on_cpu, gpus), port, log)
    return Member(process.url, process)


def _weights_folder(config: TrainConfig, *, first: bool) -> Path:
    named = config.rollout.server.weights_dir
    if named is not None:
        return Path(named)
    if config.rollout.server.hosts:  # other machines, which do not see this one's memory
        shared = Path(config.run_dir).resolve() / "weights"
        if first:  # what a trainer that was killed has left
            shutil.rmtree(shared, ignore_errors=True)
        return shared
    folder = default_folder(Path(config.run_dir))
    for other in folder.parent.glob("*-*") if folder.parent != Path(config.run_dir) else ():
        owner = other.name.rpartition("-")[2]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():  # its trainer was killed
            shutil.rmtree(other, ignore_errors=True)
    return folder


def _pool_settings(rollout: RolloutConfig) -> PoolSettings:
    server = rollout.server
    return PoolSettings(
        in_flight=server.in_flight,
        attempts=server.attempts,
        request_timeout_s=server.request_timeout_s,
        batch_timeout_s=60 * server.batch_minutes,
        sync_timeout_s=server.sync_timeout_s,
        startup_s=60 * server.startup_minutes,
        silence_s=server.silence_s,
        in_flight_updates=rollout.in_flight_updates,
    )

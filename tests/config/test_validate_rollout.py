"""What settings of rollouts are refused, before anything starts."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.config.schema import (
    EngineKind,
    GRPOConfig,
    RolloutConfig,
    RouterReplay,
    ServerConfig,
    SupervisedConfig,
    TrainConfig,
    TrustRegionConfig,
    VP2OConfig,
    WeightTransfer,
)
from megatron_vp2o.config.validate import validate
from megatron_vp2o.config.validate_rollout import servers_on_node
from megatron_vp2o.errors import ConfigError


def refused(config: TrainConfig) -> str:
    try:
        validate(config)
    except ConfigError as error:
        return str(error)
    return ""


def served(tmp_path: Path, **settings: Any) -> TrainConfig:
    rollout = RolloutConfig(engine=EngineKind.vllm, **settings)
    return TrainConfig(algorithm=GRPOConfig(), rollout=rollout, run_dir=str(tmp_path / "run"))


def test_servers_are_named_or_launched(tmp_path: Path) -> None:
    assert "no server: set exactly one of rollout.launch=true and rollout.urls" in refused(served(tmp_path))
    both = served(tmp_path, launch=True, urls=["http://127.0.0.1:8000"])
    assert "set exactly one" in refused(both)
    assert refused(served(tmp_path, urls=["http://127.0.0.1:8000"])) == ""
    for settings in ({"launch": True}, {"urls": ["http://127.0.0.1:8000"]}):
        config = served(tmp_path, **settings)
        config.rollout.engine = EngineKind.embedded
        assert "rollout.engine=embedded: no server would be asked" in refused(config)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("127.0.0.1:8000", "is no address of a server"),
        ("http://127.0.0.1", "has no port"),
        ("http://127.0.0.1:8000/v1", "has a path"),
        ("http://127.0.0.1:x", "is no address"),
        ("http://gpu7:8000", "rollout.server.weights_dir=null puts weights where only this one sees them"),
    ],
)
def test_addresses(tmp_path: Path, url: str, problem: str) -> None:
    assert problem in refused(served(tmp_path, urls=[url])) and repr(url) in refused(served(tmp_path, urls=[url]))


def test_each_server_once_and_shared_folder(tmp_path: Path) -> None:
    assert "twice" in refused(served(tmp_path, urls=["http://127.0.0.1:8000", "http://127.0.0.1:8000/"]))
    config = served(tmp_path, urls=["http://gpu7:8000"])
    config.rollout.server.weights_dir = str(tmp_path)
    assert refused(config) == ""


def test_servers_that_get_broadcasts_need_no_folder(tmp_path: Path) -> None:
    config = served(tmp_path, urls=["http://gpu7:8000"])
    assert "or choose rollout.server.transfer=broadcast" in refused(config)
    config.rollout.server.transfer = WeightTransfer.broadcast
    config.rollout.server.trainer_address = "10.0.0.1"
    assert refused(config) == ""
    config.rollout.server.transfer = WeightTransfer.files
    config.rollout.server.weights_dir = str(tmp_path)
    assert "rollout.server.trainer_address=10.0.0.1 with rollout.server.transfer=files" in refused(config)


def test_routes_to_replay_must_come_from_somewhere(tmp_path: Path) -> None:
    for replay in RouterReplay:
        config = served(tmp_path, urls=["http://127.0.0.1:8000"], router_replay=replay)
        assert refused(config) == ""
        config.rollout = RolloutConfig(router_replay=replay)
        assert refused(config) == ""
        config.algorithm = SupervisedConfig()
        assert (f"rollout.router_replay={replay.value} with algorithm=supervised" in refused(config)) == (
            replay is not RouterReplay.off
        )


def test_what_servers_cannot_do(tmp_path: Path) -> None:
    config = served(tmp_path, urls=["http://127.0.0.1:8000"])
    config.rollout.sampling.top_p = 0.9
    assert "rollout.sampling.top_p=0.9" in refused(config) and "choose top_p=1" in refused(config)
    config = served(tmp_path, urls=["http://127.0.0.1:8000"])
    config.algorithm = SupervisedConfig()
    assert "rollout.engine=vllm with algorithm=supervised" in refused(config)


def test_generation_beside_training(tmp_path: Path) -> None:
    """What cannot work names the setting, its value and the way out; what can is not refused."""
    urls = ["http://127.0.0.1:8000"]
    assert refused(served(tmp_path, urls=urls, ahead=1)) == ""
    embedded = TrainConfig(algorithm=GRPOConfig(), rollout=RolloutConfig(ahead=1), run_dir=str(tmp_path / "run"))
    said = "rollout.ahead=1 with rollout.engine=embedded: it generates in the learner's processes"
    assert said in refused(embedded) and "choose rollout=vllm, or rollout.ahead=0" in refused(embedded)
    supervised = TrainConfig(
        algorithm=SupervisedConfig(), rollout=RolloutConfig(ahead=1), run_dir=str(tmp_path / "run")
    )
    assert "rollout.ahead=1 with algorithm=supervised" in refused(supervised)
    supervised.rollout = RolloutConfig(max_age=3)
    assert "rollout.max_age=3 with algorithm=supervised" in refused(supervised)
    assert "rollout.ahead=65" in refused(served(tmp_path, urls=urls, ahead=65))
    config = served(tmp_path, urls=urls, ahead=2, in_flight_updates=True)
    assert refused(config) == ""
    config.rollout.router_replay = RouterReplay.R3
    assert "rollout.in_flight_updates=true with rollout.router_replay=R3" in refused(config)
    assert "choose rollout.ahead=1 or more" in refused(served(tmp_path, urls=urls, in_flight_updates=True))
    for ahead, minibatches, most in ((1, 1, 1), (1, 4, 8), (1, 4, 7), (3, 2, 12), (3, 2, 11)):
        config = served(tmp_path, urls=urls, ahead=ahead, max_age=most)
        config.algorithm = GRPOConfig(minibatches=minibatches, epochs=2)
        updates = ahead * 2 * minibatches
        assert (f"choose at least {updates}" in refused(config)) == (most < updates)
    for region, said in (
        (TrustRegionConfig(delta_nats=0.1), "algorithm.trust_region.delta_nats=0.1 with rollout.ahead=1"),
        (TrustRegionConfig(max_policy_drift=0.1, max_consecutive_rejections=2), "choose at least 3"),
        (TrustRegionConfig(max_policy_drift=0.1, max_consecutive_rejections=3), ""),
    ):
        config = served(tmp_path, urls=urls, ahead=1)
        config.algorithm = VP2OConfig(trust_region=region)
        assert said in refused(config) if said else refused(config) == ""
        config.rollout.ahead = 0
        assert refused(config) == ""


def test_launching_needs_an_environment_and_ports(tmp_path: Path) -> None:
    config = served(tmp_path, launch=True)
    config.rollout.server.python = str(tmp_path / "python")
    assert "is not there: make the environment (make vllm-env)" in refused(config)
    config.rollout.server.python = sys.executable
    assert "has no vLLM" in refused(config)
    fake = tmp_path / "fake"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    config.rollout.server.python = str(fake)
    assert refused(config) == ""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config.rollout.server.port = port - 1 if port > 1024 else port
        config.rollout.server.count = 2
        assert f"port {port} is in use here" in refused(config)
    config.rollout.server.port, config.rollout.server.count = 65535, 2
    assert "goes beyond port 65535" in refused(config)


def test_ranks_and_servers_share_no_gpu(tmp_path: Path) -> None:
    server = ServerConfig(count=2, tensor_parallel=2, python=sys.executable)
    rollout = RolloutConfig(engine=EngineKind.vllm, launch=True, server=server)
    for ranks, gpus in ((4, 8), (5, 8), (1, 5), (1, 4)):
        said = list(servers_on_node(rollout, gpus, ranks, ranks))
        assert said == [] if ranks + 4 <= gpus else f"need {ranks + 4} GPUs, and this node has {gpus}" in said[0]
    (far,) = servers_on_node(rollout, 0, 2, 6)
    assert "and 4 of 6 ranks are on others, which cannot reach them" in far
    server.hosts = 3
    assert list(servers_on_node(rollout, 2, 2, 6)) == []
    named = served(tmp_path, urls=["http://127.0.0.1:8000"])
    named.rollout.server.hosts = 1
    assert "rollout.server.hosts=1 with rollout.launch=false" in refused(named)
    config = served(tmp_path, launch=True)
    config.rollout.server.tensor_parallel = 3
    assert "model.num_attention_heads=4 is not divisible by rollout.server.tensor_parallel=3: choose" in refused(config)

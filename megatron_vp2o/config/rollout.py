"""Settings of rollouts: who generates, and how tokens are drawn. Part of the schema (`config/schema.py`)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Annotated, Optional

from megatron_vp2o.config.ranges import COUNT, SHARE, Range


class EngineKind(enum.Enum):
    embedded = "embedded"  # in the learner's processes
    vllm = "vllm"  # servers, over HTTP


class WeightTransfer(enum.Enum):
    files = "files"
    broadcast = "broadcast"  # from the first rank to the servers' workers


class RouterReplay(enum.Enum):
    off = "off"
    R2 = "R2"  # the trainer's own, of its scoring pass under the actor's weights
    R3 = "R3"  # the engine's


@dataclass
class SamplingConfig:
    """How tokens are drawn."""

    temperature: Annotated[float, Range(1e-3, 1000, also=(0,))] = 1.0
    """Softmax temperature; 0 is greedy."""
    top_p: Annotated[float, SHARE] = 1.0
    """Nucleus: the smallest set of tokens with at least this probability; 1 keeps all."""
    max_new_tokens: Annotated[int, Range(1, 2**24)] = 24
    """Longest response, in tokens, end-of-sequence included."""


@dataclass
class ServerConfig:
    """vLLM servers (docs/rollouts.md)."""

    count: Annotated[int, Range(1, 1024)] = 1
    """Servers to launch: on the first rank's machine, or on each host."""
    hosts: Annotated[int, Range(0, 4096)] = 0
    """Processes of `python -m megatron_vp2o.serve`, on this and other machines, that launch the servers, `count` each; the run
    waits for all of them. 0: the first rank launches them. The launcher sets it (executor.servers)."""
    meeting_dir: Optional[str] = None
    """Folder where the run and its hosts of servers find each other, seen by all; null: `servers` in the run folder."""
    idle_minutes: Annotated[float, Range(0.01, 10080)] = 10.0
    """How long a host waits for a trainer that has gone without a goodbye, before it ends; its servers end at once."""
    python: str = ".venv-vllm/bin/python"
    """Interpreter of the environment that has vLLM (`make vllm-env`); servers to launch run in it."""
    port: Annotated[Optional[int], Range(1024, 65535)] = None
    """Port of the first server to launch, the others have the next ones; null: free ones."""
    args: list[str] = field(default_factory=list)
    """Further arguments of launched servers, as vLLM has them."""
    tensor_parallel: Annotated[int, Range(1, 64)] = 1
    """GPUs of each launched server, over which it splits every layer."""
    max_num_seqs: Annotated[int, Range(1, 65536)] = 64
    """Sequences that a launched server decodes at once."""
    in_flight: Annotated[int, Range(1, 65536)] = 64
    """Prompts in flight to each server at once, each with its whole group."""
    attempts: Annotated[int, Range(1, 1000)] = 8
    """Tries of one prompt, after which the run ends with an error."""
    request_timeout_s: Annotated[float, Range(0.1, 10**6)] = 300.0
    """How long one prompt's group may take."""
    batch_minutes: Annotated[float, Range(0.01, 10080)] = 60.0
    """How long a rollout batch may take, restarts of servers included."""
    sync_timeout_s: Annotated[float, Range(0.1, 10**6)] = 300.0
    """How long each part of a weight update may take."""
    startup_minutes: Annotated[float, Range(0.01, 10080)] = 10.0
    """How long a launched server may take until it answers, and all hosts until they are there."""
    silence_s: Annotated[float, Range(1, 10**6)] = 30.0
    """How long a launched server may leave looks at its health (/health) unanswered before it is taken for dead and restarted. A
    server that is only busy answers them."""
    transfer: WeightTransfer = WeightTransfer.files
    """How weights get to servers. files: written by the first rank, read by servers; broadcast: from the first rank's memory, over
    a process group with each server's workers (gloo on CPUs, nccl on GPUs)."""
    trainer_address: Optional[str] = None
    """With transfer=broadcast, the address at which servers reach the first rank; null: that of its interface which leads to
    them."""
    weights_dir: Optional[str] = None
    """Folder through which weights travel, seen by trainer and servers under the same path; null: in shared memory (/dev/shm)
    where there is some and the first rank has launched the servers, else in the run folder. With transfer=broadcast only what
    launched servers start from, config.json and the tokenizer, is there."""
    probe_tolerance: Annotated[Optional[float], Range(1e-9, 1000)] = None
    """After each weight update: largest difference of a token's log-probability between server and trainer, in nats; null: 1e-4
    with float32, 0.25 with bfloat16."""


@dataclass
class RolloutConfig:
    """Where and how rollouts are generated."""

    engine: EngineKind = EngineKind.embedded
    """embedded: in the learner's processes; vllm: by servers, launched (launch=true) or named (urls)."""
    launch: bool = False
    """Start vLLM servers with the run, watch them, and end them with it."""
    urls: list[str] = field(default_factory=list)
    """Addresses (http://host:port) of vLLM servers that somebody else started, as docs/rollouts.md says."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """How servers are started or reached."""
    store: Optional[bool] = None
    """Keep every batch in `rollouts` in the run folder before it is used, so that a run that was killed goes on without generating
    it again; null: with servers only, because the embedded engine draws the same again."""
    replay: Optional[str] = None
    """Folder `rollouts` of a run whose batches are taken instead of generating any: the same updates again, for debugging."""
    router_replay: RouterReplay = RouterReplay.off
    """Send each token to the same experts in training as before: those that the engine chose when it generated (R3), or those that
    the trainer chooses under the actor's weights, in one more forward pass over each batch (R2)."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling during training."""
    max_batch_size: Annotated[int, COUNT] = 1024
    """Most sequences that the embedded engine decodes at once on one data-parallel rank; bounds the KV cache."""
    refresh_interval: Annotated[int, COUNT] = 1
    """Rollout batches generated with one version of the actor weights before they are refreshed."""
    ahead: Annotated[int, Range(0, 64)] = 0
    """Rollout batches that servers are asked for before the trainer needs them, so that they generate while it trains
    (docs/rollouts.md, Overlap); 0: a batch is generated when it is needed."""
    in_flight_updates: bool = False
    """Give servers new weights while they generate: responses under way go on with them, so that their tokens are of several
    versions, and which ones depends on how fast things are. false: what is under way is waited for before."""
    max_age: Annotated[Optional[int], COUNT] = None
    """Most optimizer steps from the weights that generated a batch to the beginning of training on it. Actors are refreshed so that
    batches stay within it; one that does not, after settings were changed, is generated again. null: no bound."""

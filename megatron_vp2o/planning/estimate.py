"""The plan of a run: parameters, memory, traffic, operations, times, and whether it fits."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_vp2o.config.parameters import ParameterCount, RankCount, count_on_rank, count_parameters
from megatron_vp2o.config.schema import (
    GRPOConfig,
    Implementation,
    ParallelConfig,
    Resume,
    SupervisedConfig,
    TrainConfig,
    VP2OConfig,
)
from megatron_vp2o.config.validate import data_parallel_size, validate
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.planning.compute import Flops, mfu_flops, seconds_at, step_flops
from megatron_vp2o.planning.hardware import DEVICES, GIB, Assumptions, Device
from megatron_vp2o.planning.memory import Memory, element_bytes, memory, owned_parameters
from megatron_vp2o.planning.servers import ServerPlan, plan_servers, ranks_on
from megatron_vp2o.planning.traffic import SteinTraffic, Stream, seconds, stein_traffic, traffic
from megatron_vp2o.planning.workload import Workload, padded_vocabulary, workload

GENERATION, SYNC = "generation (servers)", "weight synchronisation"


@dataclass(frozen=True)
class Plan:
    """Memory and traffic are of one rank of the fullest pipeline stage; operations of all ranks, per training step."""

    name: str
    gpus: int
    """Of the trainer's ranks and of servers that the run starts."""
    ranks: int
    """Of these, the trainer's."""
    device: str
    vocab_size: int
    parameters: ParameterCount
    rank: RankCount
    work: Workload
    memory: Memory
    capacity: int
    traffic: dict[str, Stream]
    stein: SteinTraffic | None
    flops: Flops
    times: dict[str, float]
    """Seconds of a training step, by part."""
    sync_seconds: float
    """Seconds of one weight synchronisation."""
    assumed: Assumptions
    knobs: list[str]
    servers: ServerPlan | None = None
    ahead: bool = False
    """Whether the servers generate the next batch while this one is trained on (rollout.ahead)."""

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.capacity and not (self.servers and self.servers.problems)

    @property
    def step_seconds(self) -> float:
        """Of a step as the recipe has it."""
        return self.overlapped_seconds if self.ahead else self.synchronous_seconds

    @property
    def synchronous_seconds(self) -> float:
        """Of a step in which generation comes first, and then training."""
        return sum(self.times.values())

    @property
    def overlapped_seconds(self) -> float:
        """Of a step while whose training the servers generate the next batch, and neither waits but for the longer of the two."""
        generating, syncing = self.times.get(GENERATION, 0.0), self.times.get(SYNC, 0.0)
        return max(generating, self.synchronous_seconds - generating - syncing) + syncing

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **dataclasses.asdict(self),
            "total_parameters": self.parameters.total,
            "active_parameters": self.parameters.active,
            "peak": self.memory.peak,
            "left": self.capacity - self.memory.peak,
            "fits": self.fits,
            "total_flops": self.flops.total,
            "step_seconds": self.step_seconds,
            "synchronous_seconds": self.synchronous_seconds,
            "overlapped_seconds": self.overlapped_seconds,
        }


def plan(
    config: TrainConfig,
    gpus: int,
    device: str,
    *,
    vocab_size: int | None = None,
    assumed: Assumptions | None = None,
    knobs: bool = True,
) -> Plan:
    """The plan of a run.

    Args:
        gpus: of the trainer's ranks, one each, and of servers that the run starts.
        device: one of `hardware.DEVICES`.
        vocab_size: rows of the embedding, padding included; None: the model's, else those of the tasks' own tokenizer.
        knobs: where it does not fit, look for single changes that help.

    Raises:
        ConfigError: the run cannot work on so many processes.
    """
    total, gpus = gpus, ranks_on(config, gpus)
    check(config, gpus)
    assumed = assumed or Assumptions()
    vocab_size = padded_vocabulary(config) if vocab_size is None else vocab_size
    if vocab_size % config.parallel.tensor_parallel:
        raise ConfigError(
            f"vocab_size={vocab_size} is not divisible by parallel.tensor_parallel={config.parallel.tensor_parallel}: "
            "round it up to a multiple"
        )
    hardware = DEVICES[device]
    capacity = int(hardware.usable_gib * GIB)
    work = workload(config, gpus, assumed)
    needed = memory(config, gpus, vocab_size, work, assumed)
    flops = step_flops(config, work, data_parallel_size(config, gpus), vocab_size)
    streams = traffic(config, gpus, vocab_size, work)
    servers = plan_servers(config, vocab_size, hardware, assumed)
    times = _times(config, gpus, vocab_size, work, flops, streams, hardware, assumed)
    sync_seconds = _copy_seconds(2 * needed.resident["actor weights"], hardware, assumed)
    if servers is not None:
        sync_seconds += servers.sync_seconds
        times |= {GENERATION: servers.seconds, SYNC: sync_seconds / config.rollout.refresh_interval}
    return Plan(
        name=config.name,
        gpus=total,
        ranks=gpus,
        device=device,
        vocab_size=vocab_size,
        parameters=count_parameters(config.model, vocab_size),
        rank=count_on_rank(config.model, config.parallel, vocab_size),
        work=work,
        memory=needed,
        capacity=capacity,
        traffic=streams,
        stein=stein_traffic(config, gpus),
        flops=flops,
        times=times,
        sync_seconds=sync_seconds,
        assumed=assumed,
        knobs=savings(config, total, device, vocab_size, assumed) if knobs and needed.peak > capacity else [],
        servers=servers,
        ahead=servers is not None and config.rollout.ahead > 0,
    )


def check(config: TrainConfig, gpus: int) -> None:
    """`validate`, apart from what belongs to the machine that will run it: its libraries, its files and its folders."""
    changes: dict[str, Any] = {
        "model": dataclasses.replace(config.model, implementation=Implementation.auto),
        "task": dataclasses.replace(config.task, tokenizer=None),
    }
    with tempfile.TemporaryDirectory() as empty, tempfile.NamedTemporaryFile(suffix=".idx") as file:
        if isinstance(config.algorithm, SupervisedConfig):
            data = dataclasses.replace(config.algorithm.data, tokenizer=None)
            if data.source.value != "task":
                data = dataclasses.replace(data, source=type(data.source).jsonl, path=file.name)
            changes["algorithm"] = dataclasses.replace(config.algorithm, data=data)
        changed = dataclasses.replace(config, init_from=None, run_dir=empty, resume=Resume.never, **changes)
        validate(changed, gpus, elsewhere=True)


def _times(
    config: TrainConfig,
    gpus: int,
    vocab_size: int,
    work: Workload,
    flops: Flops,
    streams: dict[str, Stream],
    device: Device,
    assumed: Assumptions,
) -> dict[str, float]:
    found = {"forward and backward": seconds_at(mfu_flops(flops), gpus, device.tflops, assumed)}
    if work.decoded:
        found["decoding"] = _decoding_seconds(config, gpus, vocab_size, work, flops, device, assumed)
    waits = seconds(streams, device, assumed.network_efficiency, assumed.dp_overlap)
    stein = waits.pop("Stein exchange", 0.0)
    found["communication"] = sum(waits.values())
    if config.algorithm.stein.enabled:
        # Products of the field are float32, and few for the bytes that they read.
        rank = count_on_rank(config.model, config.parallel, vocab_size)
        passes = 4 + 2 * (2 * config.algorithm.stein.power_iterations + 1) / 3
        found["Stein field"] = stein + work.updates * _copy_seconds(passes * 4 * rank.expert, device, assumed)
    state = owned_parameters(config, gpus, vocab_size)
    touched = 2 * 16 * state  # gradient, master and moments, read and written
    if isinstance(config.algorithm, VP2OConfig):
        touched += 2 * 12 * state  # the snapshot
    found["optimizer"] = work.updates * _copy_seconds(touched, device, assumed)
    return found


def _copy_seconds(moved: float, device: Device, assumed: Assumptions) -> float:
    return moved / (device.memory_gbs * 1e9 * max(assumed.memory_efficiency, 1e-9))


def _decoding_seconds(
    config: TrainConfig, gpus: int, vocab_size: int, work: Workload, flops: Flops, device: Device, assumed: Assumptions
) -> float:
    """Every token waits for weights and cache to be read, for its products, and for each layer's launches."""
    rank = count_on_rank(config.model, config.parallel, vocab_size)
    rounds = -(-work.decoded // work.decoded_at_once)
    tokens = config.rollout.sampling.max_new_tokens * assumed.response_share
    cache = config.model.num_layers // config.parallel.pipeline_parallel * work.decoded_at_once * work.tokens / 2
    cache *= 2 * config.model.num_query_groups // config.parallel.tensor_parallel * config.model.kv_channels
    read = _copy_seconds((rank.total + cache) * element_bytes(config), device, assumed)
    product = flops.decoding / (gpus * device.tflops * 1e12 * max(assumed.mfu, 1e-9)) / max(rounds * tokens, 1)
    launch = config.model.num_layers * assumed.launch_us * 1e-6
    return rounds * tokens * max(read + product, launch)


# --- other settings ---------------------------------------------------------------------------------------------------


def savings(config: TrainConfig, gpus: int, device: str, vocab_size: int, assumed: Assumptions) -> list[str]:
    """Single changes that lower the peak on the same GPUs, the best first."""
    now = plan(config, gpus, device, vocab_size=vocab_size, assumed=assumed, knobs=False)
    found = []
    for said, candidate in _changes(config):
        try:
            rows = padded_vocabulary(candidate, vocab_size)
            then = plan(candidate, gpus, device, vocab_size=rows, assumed=assumed, knobs=False)
        except ConfigError:
            continue  # not a layout of this model on these GPUs
        if then.memory.peak < now.memory.peak:
            verdict = "fits" if then.fits else "does not fit yet"
            found.append((then.memory.peak, f"{said}: {then.memory.peak / GIB:.1f} GiB, {verdict}"))
    return [line for _, line in sorted(found)]


def _changes(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    parallel, algorithm, model = config.parallel, config.algorithm, config.model

    def layout(name: str, value: Any) -> tuple[str, TrainConfig]:
        changed = dataclasses.replace(parallel, **{name: value})
        return f"parallel.{name}={json.dumps(value)}", dataclasses.replace(config, parallel=changed)

    if not parallel.distributed_optimizer:
        yield layout("distributed_optimizer", True)
    for name in (
        "expert_parallel",
        "tensor_parallel",
        "context_parallel",
        "pipeline_parallel",
        "expert_tensor_parallel",
    ):
        yield layout(name, 2 * getattr(parallel, name))
    if not model.recompute:
        yield "model.recompute=true", dataclasses.replace(config, model=dataclasses.replace(model, recompute=True))
    budget = algorithm.micro_batch_tokens if isinstance(algorithm, GRPOConfig) else None
    if isinstance(algorithm, GRPOConfig) and budget is not None and budget > config.model.max_sequence_length:
        half = max(budget // 2, config.model.max_sequence_length)
        yield (
            f"algorithm.micro_batch_tokens={half}",
            dataclasses.replace(config, algorithm=dataclasses.replace(algorithm, micro_batch_tokens=half)),
        )
    elif budget is None and algorithm.micro_batch_size > 1:
        half = algorithm.micro_batch_size // 2
        yield (
            f"algorithm.micro_batch_size={half}",
            dataclasses.replace(config, algorithm=dataclasses.replace(algorithm, micro_batch_size=half)),
        )
    if config.rollout.max_batch_size > 1:
        half = config.rollout.max_batch_size // 2
        rollout = dataclasses.replace(config.rollout, max_batch_size=half)
        yield f"rollout.max_batch_size={half}", dataclasses.replace(config, rollout=rollout)
    if isinstance(algorithm, VP2OConfig) and not algorithm.trust_region.snapshot_on_host:
        region = dataclasses.replace(algorithm.trust_region, snapshot_on_host=True)
        changed = dataclasses.replace(algorithm, trust_region=region)
        yield "algorithm.trust_region.snapshot_on_host=true", dataclasses.replace(config, algorithm=changed)


def suggest(
    config: TrainConfig, gpus: int, device: str, *, vocab_size: int | None = None, assumed: Assumptions | None = None
) -> list[tuple[ParallelConfig, Plan]]:
    """Layouts of the recipe's model on these GPUs that fit, the fastest by estimate first.

    Tensor parallelism stays within a node; optimizer state is sharded, its traffic overlapped.
    """
    found = []
    powers = [2**n for n in range(gpus.bit_length())]
    per_node = DEVICES[device].per_node
    for tensor in (size for size in powers if size <= per_node):
        for stages in (size for size in powers if size <= 8):
            for experts in powers:
                for split in (size for size in powers if size <= tensor):
                    parallel = dataclasses.replace(
                        config.parallel,
                        tensor_parallel=tensor,
                        pipeline_parallel=stages,
                        expert_parallel=experts,
                        expert_tensor_parallel=split,
                        sequence_parallel=None,
                        distributed_optimizer=True,
                        overlap_grad_reduce=True,
                        overlap_param_gather=True,
                    )
                    candidate = dataclasses.replace(config, parallel=parallel)
                    rows = padded_vocabulary(candidate, vocab_size)
                    try:
                        made = plan(candidate, gpus, device, vocab_size=rows, assumed=assumed, knobs=False)
                    except ConfigError:
                        continue
                    if made.fits:
                        found.append((parallel, made))
    return sorted(found, key=lambda each: each[1].step_seconds)

"""What rollout servers need and how fast they are: memory of their GPUs, tokens a second, and a weight synchronisation.

Arithmetic on assumptions, like the rest of the plan (`hardware.Assumptions`): nothing here was measured on a GPU.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_vp2o.config.parameters import ParameterCount, count_parameters
from megatron_vp2o.config.schema import EngineKind, GRPOConfig, ModelConfig, TrainConfig, WeightTransfer
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.planning.compute import attention_flops, layers_flops, output_flops
from megatron_vp2o.planning.hardware import GIB, Assumptions, Device
from megatron_vp2o.planning.memory import element_bytes


@dataclass(frozen=True)
class ServerPlan:
    """Bytes are of each GPU of a server.

    Attributes:
        servers: of the run; each gets an equal share of a rollout batch.
        tensor_parallel: GPUs of each.
        gpus: of all of them that the run itself has to bring; 0 where they are named by rollout.urls.
        weights: the model, split over the server's GPUs; norms and routers are whole on each.
        workspace: activations, logits, and whatever else vLLM needs beside weights and cache.
        share: what vLLM takes of a GPU in all.
        sequence: keys and values of the longest sequence.
        asked: sequences that a server is asked for at once.
        held: of these, how many fit into its cache at the mean length; the others wait.
        tokens_per_second: of a server, while it decodes that many.
        seconds: for a rollout batch.
        transferred: bytes of a whole set of weights.
        write_seconds, read_seconds: a weight synchronisation: the first rank writes files, then all servers read them; or it takes
            the weights into its memory, then sends them once to each server, over what they share.
        problems: why it cannot work, each with the fix; empty: it can.
        warnings: what works and is slow.
    """

    servers: int
    tensor_parallel: int
    gpus: int
    weights: int
    workspace: int
    share: int
    sequence: int
    asked: int
    held: int
    tokens_per_second: float
    seconds: float
    transferred: int
    write_seconds: float
    read_seconds: float
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def cache(self) -> int:
        """What is left for keys and values."""
        return max(0, self.share - self.weights - self.workspace)

    @property
    def sync_seconds(self) -> float:
        """Seconds of one weight synchronisation, in which nothing is generated."""
        return self.write_seconds + self.read_seconds


def server_count(config: TrainConfig) -> int:
    """Servers of a run; 0 where it generates in the learner's processes."""
    rollout = config.rollout
    if rollout.engine is not EngineKind.vllm:
        return 0
    return rollout.server.count * max(1, rollout.server.hosts) if rollout.launch else len(rollout.urls)


def server_gpus(config: TrainConfig) -> int:
    """GPUs that a run needs for its servers beside those of its ranks: none for servers that somebody else started."""
    return server_count(config) * config.rollout.server.tensor_parallel if config.rollout.launch else 0


def ranks_on(config: TrainConfig, gpus: int) -> int:
    """Processes of the trainer where servers have their share of the GPUs.

    Raises:
        ConfigError: the servers leave none.
    """
    taken = server_gpus(config)
    if taken >= gpus:
        server = config.rollout.server
        raise ConfigError(
            f"{server_count(config)} servers of rollout.server.tensor_parallel={server.tensor_parallel} take {taken} of {gpus} "
            "GPUs, which leaves none to train on: start fewer servers, or take more GPUs"
        )
    return gpus - taken


def plan_servers(config: TrainConfig, vocab_size: int, device: Device, assumed: Assumptions) -> ServerPlan | None:
    """The servers of a recipe that `validate` accepts; None where it has none."""
    algorithm, server = config.algorithm, config.rollout.server
    count = server_count(config)
    if not count or not isinstance(algorithm, GRPOConfig):
        return None
    rows = -(-algorithm.prompts_per_step * algorithm.group_size // count)
    asked = min(server.max_num_seqs, server.in_flight * algorithm.group_size, rows)
    made = _on(config, server.tensor_parallel, vocab_size, device, assumed, asked)
    mean = assumed.prompt_tokens + assumed.response_share * config.rollout.sampling.max_new_tokens
    held = min(asked, int(made.cache // max(1, _cache_bytes(config, server.tensor_parallel) * mean)))
    token = _token_seconds(config, server.tensor_parallel, max(1, held), vocab_size, device, assumed)
    rounds = -(-rows // max(1, held))
    response = assumed.response_share * config.rollout.sampling.max_new_tokens
    parameters = count_parameters(config.model, vocab_size)
    transferred = parameters.total * element_bytes(config)
    files = server.transfer is WeightTransfer.files
    at = max(assumed.file_gbs if files else assumed.broadcast_gbs, 1e-9) * 1e9
    problems = tuple(_problems(config, made, vocab_size, device, assumed))
    return dataclasses.replace(
        made,
        servers=count,
        gpus=server_gpus(config),
        held=held,
        tokens_per_second=max(1, held) / token,
        seconds=rounds * response * token,
        transferred=transferred,
        write_seconds=transferred / at,
        read_seconds=transferred / at * (1 if files else count),
        problems=problems,
        warnings=() if problems else tuple(_warnings(config, made, held, mean)),
    )


def _on(
    config: TrainConfig, split: int, vocab_size: int, device: Device, assumed: Assumptions, asked: int
) -> ServerPlan:
    """A server on `split` GPUs: its memory."""
    longest = config.model.max_sequence_length
    return ServerPlan(
        servers=0,
        tensor_parallel=split,
        gpus=0,
        weights=_weights(config, split, vocab_size),
        workspace=int(assumed.server_workspace_gib * GIB),
        share=int(assumed.server_share * device.usable_gib * GIB),
        sequence=int(_cache_bytes(config, split) * longest),
        asked=asked,
        held=0,
        tokens_per_second=0.0,
        seconds=0.0,
        transferred=0,
        write_seconds=0.0,
        read_seconds=0.0,
        problems=(),
        warnings=(),
    )


def _weights(config: TrainConfig, split: int, vocab_size: int) -> int:
    count = count_parameters(config.model, vocab_size)
    whole = count.norms + count.router
    return (-(-(count.total - whole) // split) + whole) * element_bytes(config)


def _cache_bytes(config: TrainConfig, split: int) -> int:
    """Keys and values of one token on each GPU. With more GPUs than heads of keys, each has a copy of one."""
    model = config.model
    heads = max(1, model.num_query_groups // split)
    return 2 * model.num_layers * heads * model.kv_channels * element_bytes(config)


def _problems(
    config: TrainConfig, made: ServerPlan, vocab_size: int, device: Device, assumed: Assumptions
) -> list[str]:
    needed = made.weights + made.workspace + made.sequence
    if needed <= made.share:
        return []
    enough = [
        split
        for split in (2**n for n in range(1, 7))
        if config.model.num_attention_heads % split == 0 and (on := _on(config, split, vocab_size, device, assumed, 1))
        # as vLLM demands: one sequence of the longest length
        if on.weights + on.workspace + on.sequence <= on.share
    ]
    fix = f"choose rollout.server.tensor_parallel={enough[0]}" if enough else "take larger GPUs, or a smaller model"
    return [
        f"a server with rollout.server.tensor_parallel={made.tensor_parallel} needs {needed / GIB:.1f} GiB of each GPU "
        f"({made.weights / GIB:.1f} weights, {made.workspace / GIB:.1f} workspace, {made.sequence / GIB:.1f} for one "
        f"sequence of {config.model.max_sequence_length} tokens), and vLLM takes {made.share / GIB:.1f}: {fix}"
    ]


def _warnings(config: TrainConfig, made: ServerPlan, held: int, mean: float) -> list[str]:
    found = []
    if held < made.asked:
        found.append(
            f"a server is asked for {made.asked} sequences at once, and its {made.cache / GIB:.1f} GiB of cache hold {held} of "
            f"{mean:.0f} tokens: the others wait. More servers, or a larger rollout.server.tensor_parallel, would hold more"
        )
    return found


def _token_seconds(
    config: TrainConfig, split: int, batch: int, vocab_size: int, device: Device, assumed: Assumptions
) -> float:
    """One token of each of `batch` sequences: weights and cache are read, products made, halves of the layers added up."""
    model, element = config.model, element_bytes(config)
    response = assumed.response_share * config.rollout.sampling.max_new_tokens
    context = assumed.prompt_tokens + response / 2
    bandwidth = device.memory_gbs * 1e9 * max(assumed.memory_efficiency, 1e-9)
    weights = _read_weights(model, count_parameters(model, vocab_size), batch) / split * element
    read = (weights + batch * context * _cache_bytes(config, split)) / bandwidth
    flops = batch * (layers_flops(model) + output_flops(model, vocab_size) + attention_flops(model, 1, context))
    product = flops / (split * device.tflops * 1e12 * max(assumed.mfu, 1e-9))
    sums = 2 * model.num_layers * 2 * batch * model.hidden_size * element * (split - 1) / split
    links = sums / (device.link_gbs * 1e9 * max(assumed.network_efficiency, 1e-9))
    return max(read + product + links, model.num_layers * assumed.server_launch_us * 1e-6)


def _read_weights(model: ModelConfig, count: ParameterCount, batch: int) -> float:
    """Parameters that a step over `batch` tokens touches, on average over balanced routes: not every expert, if they are few."""
    untouched = (1.0 - model.moe_router_topk / model.num_moe_experts) ** batch
    table = 0 if count.output == 0 else count.embedding  # rows of an embedding that is not tied are looked up
    return count.dense - table + count.experts * (1.0 - untouched)

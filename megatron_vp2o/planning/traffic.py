"""Bytes that leave one rank in a training step, by collective: a ring's least, balanced routes.

`simulate` records the same from the run's own code; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vp2o.config.parameters import count_on_rank
from megatron_vp2o.config.schema import Dispatcher, TrainConfig
from megatron_vp2o.planning.hardware import Device
from megatron_vp2o.planning.memory import GRADIENT_BYTES, element_bytes, expert_replicas, most_logits
from megatron_vp2o.planning.workload import Workload


@dataclass(frozen=True)
class Stream:
    """One kind of traffic of a rank and training step.

    Attributes:
        span: neighbouring ranks that the group reaches over, for telling a node's links from the network.
        overlapped: whether it can hide behind computing.
        exact: False for an upper bound.
    """

    bytes: int
    span: int
    overlapped: bool = False
    exact: bool = True


def traffic(config: TrainConfig, gpus: int, vocab_size: int, work: Workload) -> dict[str, Stream]:
    """Bytes sent in a step, by kind, for a recipe that `validate` accepts on so many processes. Kinds without any are left out."""
    model, parallel = config.model, config.parallel
    element = element_bytes(config)
    tensor, stages = parallel.tensor_parallel, parallel.pipeline_parallel
    experts, split = parallel.expert_parallel, parallel.expert_tensor_parallel
    layers = model.num_layers // stages
    context = parallel.context_parallel
    tokens = work.passed / context
    rank = count_on_rank(model, parallel, vocab_size)
    dense_ranks, expert_ranks = gpus // (tensor * stages), expert_replicas(parallel, gpus)
    # Experts' ranks are neighbours, then come their replicas.
    spread = gpus // stages
    found = {
        "gradients (dense)": _gradients(config, rank.dense, dense_ranks, work.updates, spread),
        "gradients (experts)": _gradients(config, rank.expert, expert_ranks, work.updates, spread),
    }
    if parallel.distributed_optimizer:
        found["parameters (dense)"] = _parameters(config, rank.dense, dense_ranks, work.updates, spread, element)
        found["parameters (experts)"] = _parameters(config, rank.expert, expert_ranks, work.updates, spread, element)
    passes = 3 if model.recompute else 2  # forward, forward again, backward
    # Attention gathers its input and scatters its output; backward gathers the input once more for the weights.
    hidden = tokens * model.hidden_size * element * (tensor - 1) / tensor
    attention = layers * (2 * passes + 1) * hidden
    # The output layer gathers its input, once more in the backward pass unless chunks of logits keep it, and scatters.
    in_one = work.micro_rows * work.tokens if work.packed is None else work.packed
    chunked = in_one // context * (vocab_size // tensor) > most_logits(config, vocab_size)
    output = (2 if chunked else 3) * hidden
    ends = output + (2 * hidden if stages == 1 else 0)  # and the embedding's output
    found["tensor parallelism"] = Stream(int(attention + ends), tensor)
    own = tokens / tensor * model.moe_router_topk
    if model.moe_token_dispatcher_type is Dispatcher.alltoall:
        moved = own * (2 * model.hidden_size * element + 4)  # there with a gate, and back
        found["expert parallelism"] = Stream(int(layers * passes * moved * (experts - 1) / experts), experts * split)
        # Outputs of the halves are added up in the gates' float32 (moe/token_dispatcher.py, combine_preprocess).
        gathered = own * (model.hidden_size * (element + 4) + 4)
        found["expert tensor parallelism"] = Stream(int(layers * passes * gathered * (split - 1)), split)
    else:
        everyone = experts * split
        moved = tokens / tensor * 2 * model.hidden_size * element
        found["expert parallelism"] = Stream(int(layers * passes * moved * (everyone - 1)), everyone, exact=False)
    if context > 1:
        # Keys and values are gathered in each forward pass, and their gradients scattered back; log-probability and entropy once.
        heads = 2 * model.num_query_groups * model.kv_channels / tensor
        moved = layers * passes * tokens * heads * element + tokens * 2 * 4
        found["context parallelism"] = Stream(int(moved * (context - 1)), tensor * context)
    if stages > 1:
        found["pipeline"] = Stream(int(2 * tokens / tensor * model.hidden_size * element), gpus)
    if (stein := stein_traffic(config, gpus)) is not None:
        sent = stein.exact_bytes if stein.exact_bytes is not None else stein.most_bytes
        found["Stein exchange"] = Stream(work.updates * sent, stein.span, exact=stein.exact_bytes is not None)
    return {name: stream for name, stream in found.items() if stream.bytes}


def _gradients(config: TrainConfig, parameters: int, ranks: int, updates: int, span: int) -> Stream:
    passes = 1 if config.parallel.distributed_optimizer else 2  # reduce-scatter, or all-reduce
    moved = updates * passes * parameters * GRADIENT_BYTES * (ranks - 1) // ranks
    return Stream(moved, span, config.parallel.overlap_grad_reduce)


def _parameters(config: TrainConfig, parameters: int, ranks: int, updates: int, span: int, element: int) -> Stream:
    return Stream(updates * parameters * element * (ranks - 1) // ranks, span, config.parallel.overlap_param_gather)


@dataclass(frozen=True)
class SteinTraffic:
    """What one rank sends in the expert exchange of one optimizer step, both ways."""

    ranks: int
    """Ranks that exchange with each other."""
    span: int
    most_bytes: int
    """2 x expert parameters / ranks x element size."""
    exact_bytes: int | None
    """Without what stays on the rank; None where gradients are sharded, since shares do not follow experts (`simulate`)."""


def stein_traffic(config: TrainConfig, gpus: int) -> SteinTraffic | None:
    """Traffic of the expert exchange (`parallel/exchange.py`); None where gradients are not mixed."""
    parallel, stein = config.parallel, config.algorithm.stein
    if not (stein.enabled and stein.attraction):
        return None
    shards = expert_replicas(parallel, gpus) if parallel.distributed_optimizer else 1
    expert = count_on_rank(config.model, parallel, 0).expert
    ranks = parallel.expert_parallel * shards
    span = ranks * parallel.expert_tensor_parallel
    most = 2 * expert // shards * GRADIENT_BYTES
    if ranks == 1:
        return SteinTraffic(ranks, span, 0, 0)
    return SteinTraffic(ranks, span, most, most * (ranks - 1) // ranks if shards == 1 else None)


def seconds(streams: dict[str, Stream], device: Device, efficiency: float, overlap: float) -> dict[str, float]:
    """How long each takes that does not hide: links within a node, the network beyond."""
    found = {}
    for name, stream in streams.items():
        speed = device.link_gbs if stream.span <= device.per_node else device.network_gbs
        visible = 1.0 - (overlap if stream.overlapped else 0.0)
        found[name] = visible * stream.bytes / (speed * 1e9 * max(efficiency, 1e-9))
    return found

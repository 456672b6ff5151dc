"""Bytes on one rank of the fullest pipeline stage, by kind."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vp2o.config.parameters import count_on_rank
from megatron_vp2o.config.schema import ControlMode, KLReference, ParallelConfig, Precision, TrainConfig, VP2OConfig
from megatron_vp2o.planning.hardware import GIB, Assumptions
from megatron_vp2o.planning.workload import Workload

GRADIENT_BYTES = 4  # gradients are accumulated and reduced in float32
MOMENT_BYTES = 8  # two float32 moments
MASTER_BYTES = 4
LOGGED_PER_CONTEXT = 4  # session.LOGGED_PER_CONTEXT, which a test compares


@dataclass(frozen=True)
class Memory:
    """Bytes by kind. What is resident stays; training and decoding take turns."""

    resident: dict[str, int]
    training: dict[str, int]
    decoding: dict[str, int]
    lost: int
    """Contexts, workspaces and fragmentation."""

    @property
    def peak(self) -> int:
        turns = max(sum(self.training.values()), sum(self.decoding.values()))
        return sum(self.resident.values()) + turns + self.lost


def element_bytes(config: TrainConfig) -> int:
    """Bytes of a weight and of an activation."""
    return 2 if config.model.precision is Precision.bf16 else 4


def expert_replicas(parallel: ParallelConfig, gpus: int) -> int:
    """Ranks with the same experts."""
    return gpus // (parallel.expert_parallel * parallel.expert_tensor_parallel * parallel.pipeline_parallel)


def owned_parameters(config: TrainConfig, gpus: int, vocab_size: int) -> int:
    """Whose optimizer state a rank keeps."""
    parallel = config.parallel
    rank = count_on_rank(config.model, parallel, vocab_size)
    if not parallel.distributed_optimizer:
        return rank.total
    replicas = gpus // (parallel.tensor_parallel * parallel.pipeline_parallel)
    return -(-rank.dense // replicas) + -(-rank.expert // expert_replicas(parallel, gpus))


def static_memory(config: TrainConfig, gpus: int, vocab_size: int) -> dict[str, int]:
    """Weights, gradients and optimizer state; Megatron pads buckets of sharded gradients by some hundred bytes beyond."""
    rank, element = count_on_rank(config.model, config.parallel, vocab_size), element_bytes(config)
    master = MASTER_BYTES if config.model.precision is Precision.bf16 else 0
    return {
        "weights": rank.total * element,
        "gradients": rank.total * GRADIENT_BYTES,
        "optimizer": owned_parameters(config, gpus, vocab_size) * (MOMENT_BYTES + master),
    }


def memory(config: TrainConfig, gpus: int, vocab_size: int, work: Workload, assumed: Assumptions) -> Memory:
    """Memory of each GPU under a recipe that `validate` accepts on so many processes.

    Args:
        vocab_size: rows of the embedding, padding included.
    """
    static = static_memory(config, gpus, vocab_size)
    resident = {**static, "actor weights": static["weights"], **_vp2o(config, gpus, vocab_size, work)}
    if getattr(config.algorithm, "kl_reference", KLReference.none) is KLReference.initial:
        resident["KL reference"] = static["weights"]
    training, decoding = _training(config, vocab_size, work, assumed), _decoding(config, vocab_size, work)
    known = sum(resident.values()) + max(sum(training.values()), sum(decoding.values()))
    return Memory(resident, training, decoding, int(assumed.reserve_gib * GIB + assumed.fragmentation * known))


def _vp2o(config: TrainConfig, gpus: int, vocab_size: int, work: Workload) -> dict[str, int]:
    model, algorithm, element = config.model, config.algorithm, element_bytes(config)
    layers = model.num_layers // config.parallel.pipeline_parallel
    experts, hidden, found = model.num_moe_experts, model.hidden_size, {}
    if algorithm.stein.enabled or algorithm.stein.monitor:
        found["Stein state"] = layers * (2 * experts**2 + experts * (hidden + 1)) * 4  # C, its counts, prototypes
    if algorithm.stein.enabled:
        found["Stein chunk"] = int(algorithm.stein.chunk_mib * 2**20)
    if isinstance(algorithm, VP2OConfig) and algorithm.trust_region.mode is not ControlMode.off:
        region = algorithm.trust_region
        found["anchor"] = layers * experts * hidden * (4 + element)
        logged = LOGGED_PER_CONTEXT * work.updates * region.contexts_per_rank * layers * experts * 4
        found["contexts"] = region.contexts_per_rank * layers * hidden * element + logged
        if region.mode is ControlMode.enforce and not region.snapshot_on_host:
            found["snapshot"] = owned_parameters(config, gpus, vocab_size) * (MOMENT_BYTES + MASTER_BYTES)
    return found


def most_logits(config: TrainConfig, vocab_size: int) -> int:
    """Logits that exist at a time on a rank; micro-batches with more are taken in chunks of tokens."""
    return max(vocab_size // config.parallel.tensor_parallel, int(config.model.logits_chunk_mib * 2**20) // 4)


def _training(config: TrainConfig, vocab_size: int, work: Workload, assumed: Assumptions) -> dict[str, int]:
    model, parallel, element = config.model, config.parallel, element_bytes(config)
    tokens = work.micro_tokens
    own = tokens // parallel.tensor_parallel  # sequence parallelism
    layers = model.num_layers // parallel.pipeline_parallel
    in_flight = min(parallel.pipeline_parallel, work.micro_batches)
    layer = _layer_activations(config, tokens, assumed)
    kept = own * model.hidden_size * element if model.recompute else layer // 2
    found = {"activations": int(in_flight * layers * kept + layer)}
    logits = min(tokens * (vocab_size // parallel.tensor_parallel), most_logits(config, vocab_size))
    found["logits"] = int(logits * assumed.logits_bytes)
    if config.algorithm.stein.enabled or hasattr(config.algorithm, "trust_region"):
        matrix = model.hidden_size * model.moe_ffn_hidden_size // parallel.expert_tensor_parallel
        found["output projections"] = model.num_moe_experts // parallel.expert_parallel * matrix * 4
    return found


def _layer_activations(config: TrainConfig, tokens: int, assumed: Assumptions) -> int:
    """What one layer holds between its forward and its backward, and as much again for gradients."""
    model, parallel, element = config.model, config.parallel, element_bytes(config)
    tensor, expert_tensor = parallel.tensor_parallel, parallel.expert_tensor_parallel
    own = tokens // tensor
    heads = (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    attention = tokens * (model.hidden_size + (2 * heads + model.num_attention_heads * model.kv_channels) // tensor)
    routed = int(own * model.moe_router_topk * expert_tensor * assumed.imbalance)
    inner = 3 * model.moe_ffn_hidden_size // expert_tensor
    experts = routed * (4 * model.hidden_size + inner) + own * model.moe_router_topk * 2 * model.hidden_size
    shared = tokens * 3 * (model.moe_shared_expert_intermediate_size or 0) // tensor
    routes = own * model.num_moe_experts * 4 * 4  # logits, gates, map and its permutation
    return 2 * element * (attention + experts + shared + 4 * own * model.hidden_size) + routes


def _decoding(config: TrainConfig, vocab_size: int, work: Workload) -> dict[str, int]:
    if not work.evaluated:
        return {}
    model, parallel, element = config.model, config.parallel, element_bytes(config)
    layers = model.num_layers // parallel.pipeline_parallel
    longest = max(work.longest if work.decoded else 0, config.rollout.sampling.max_new_tokens)
    heads = 2 * model.num_query_groups // parallel.tensor_parallel * model.kv_channels
    logits = work.decoded_at_once * vocab_size * 4 * 3
    return {"KV cache": work.decoded_at_once * longest * layers * heads * element, "sampled logits": logits}

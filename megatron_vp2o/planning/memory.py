"""Bytes on one rank of the fullest pipeline stage, by kind."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vp2o.config.parameters import count_on_rank
from megatron_vp2o.config.schema import (
    ControlMode,
    KLReference,
    ParallelConfig,
    Precision,
    RouterReplay,
    TrainConfig,
    VP2OConfig,
)
from megatron_vp2o.planning.hardware import GIB, Assumptions
from megatron_vp2o.planning.workload import Workload

GRADIENT_BYTES = 4  # gradients are accumulated and reduced in float32
MOMENT_BYTES = 8  # two float32 moments
MASTER_BYTES = 4
LOGGED_PER_CONTEXT = 4  # session.LOGGED_PER_CONTEXT, which a test compares


@dataclass(frozen=True)
class Memory:
    """Bytes by kind. What is resident stays; training, decoding and scoring (by the actor, by the KL reference) take turns."""

    resident: dict[str, int]
    training: dict[str, int]
    decoding: dict[str, int]
    scoring: dict[str, int]
    lost: int
    """Contexts, workspaces and fragmentation."""

    @property
    def peak(self) -> int:
        turns = (self.training, self.decoding, self.scoring)
        return sum(self.resident.values()) + max(sum(turn.values()) for turn in turns) + self.lost


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


def memory(
    config: TrainConfig, gpus: int, vocab_size: int, work: Workload, assumed: Assumptions, grouped: bool = True
) -> Memory:
    """Memory of each GPU under a recipe that `validate` accepts on so many processes.

    Args:
        vocab_size: rows of the embedding, padding included.
        grouped: experts compute in one product, as on GPUs; on the CPU they take turns.
    """
    static = static_memory(config, gpus, vocab_size)
    resident = {**static, "actor weights": static["weights"], **_vp2o(config, gpus, vocab_size, work)}
    if getattr(config.algorithm, "kl_reference", KLReference.none) is KLReference.initial:
        resident["KL reference"] = static["weights"]
    training = _training(config, vocab_size, work, assumed, grouped)
    turns = (training, _decoding(config, vocab_size, work, assumed), _scoring(config, vocab_size, work, assumed))
    known = sum(resident.values()) + max(sum(turn.values()) for turn in turns)
    return Memory(resident, *turns, int(assumed.reserve_gib * GIB + assumed.fragmentation * known))


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


def _training(
    config: TrainConfig, vocab_size: int, work: Workload, assumed: Assumptions, grouped: bool
) -> dict[str, int]:
    """What stays between forward and backward passes, and the larger of what comes on top: logits, or a layer's backward pass."""
    model, parallel, element = config.model, config.parallel, element_bytes(config)
    context = parallel.context_parallel
    tokens = -(-work.micro_tokens // context)
    own = tokens // parallel.tensor_parallel  # sequence parallelism
    layers = model.num_layers // parallel.pipeline_parallel
    in_flight = min(parallel.pipeline_parallel, work.micro_batches)
    layer = _saved_by_layer(config, tokens, assumed)
    # Keys and values of all context-parallel ranks, and in the backward pass their gradients, once more in the ranks' order.
    heads = 2 * model.num_query_groups * model.kv_channels // parallel.tensor_parallel
    gathered = element * tokens * context * heads if context > 1 else 0
    layer += gathered
    kept = in_flight * layers * (own * model.hidden_size * element if model.recompute else layer)
    ends = 2 * tokens * model.hidden_size * element  # the last norm's input and the output layer's
    found = {"activations": int(kept + ends)}
    logits = _logits(config, vocab_size, tokens, assumed)
    backward = _layer_backward(config, tokens, assumed, grouped) + (layer if model.recompute else 0) + 2 * gathered
    found["logits" if logits > backward else "backward of a layer"] = max(logits, backward)
    if config.algorithm.stein.enabled or hasattr(config.algorithm, "trust_region"):
        matrix = model.hidden_size * model.moe_ffn_hidden_size // parallel.expert_tensor_parallel
        found["output projections"] = model.num_moe_experts // parallel.expert_parallel * matrix * 4
    return found


def _logits(config: TrainConfig, vocab_size: int, tokens: int, assumed: Assumptions) -> int:
    """Whole, or one chunk: float32 copies (a third for entropy's gradient), bfloat16 logits beside them; the weight's gradient."""
    element, rows = element_bytes(config), vocab_size // config.parallel.tensor_parallel
    whole, chunk = tokens * rows, most_logits(config, vocab_size)
    weight = rows * config.model.hidden_size * element
    if whole <= chunk:
        return int(whole * (assumed.logits_bytes + element)) + weight
    copies = 3 if getattr(config.algorithm, "entropy_coef", 0.0) else 2
    return chunk * (4 * copies + (element if element < 4 else 0)) + (weight if element < 4 else 0)


def _routed(config: TrainConfig, tokens: int, assumed: Assumptions) -> int:
    """Tokens of the busiest rank's experts."""
    parallel = config.parallel
    own = tokens // parallel.tensor_parallel
    return int(own * config.model.moe_router_topk * parallel.expert_tensor_parallel * assumed.imbalance)


def _saved_by_layer(config: TrainConfig, tokens: int, assumed: Assumptions) -> int:
    """Bytes that one layer's forward pass leaves for its backward pass, as the layers of `implementation=local` do."""
    model, parallel, element = config.model, config.parallel, element_bytes(config)
    tensor, expert_tensor, width = parallel.tensor_parallel, parallel.expert_tensor_parallel, model.kv_channels
    own, routed = tokens // tensor, _routed(config, tokens, assumed)
    heads, turned = model.num_attention_heads // tensor, _heads(config)
    norms = (
        own * 4 * model.hidden_size
    )  # inputs of both norms, of the query-key-value product, and of the experts and the router
    experts = routed * (model.hidden_size + 2 * model.moe_ffn_hidden_size // expert_tensor)
    shared = tokens * 5 * (model.moe_shared_expert_intermediate_size or 0) // tensor
    scores = own * (
        9 * model.num_moe_experts + 32 * model.moe_router_topk
    )  # two float32, a mask; ids of experts, gates
    order = routed * 12  # the tokens' order, a gate each
    return element * (norms + tokens * turned * width + experts + shared) + 4 * tokens * heads + scores + order


def _heads(config: TrainConfig) -> int:
    """Heads' widths of a token in one layer: query, key and value as they were multiplied, query and key turned, the output; with
    their norms, those of query and key."""
    model, tensor = config.model, config.parallel.tensor_parallel
    heads, groups = model.num_attention_heads // tensor, max(1, model.num_query_groups // tensor)
    return (heads + 2 * groups) + heads + groups + heads + (heads + groups if model.qk_layernorm else 0)


def _layer_backward(config: TrainConfig, tokens: int, assumed: Assumptions, grouped: bool) -> int:
    """Bytes beyond what was kept, in the experts' backward pass: gradients of outputs, inputs, inner width and weights."""
    model, parallel, element = config.model, config.parallel, element_bytes(config)
    inner = model.moe_ffn_hidden_size // parallel.expert_tensor_parallel
    weights = model.num_moe_experts // parallel.expert_parallel * 3 * model.hidden_size * inner
    widths = 2 * model.hidden_size + (5 if grouped else 1) * inner
    return element * (_routed(config, tokens, assumed) * widths + weights)


def _decoding(config: TrainConfig, vocab_size: int, work: Workload, assumed: Assumptions) -> dict[str, int]:
    """Of rollouts where the learner's ranks generate them, or of an evaluation's samples, if more are generated at once."""
    rows = max(work.decoded_at_once if work.decoded else 0, work.evaluated_at_once)
    if not rows:
        return {}
    model, parallel, element = config.model, config.parallel, element_bytes(config)
    layers = model.num_layers // parallel.pipeline_parallel
    longest = config.rollout.sampling.max_new_tokens + int(assumed.prompt_tokens)
    heads = 2 * model.num_query_groups // parallel.tensor_parallel * model.kv_channels
    return {"KV cache": rows * longest * layers * heads * element, "sampled logits": rows * vocab_size * 4 * 3}


def _scoring(config: TrainConfig, vocab_size: int, work: Workload, assumed: Assumptions) -> dict[str, int]:
    """A forward pass with weights that are not the learner's, of which nothing is kept: one layer's tensors, or logits. The actor
    and the reference see whole sequences, without sequence and context parallelism."""
    if not work.scored:
        return {}
    model, element, split = config.model, element_bytes(config), config.parallel.expert_tensor_parallel
    tokens = work.micro_tokens
    if config.rollout.router_replay is RouterReplay.R2:  # the pass that records routes pads
        tokens = max(tokens, config.algorithm.micro_batch_size * work.longest)
    routed = int(tokens * model.moe_router_topk * split * assumed.imbalance)
    stream = 3 * tokens * model.hidden_size  # a layer's input, its norm's output, and what is added to it
    experts = routed * (2 * model.hidden_size + 3 * model.moe_ffn_hidden_size // split)
    shared = tokens * 3 * (model.moe_shared_expert_intermediate_size or 0) // config.parallel.tensor_parallel
    layer = element * (stream + max(tokens * _heads(config) * model.kv_channels, experts + shared))
    found = min(tokens * (vocab_size // config.parallel.tensor_parallel), most_logits(config, vocab_size))
    logits = element * tokens * model.hidden_size + found * (8 + (element if element < 4 else 0))
    return {"a layer" if layer > logits else "logits": max(layer, logits)}

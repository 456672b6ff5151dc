"""How many parameters a model has, from its settings alone: in all, for one token, and on one rank."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vp2o.config.schema import ModelConfig, ParallelConfig, SoftmaxType


def padded_vocab(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of Megatron's embedding: the smallest multiple of 64 (of 8 * tensor_parallel, if that is more) that holds all ids.

    The same for every tensor_parallel up to 8, so that these layouts share initial weights and checkpoints.
    """
    unit = max(64, 8 * tensor_parallel)
    return -(-vocab_size // unit) * unit


def length_multiple(tensor: int, context: int) -> int:
    """What lengths are padded to a multiple of: 2 * context chunks, and sequence parallelism cuts each rank's positions."""
    if context == 1:
        return tensor
    return context * (tensor if tensor % 2 == 0 else 2 * tensor)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model by kind. Every layer is a MoE layer."""

    embedding: int
    output: int
    """The output projection; 0 where it is the embedding."""
    attention: int
    norms: int
    router: int
    """With its bias, if there is one."""
    shared_expert: int
    experts: int
    """All routed experts."""
    routed: int
    """Those of them that one token meets."""

    @property
    def dense(self) -> int:
        """All but the routed experts."""
        return self.embedding + self.output + self.attention + self.norms + self.router + self.shared_expert

    @property
    def total(self) -> int:
        return self.dense + self.experts

    @property
    def active(self) -> int:
        """What one token meets; the embedding counts whole, as in published names such as 30B-A3B."""
        return self.dense + self.routed


@dataclass(frozen=True)
class RankCount:
    """Parameters that lie on one rank."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


def count_parameters(model: ModelConfig, vocab_size: int) -> ParameterCount:
    """Parameters of the whole model.

    Args:
        vocab_size: rows of the embedding, padding included.
    """
    layers = model.num_layers
    table = vocab_size * model.hidden_size
    expert = _expert(model, model.moe_ffn_hidden_size)
    return ParameterCount(
        embedding=table,
        output=0 if model.share_embeddings_and_output_weights else table,
        attention=layers * sum(_attention(model)),
        norms=layers * _norms(model) + model.hidden_size,
        router=layers * _router(model),
        shared_expert=layers * sum(_shared(model)),
        experts=layers * model.num_moe_experts * expert,
        routed=layers * model.moe_router_topk * expert,
    )


def count_on_rank(model: ModelConfig, parallel: ParallelConfig, vocab_size: int) -> RankCount:
    """On a rank of the fullest pipeline stage, for a layout that `validate` accepts.

    Tensor parallelism splits attention, embeddings and the shared expert; norms, router and the biases of output projections
    are whole on every rank.

    Args:
        vocab_size: rows of the embedding, padding included; divisible by tensor_parallel.
    """
    tensor, stages = parallel.tensor_parallel, parallel.pipeline_parallel
    layers = model.num_layers // stages
    (attention, whole), (shared, shared_whole) = _attention(model), _shared(model)
    dense = layers * ((attention + shared) // tensor + whole + shared_whole + _norms(model) + _router(model))
    table = vocab_size * model.hidden_size // tensor
    if stages == 1:
        dense += table + model.hidden_size + (0 if model.share_embeddings_and_output_weights else table)
    else:
        dense += table + model.hidden_size  # the last stage: output projection (its copy, where tied) and final norm
    experts = model.num_moe_experts // parallel.expert_parallel
    expert = _expert(model, model.moe_ffn_hidden_size) // parallel.expert_tensor_parallel
    return RankCount(dense, layers * experts * expert)


def attention_cost(model: ModelConfig) -> float:
    """Work of one query meeting one key, over the work of one token in a layer's products: a causal row of n tokens takes as
    much as n + attention_cost n^2."""
    weights = sum(_attention(model)) + sum(_shared(model)) + _router(model)
    weights += model.moe_router_topk * _expert(model, model.moe_ffn_hidden_size)
    return model.num_attention_heads * model.kv_channels / weights


def _attention(model: ModelConfig) -> tuple[int, int]:
    """What tensor parallelism splits, and what it does not."""
    heads, groups = model.num_attention_heads, model.num_query_groups
    split = model.hidden_size * model.kv_channels * (2 * heads + 2 * groups)  # query and output, key and value
    if model.softmax_type is SoftmaxType.learnable:
        split += heads
    if not model.add_bias_linear:
        return split, 0
    return split + model.kv_channels * (heads + 2 * groups), model.hidden_size


def _norms(model: ModelConfig) -> int:
    return 2 * model.hidden_size + (2 * model.kv_channels if model.qk_layernorm else 0)


def _router(model: ModelConfig) -> int:
    return model.num_moe_experts * (model.hidden_size + (1 if model.add_bias_linear else 0))


def _expert(model: ModelConfig, width: int) -> int:
    """Gate, up and down; Megatron splits no expert with biases."""
    return 3 * model.hidden_size * width + (2 * width + model.hidden_size if model.add_bias_linear else 0)


def _shared(model: ModelConfig) -> tuple[int, int]:
    """What tensor parallelism splits, and what it does not."""
    width = model.moe_shared_expert_intermediate_size
    if width is None:
        return 0, 0
    whole = model.hidden_size if model.add_bias_linear else 0
    return _expert(model, width) - whole, whole

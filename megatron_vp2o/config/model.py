"""The settings of the network. Part of `schema`, which imports them; names follow Megatron's TransformerConfig."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated, Optional

from megatron_vp2o.config.ranges import COEFFICIENT, COUNT, WIDTH, Range


class Precision(enum.Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Implementation(enum.Enum):
    """Which Megatron layer specs to build from."""

    auto = "auto"  # transformer_engine where CUDA and transformer-engine are there, else torch with CUDA, local without
    local = "local"
    torch = "torch"
    transformer_engine = "transformer_engine"


class Dispatcher(enum.Enum):
    alltoall = "alltoall"
    allgather = "allgather"


class RouterScore(enum.Enum):
    softmax = "softmax"
    sigmoid = "sigmoid"


class LoadBalancing(enum.Enum):
    aux_loss = "aux_loss"
    seq_aux_loss = "seq_aux_loss"
    global_aux_loss = "global_aux_loss"
    none = "none"


class Activation(enum.Enum):
    """Activation function of an expert's gate."""

    silu = "silu"
    quick_gelu = "quick_gelu"  # x * sigmoid(1.702 x)


class SoftmaxType(enum.Enum):
    """The softmax of attention."""

    vanilla = "vanilla"
    learnable = "learnable"  # each head has a sink: one more logit, which takes a share and gives nothing


class PositionEmbedding(enum.Enum):
    rope = "rope"
    yarn = "yarn"


@dataclass
class ModelConfig:
    """A decoder-only sparse MoE transformer: RMSNorm, gated experts, GQA, RoPE. The defaults are the Qwen3-MoE shape:
    SwiGLU, qk-norm, no bias, no sinks, no windows."""

    num_layers: Annotated[int, Range(1, 1000)] = 4
    """Transformer layers; every one has a MoE feed-forward block."""
    hidden_size: Annotated[int, WIDTH] = 128
    """D, the width of the residual stream."""
    num_attention_heads: Annotated[int, Range(1, 2**16)] = 4
    """Query heads."""
    num_query_groups: Annotated[int, Range(1, 2**16)] = 2
    """Key/value heads (grouped-query attention)."""
    kv_channels: Annotated[int, Range(1, 2**16)] = 32
    """Width of one attention head."""
    qk_layernorm: bool = True
    """RMSNorm on queries and keys of each head."""
    position_embedding_type: PositionEmbedding = PositionEmbedding.rope
    """Rotary embedding as it is, or stretched to longer sequences (YaRN, arXiv 2309.00071)."""
    rotary_base: Annotated[float, Range(1, 1e12)] = 10000.0
    """RoPE base."""
    yarn_rotary_scaling_factor: Annotated[float, Range(1, 10**6)] = 32.0
    """YaRN: how many times longer sequences may be than those of the original training."""
    yarn_original_max_position_embeddings: Annotated[int, COUNT] = 4096
    """YaRN: the longest sequence of the original training."""
    yarn_beta_fast: Annotated[float, Range(1e-3, 10**6)] = 32.0
    """YaRN: channels that turn more often than this over that length stay as they are."""
    yarn_beta_slow: Annotated[float, Range(1e-3, 10**6)] = 1.0
    """YaRN: channels that turn less often than this are stretched in full."""
    yarn_correction_range_round_to_int: bool = False
    """YaRN: round the bounds between such channels to whole ones."""
    add_bias_linear: bool = False
    """Biases in attention, router and experts."""
    softmax_type: SoftmaxType = SoftmaxType.vanilla
    """Softmax of attention: plain, or with a learnt sink for each head."""
    window_size: Annotated[Optional[int], COUNT] = None
    """Sliding window: how many positions before it a position sees (Megatron's window_size is the pair of this and 0); null for
    all of them."""
    window_attn_skip_freq: Annotated[Optional[int], Range(2, 1000)] = None
    """With a window: one layer in this many sees all positions; null for none."""
    layernorm_epsilon: Annotated[float, Range(1e-12, 1)] = 1e-6
    """Epsilon of every RMSNorm."""
    max_sequence_length: Annotated[int, Range(2, 2**24)] = 64
    """Longest sequence, prompt and response together, in tokens."""
    vocab_size: Annotated[Optional[int], Range(1, 2**24)] = None
    """Ids that the model knows, at least as many as the tokenizer's (those beyond have probability zero); null for just the
    tokenizer's. A converted checkpoint needs its own number."""
    share_embeddings_and_output_weights: bool = False
    """Tie the input embedding and the output projection."""
    init_method_std: Annotated[float, Range(1e-6, 10)] = 0.02
    """Standard deviation of the normal initialisation."""
    num_moe_experts: Annotated[int, Range(1, 2**14)] = 16
    """E, routed experts in a layer."""
    moe_router_topk: Annotated[int, Range(1, 2**14)] = 4
    """k, experts a token is routed to."""
    moe_ffn_hidden_size: Annotated[int, WIDTH] = 64
    """F, intermediate width of one expert."""
    activation_func: Activation = Activation.silu
    """What an expert's gate goes through."""
    glu_linear_offset: Annotated[float, Range(-1000, 1000)] = 0.0
    """Added to the other half, before the two are multiplied."""
    activation_func_clamp_value: Annotated[Optional[float], Range(1e-3, 10**6)] = None
    """Bound of both halves before that (of the gate only from above); null for none."""
    moe_shared_expert_intermediate_size: Annotated[Optional[int], WIDTH] = None
    """Width of a shared expert that sees every token; null for none."""
    moe_router_score_function: RouterScore = RouterScore.softmax
    """How router logits become gates."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts before the top-k (true) or over the selected ones after it (false, as Qwen3 with
    norm_topk_prob)."""
    moe_router_enable_expert_bias: bool = False
    """Auxiliary-loss-free balancing by an expert bias (needs the sigmoid score)."""
    moe_router_load_balancing_type: LoadBalancing = LoadBalancing.aux_loss
    """Which load-balancing loss."""
    moe_aux_loss_coeff: Annotated[float, COEFFICIENT] = 1e-3
    """Its coefficient."""
    moe_z_loss_coeff: Annotated[float, COEFFICIENT] = 0.0
    """Coefficient of the router z-loss; 0 turns it off."""
    moe_token_dispatcher_type: Dispatcher = Dispatcher.alltoall
    """How tokens reach their experts."""
    precision: Precision = Precision.fp32
    """Parameters and activations; the router and the log-probabilities are always float32."""
    implementation: Implementation = Implementation.auto
    """Layer specs. `local`: Megatron's own, with attention, norms and experts of ours in their places (any device). `torch`: the
    same modules and checkpoints, always by torch's fused operations, one product for all experts, and torch's fused AdamW (any
    device; on a CPU no faster than `local`). `transformer_engine`: its modules (CUDA)."""
    recompute: bool = False
    """Full activation recomputation, layer by layer."""
    logits_chunk_mib: Annotated[float, Range(1e-3, 2**20)] = 256.0
    """Most MiB of float32 logits that exist at a time on a rank in training and scoring. Where a micro-batch has more,
    log-probabilities are computed in chunks of tokens, each chunk's logits once more in the backward pass."""

"""From our model and parallel settings to Megatron's GPTModel, with an initialisation that does not depend on the layout."""

from __future__ import annotations

import math
import re
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vp2o.config.schema import LoadBalancing, ModelConfig, ParallelConfig, PositionEmbedding, Precision
from megatron_vp2o.megatron.model.experts import GroupedSequentialMLP
from megatron_vp2o.megatron.model.output_layer import own_output_layer
from megatron_vp2o.megatron.model.specs import layer_specs, use_transformer_engine
from megatron_vp2o.megatron.platform.compat import mark_expert_parameters
from megatron_vp2o.megatron.platform.world import own_device
from megatron_vp2o.parallel.groups import Groups

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
ACTIVATIONS = {"silu": F.silu, "quick_gelu": quick_gelu}


def sequence_parallel(parallel: ParallelConfig) -> bool:
    """The setting, or where it is null: whenever tensor parallelism is on."""
    return parallel.tensor_parallel > 1 if parallel.sequence_parallel is None else parallel.sequence_parallel


def transformer_config(model: ModelConfig, parallel: ParallelConfig, *, inference: bool = False) -> TransformerConfig:
    """Megatron's TransformerConfig. `inference` is the actor's: no sequence and no context parallelism (a decoded token
    cannot be split)."""
    te = use_transformer_engine(model.implementation)
    dtype = DTYPES[model.precision]
    balancing = model.moe_router_load_balancing_type
    if model.moe_aux_loss_coeff == 0 or inference:
        balancing = LoadBalancing.none
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.moe_ffn_hidden_size,
        qk_layernorm=model.qk_layernorm,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[model.activation_func.value],
        glu_linear_offset=model.glu_linear_offset,
        activation_func_clamp_value=model.activation_func_clamp_value,
        add_bias_linear=model.add_bias_linear,
        softmax_type=model.softmax_type.value,
        window_size=None if model.window_size is None else (model.window_size, 0),
        window_attn_skip_freq=model.window_attn_skip_freq,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=model.init_method_std,
        num_moe_experts=model.num_moe_experts,
        moe_router_topk=model.moe_router_topk,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
        moe_router_score_function=model.moe_router_score_function.value,
        moe_router_pre_softmax=model.moe_router_pre_softmax,
        moe_router_enable_expert_bias=model.moe_router_enable_expert_bias,
        moe_router_load_balancing_type=balancing.value,
        moe_aux_loss_coeff=0.0 if inference else model.moe_aux_loss_coeff,
        moe_z_loss_coeff=None if inference or model.moe_z_loss_coeff == 0 else model.moe_z_loss_coeff,
        moe_router_dtype=None if model.precision is Precision.fp32 else "fp32",
        moe_token_dispatcher_type=model.moe_token_dispatcher_type.value,
        moe_grouped_gemm=te,
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        context_parallel_size=1 if inference else parallel.context_parallel,
        cp_comm_type="p2p" if parallel.context_parallel > 1 and not inference else None,
        expert_model_parallel_size=parallel.expert_parallel,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel,
        sequence_parallel=sequence_parallel(parallel) and not inference,
        # Micro-batches are trimmed to their own longest sequence, so pipeline stages must exchange shapes.
        variable_seq_lengths=parallel.pipeline_parallel > 1,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=model.precision is Precision.bf16,
        calculate_per_token_loss=True,
        recompute_granularity="full" if model.recompute and not inference else None,
        recompute_method="uniform" if model.recompute and not inference else None,
        recompute_num_layers=1 if model.recompute and not inference else None,
        use_cpu_initialization=own_device().type == "cpu",
        perform_initialization=True,  # also marks which parameters are split; `initialise` then overwrites the values
        persist_layer_norm=te,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=te,
        bias_activation_fusion=te,
        bias_dropout_fusion=te,
        apply_rope_fusion=False,
    )
    if model.position_embedding_type is PositionEmbedding.yarn:
        set_yarn(config, {name: getattr(model, name) for name in vars(model) if name.startswith("yarn_")})
    return config


def set_yarn(config: TransformerConfig, settings: dict[str, Any]) -> None:
    """What GPTModel and attention look for on the configuration, where they are no fields (gpt_model.py:172)."""
    for name, value in {"yarn_mscale": None, "yarn_mscale_all_dim": None, **settings}.items():
        setattr(config, name, value)


def build_model(
    model: ModelConfig, parallel: ParallelConfig, groups: Groups, *, vocab_size: int, seed: int, inference: bool = False
) -> GPTModel:
    """This rank's part of the model, initialised from `seed` alone: the same weights whatever the layout.

    Args:
        vocab_size: rows of the embedding, already divisible by tensor_parallel.
        inference: build the actor's twin (same parameters, no losses, no sequence parallelism, eval mode).
    """
    config = transformer_config(model, parallel, inference=inference)
    gpt = GPTModel(
        config,
        layer_specs(config, model.implementation),
        vocab_size=vocab_size,
        max_sequence_length=model.max_sequence_length,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type.value,
        rotary_base=model.rotary_base,  # type: ignore[arg-type]  # declared an int, used as a number
    )
    mark_expert_parameters(gpt)
    if inference or not use_transformer_engine(model.implementation):
        # `CachedSelfAttention` takes each token's position itself; Megatron would cut the positions for the whole group.
        gpt.rotary_pos_emb.cp_group = None
    own_output_layer(gpt, model.logits_chunk_mib)
    if inference:
        gpt.requires_grad_(False).eval()
    else:
        initialise(gpt, model, groups, seed)
    gpt.to(groups.device)
    for module in gpt.modules():
        if isinstance(module, GroupedSequentialMLP) and module.uses_grouped_products(groups.device):
            module.stack_weights()
    return gpt


@torch.no_grad()
def initialise(gpt: GPTModel, model: ModelConfig, groups: Groups, seed: int) -> None:
    """Normal weights (output projections scaled by 1/sqrt(2 layers), as Megatron does), unit norms, no biases and sinks.

    Each tensor is drawn whole from a generator seeded by its global name, then cut to this rank's part. That costs one
    full tensor of memory at a time, and makes every layout start from the same model, expert by expert.
    """
    scaled_std = model.init_method_std / math.sqrt(2 * model.num_layers)
    for name, parameter in gpt.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        std = scaled_std if "linear_proj" in name or "linear_fc2" in name else model.init_method_std
        global_name = global_parameter_name(name, gpt, groups)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(global_name.encode())) % 2**63)
        group = groups.etp if ".experts." in name else groups.tp
        split = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
        shape = list(parameter.shape)
        if split >= 0:
            shape[split] *= group.size()
        full = torch.empty(shape).normal_(0.0, std, generator=generator)
        parameter.copy_(_cut(full, name, split, group.rank(), group.size()))


def _cut(full: Tensor, name: str, split: int, rank: int, size: int) -> Tensor:
    if split < 0 or size == 1:
        return full
    if "linear_fc1" in name:  # gate and up halves are cut separately: a rank holds [its gate rows; its up rows]
        return torch.cat([half.chunk(size, dim=split)[rank] for half in full.chunk(2, dim=0)])
    return full.chunk(size, dim=split)[rank]


def weight_tensors(model: torch.nn.Module) -> list[Tensor]:
    """What makes the model compute what it computes, in a fixed order: see `named_weight_tensors`."""
    return [tensor for _, tensor in named_weight_tensors(model)]


def named_weight_tensors(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """This rank's parameters and persistent buffers (expert bias) by their names in the model, in a fixed order.

    Counters that a training step begins and ends (tokens by expert) are no part of it; an actor's twin has others of them.
    """
    parameters: dict[Tensor, str] = {}
    buffers: list[tuple[str, Tensor]] = []
    for prefix, module in model.named_modules():  # once: a model has as many modules as experts, several times over
        for name, parameter in module._parameters.items():
            if parameter is not None:  # one that two modules share has the first one's name
                parameters.setdefault(parameter, f"{prefix}.{name}" if prefix else name)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                buffers.append((f"{prefix}.{name}", buffer))
    return [*((name, parameter) for parameter, name in parameters.items()), *buffers]


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"(linear_fc[12])\.weight(\d+)$")


def global_parameter_name(name: str, gpt: GPTModel, groups: Groups) -> str:
    """The parameter's name with the layer's and the expert's index in the whole model; one name for all layer specs."""
    if name == "output_layer.weight" and gpt.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"  # the last stage's copy
    if match := _LAYER.search(name):
        layer = gpt.decoder.layers[int(match[1])].layer_number - 1
        name = name.replace(match[0], f"decoder.layers.{layer}.", 1)
    first = groups.ep.rank() * (gpt.config.num_moe_experts // groups.ep.size())
    if match := _GROUPED_EXPERT.search(name):
        name = _GROUPED_EXPERT.sub(f"local_experts.{match[2]}.{match[1]}.weight", name)
    if match := _EXPERT.search(name):
        name = name.replace(match[0], f"local_experts.{int(match[1]) + first}.", 1)
    return name

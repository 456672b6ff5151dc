"""Layer specs: Megatron's own, with the few modules of ours put in their places."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vp2o.config.schema import Implementation
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.megatron.model.attention import CachedSelfAttention, FusedCoreAttention
from megatron_vp2o.megatron.model.experts import GroupedProductMLP, GroupedSequentialMLP
from megatron_vp2o.megatron.model.moe_layer import VP2OMoELayer
from megatron_vp2o.megatron.model.norm import FusedRMSNorm, RMSNorm
from megatron_vp2o.megatron.platform.compat import replace_in_spec


@cache
def use_transformer_engine(implementation: Implementation) -> bool:
    """Whether to build from transformer-engine modules. Raises ConfigError where they are asked for and cannot be had."""
    available = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if implementation is Implementation.transformer_engine and not available:
        raise ConfigError(
            "model.implementation=transformer_engine, but CUDA and transformer-engine are not both here; "
            "install the [gpu] extra on a GPU machine or use model.implementation=torch"
        )
    return available and implementation in (Implementation.auto, Implementation.transformer_engine)


def resolved(implementation: Implementation) -> Implementation:
    """What `auto` is on this machine; else the argument."""
    if use_transformer_engine(implementation):
        return Implementation.transformer_engine
    if implementation is Implementation.auto:
        return Implementation.torch if torch.cuda.is_available() else Implementation.local
    return implementation


def layer_specs(config: TransformerConfig, implementation: Implementation) -> Any:
    """The block spec of a decoder for `config`."""
    if use_transformer_engine(implementation):
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
        return replace_in_spec(spec, {SelfAttention: CachedSelfAttention, MoELayer: VP2OMoELayer})
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    fused = resolved(implementation) is Implementation.torch
    replacements: dict[type, type] = {
        WrappedTorchNorm: FusedRMSNorm if fused else RMSNorm,
        SelfAttention: CachedSelfAttention,
        MoELayer: VP2OMoELayer,
    }
    if config.softmax_type == "vanilla" and config.window_size is None:
        replacements[DotProductAttention] = FusedCoreAttention
    plain = config.glu_linear_offset == 0 and config.activation_func_clamp_value is None
    if plain and not config.add_bias_linear and config.activation_func is F.silu:
        replacements[SequentialMLP] = GroupedProductMLP if fused else GroupedSequentialMLP
    if config.add_bias_linear:
        replacements[RowParallelLinear] = OwnOutputLinear
    return replace_in_spec(spec, replacements)


class OwnOutputLinear(RowParallelLinear):
    """RowParallelLinear whose output may be changed in place: an expert's bias is added so (transformer/mlp.py), and without
    transformer-engine the output is a view made by an autograd function, for which torch refuses it."""

    def forward(self, input_: Any) -> Any:
        """See the base class."""
        output, bias = super().forward(input_)
        return (output.clone() if self.is_expert and bias is not None else output), bias

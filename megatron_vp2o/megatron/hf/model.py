"""A GPTModel for any family that can be converted, and what its weights compute: for verifying conversions.

The model is made of Megatron's own local layers, so that a conversion is checked against Megatron and not against the
project's replacements. Training builds its model in `model.py`.

Shape legend: s positions, b sequences, n heads, d head width, V vocabulary, D hidden.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from packaging.version import Version
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.nn.functional import all_reduce
from torch.nn.functional import pad

from megatron_vp2o.config.parameters import length_multiple
from megatron_vp2o.config.schema import ParallelConfig
from megatron_vp2o.errors import CheckpointError, ConfigError
from megatron_vp2o.hf.mapping import Architecture
from megatron_vp2o.megatron.model.attention import FusedCoreAttention
from megatron_vp2o.megatron.model.build import ACTIVATIONS, set_yarn
from megatron_vp2o.megatron.model.norm import RMSNorm
from megatron_vp2o.megatron.model.token_share import TokenShare
from megatron_vp2o.megatron.platform.compat import mark_expert_parameters, megatron_version, replace_in_spec
from megatron_vp2o.megatron.platform.world import own_device
from megatron_vp2o.parallel.groups import Groups


def transformer_config(model: Architecture, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of the model under a layout, for evaluation."""
    settings = model.settings | {"activation_func": ACTIVATIONS[model.settings["activation_func"]]}
    make = MLATransformerConfig if model.latent_attention else TransformerConfig
    config = make(
        **settings,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        moe_token_dispatcher_type="alltoall",
        moe_router_dtype=None if dtype is torch.float32 else "fp32",
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        expert_model_parallel_size=parallel.expert_parallel,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=own_device().type == "cpu",
        perform_initialization=True,  # also marks which parameters are split
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )
    set_yarn(config, {name: value for name, value in model.embedding.items() if name.startswith("yarn_")})
    return config


def build(
    model: Architecture, parallel: ParallelConfig, groups: Groups, *, vocab_rows: int, dtype: torch.dtype
) -> GPTModel:
    """This rank's part, in evaluation mode, with meaningless weights.

    Args:
        vocab_rows: rows of the embedding with padding; tensor_parallel divides it.

    Raises:
        ConfigError: Megatron cannot run the model under this layout.
    """
    if model.settings["add_bias_linear"] and parallel.expert_tensor_parallel > 1:
        raise ConfigError(
            f"parallel.expert_tensor_parallel={parallel.expert_tensor_parallel}: Megatron has no expert tensor parallelism "
            f"for experts with biases (transformer_config.py), which {model.family} has: set it to 1"
        )
    if model.latent_attention and model.settings["q_lora_rank"] is None and megatron_version() >= Version("0.17"):
        raise ConfigError(
            f"this {model.family} model has q_lora_rank=null, and megatron-core {megatron_version()} then puts a norm before "
            "its query projection that the model does not have (transformer/mla_qk_norm_config.py): use megatron-core 0.16"
        )
    if model.latent_attention:
        _admit_absent_transformer_engine()
    config = transformer_config(model, parallel, dtype)
    replacements: dict[type, type] = {WrappedTorchNorm: RMSNorm}
    if model.settings.get("softmax_type", "vanilla") == "vanilla" and model.settings.get("window_size") is None:
        replacements[DotProductAttention] = FusedCoreAttention  # values of another width than keys need it (0.16.1)
    if model.qk_norm_over_heads:
        replacements[SelfAttention] = NormOverHeadsSelfAttention
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    spec = replace_in_spec(spec, replacements)
    gpt = GPTModel(
        config,
        spec,
        vocab_size=vocab_rows,
        max_sequence_length=4096,  # used by learned positions only
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type=model.embedding["position_embedding_type"],
        rotary_base=model.embedding["rotary_base"],
    )
    mark_expert_parameters(gpt)
    if model.latent_norm_epsilon is not None:
        for layer in gpt.decoder.layers:
            for norm in ("q_layernorm", "kv_layernorm"):
                if hasattr(getattr(layer.self_attention, norm, None), "eps"):
                    getattr(layer.self_attention, norm).eps = model.latent_norm_epsilon
    return gpt.requires_grad_(False).eval().to(groups.device)


def _admit_absent_transformer_engine() -> None:
    """In 0.16.1, multi_latent_attention.py believes that it has transformer-engine wherever Megatron's wrapper module can be
    imported, and then asks `isinstance(..., None)` (lines 62 and 184). 0.19.2 asks the wrapper."""
    if importlib.util.find_spec("transformer_engine") is None:
        multi_latent_attention.HAVE_TE = False


def load(gpt: GPTModel, folder: Path) -> None:
    """Take the weights of a distributed checkpoint of any layout. Collective.

    Raises:
        CheckpointError: the checkpoint lacks some of them, or is damaged.
    """
    wanted = gpt.sharded_state_dict()
    try:
        loaded = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
    except (CheckpointException, CheckpointingException, RuntimeError) as error:
        raise CheckpointError(f"Megatron cannot load {folder}: {error}") from error
    own = gpt.state_dict().keys()
    gpt.load_state_dict(
        {name: value for name, value in loaded.items() if name in own}
    )  # a run's has the optimizer's, too


class NormOverHeads(MegatronModule):
    """RMSNorm over the heads of all tensor-parallel ranks together, [s, b, n, d], as OLMoE has it for queries and keys."""

    def __init__(self, config: Any, heads: int, width: int, eps: float, group: dist.ProcessGroup) -> None:
        super().__init__(config=config)
        self.eps, self.group = eps, group
        self.count = heads * width
        self.weight = torch.nn.Parameter(torch.ones(self.count // group.size(), dtype=config.params_dtype))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, x_sbnd: Tensor) -> Tensor:
        """[s, b, n, d] -> the same."""
        x = x_sbnd.float()
        squares = x.square().sum((-2, -1), keepdim=True)
        if self.group.size() > 1:
            squares = all_reduce(squares, group=self.group)
        scaled = x * torch.rsqrt(squares / self.count + self.eps)
        return self.weight.view(x_sbnd.shape[-2:]) * scaled.to(x_sbnd.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Split along its one dimension."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )


class NormOverHeadsSelfAttention(SelfAttention):
    """Megatron's SelfAttention with `NormOverHeads` in place of its norms of each head."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        width, eps, group = config.kv_channels, config.layernorm_epsilon, self.pg_collection.tp
        self.q_layernorm = NormOverHeads(config, config.num_attention_heads, width, eps, group)
        self.k_layernorm = NormOverHeads(config, config.num_query_groups, width, eps, group)


# --- what the model computes ------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(gpt: GPTModel, tokens_bs: Tensor, groups: Groups, vocab_size: int) -> Tensor:
    """Logits of all positions, [b, s, V], without the padding of the vocabulary; the same on every rank. Collective."""
    tokens_bs = tokens_bs.to(groups.device)
    batch, wanted = tokens_bs.shape
    share = TokenShare.of(gpt.config, groups)
    if share.context is not None:  # in equal parts; nothing looks at what comes after it
        tokens_bs = pad(tokens_bs, (0, -wanted % length_multiple(groups.tp.size(), groups.cp.size())))
    length = tokens_bs.shape[1]
    positions = torch.arange(length, device=tokens_bs.device).expand(batch, -1)
    # Where a mask is asked for, True forbids.
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens_bs.device).triu(1)[None, None]
    mask = None if isinstance(gpt.decoder.layers[0].self_attention.core_attention, FusedCoreAttention) else causal
    found: list[Tensor] = []

    def forward_step(_: Any, model: Any) -> Any:
        def keep(output: Tensor) -> tuple[Tensor, dict[str, Any]]:
            output = share.whole(output.transpose(0, 1)).transpose(0, 1)[:, :wanted]
            found.append(_whole_vocabulary(output, groups)[..., :vocab_size].contiguous())
            return output.new_zeros(()), {}

        own = (share.on_context_rank(values_bs, dim=1) for values_bs in (tokens_bs, positions))
        return model(*own, mask), keep

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([None]),
        model=[gpt],
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=batch,
        forward_only=True,
    )
    result = found[0] if found else torch.empty(batch, wanted, vocab_size, dtype=_dtype(gpt), device=groups.device)
    if groups.pp.size() > 1:
        dist.broadcast(result, group=groups.pp, group_src=groups.pp.size() - 1)
    return result


def _dtype(gpt: GPTModel) -> torch.dtype:
    return gpt.config.params_dtype


def _whole_vocabulary(logits_bsV: Tensor, groups: Groups) -> Tensor:
    if groups.tp.size() == 1:
        return logits_bsV
    parts = [torch.empty_like(logits_bsV) for _ in range(groups.tp.size())]
    dist.all_gather(parts, logits_bsV.contiguous(), group=groups.tp)
    return torch.cat(parts, dim=-1)


def greedy(gpt: GPTModel, tokens_bs: Tensor, groups: Groups, vocab_size: int, count: int) -> Tensor:
    """`count` tokens after each row, [b, count], the whole sequence being computed anew for each. Collective."""
    start = tokens_bs.shape[1]
    for _ in range(count):
        best_b1 = logits(gpt, tokens_bs, groups, vocab_size)[:, -1].argmax(-1, keepdim=True)
        tokens_bs = torch.cat([tokens_bs.to(best_b1.device), best_b1], dim=1)
    return tokens_bs[:, start:]

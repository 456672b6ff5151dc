"""The actor's decoding straight from its weights: what Megatron's modules compute, in fewer and larger operations.

A decoded token has little arithmetic, and most of its time through Megatron's modules goes into calls. `DirectDecoder` has no
module calls; queries and keys are normalised and turned together, as pairs of neighbours (their channels are put in that order
when the weights are taken, which no product of a query with a key sees); prompts end at the same place of the cache, so that new
keys and values go to one place in all rows; each token's expert outputs are gathered, weighted and added in one operation.

`supported` says for which actors it exists: on a CPU in float32, of Megatron's local specs with our modules, whole on this rank,
without biases, sinks, windows and shared experts. The others decode through their modules (`decoding.ModuleDecoder`).

Shape legend: P prompts, R sequences in the batch, S positions of the prompts without their last tokens, X tokens of a forward pass,
D hidden size, n query heads, g key/value heads, m query heads of one of these, h query and key heads, d head width, C
places of the cache, E experts, K of a token, Y = X * K rows sorted by expert, F an expert's inner width, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from megatron_vp2o.core.routes import pack_routes
from megatron_vp2o.megatron.model.attention import CachedSelfAttention, FusedCoreAttention
from megatron_vp2o.megatron.model.experts import GroupedSequentialMLP
from megatron_vp2o.megatron.model.moe_layer import VP2OMoELayer
from megatron_vp2o.megatron.model.norm import RMSNorm
from megatron_vp2o.megatron.model.router import ObservedRouter
from megatron_vp2o.parallel.groups import Groups

_LANES = 16
"""Attention looks at a multiple of so many places: torch's softmax over fewer than a vector register holds is five times slower."""


def supported(actor: GPTModel, groups: Groups) -> bool:
    """Whether `DirectDecoder` computes what this model does."""
    config: Any = actor.config
    whole = all(group.size() == 1 for group in (groups.tp, groups.pp, groups.ep, groups.etp))
    plain = (
        whole
        and groups.device.type == "cpu"
        and config.params_dtype is torch.float32
        and not (config.add_bias_linear or config.add_qkv_bias)
        and not getattr(config, "attention_output_gate", False)
        and config.moe_router_dtype in (None, "fp32")
        and not (config.moe_router_num_groups or config.moe_router_topk_scaling_factor)
        and config.moe_expert_capacity_factor is None
    )
    return plain and all(_known(layer) for layer in actor.decoder.layers)


def _known(layer: Any) -> bool:
    attention, moe = layer.self_attention, layer.mlp
    return (
        type(attention) is CachedSelfAttention
        and type(attention.core_attention) is FusedCoreAttention
        and type(attention.q_layernorm) in (RMSNorm, IdentityOp, type(None))
        and type(layer.input_layernorm) is RMSNorm
        and type(layer.pre_mlp_layernorm) is RMSNorm
        and type(moe) is VP2OMoELayer
        and type(moe.router) is ObservedRouter
        and type(moe.experts) is GroupedSequentialMLP
        and not moe.use_shared_expert
    )


@dataclass(frozen=True)
class _Layer:
    """The weights of a layer, products' transposed."""

    norm_D: Tensor
    qkv_DX: Tensor
    """Columns: query heads, key heads, value heads; channels of the first two in turned order, queries scaled by 1 / sqrt(d)."""
    heads_hd: Tensor | None
    """Weights of the norms of query and key heads."""
    proj_xD: Tensor
    moe_norm_D: Tensor
    router_DE: Tensor
    bias_E: Tensor | None
    fc1: list[Tensor]
    fc2: list[Tensor]


class DirectDecoder:
    """Implements `decoding.Decoder` for one batch, with the weights that the actor has when it is made.

    Args:
        actor: a model that is `supported`.
        rows: P.
        prefill: S.
        width: longest sequence.
        needs_routes: `routes` will be asked for, also of the prompts.
    """

    def __init__(self, actor: GPTModel, rows: int, prefill: int, width: int, *, needs_routes: bool) -> None:
        self._actor: Any = actor
        config = self._config = self._actor.config
        self._prefill, self._needs_routes = prefill, needs_routes
        self._width = width
        self._n, self._g, self._d = config.num_attention_heads, config.num_query_groups, config.kv_channels
        self._topk, self._experts = config.moe_router_topk, config.num_moe_experts
        self._eps = config.layernorm_epsilon
        # as GPTModel does: YaRN's comes with a factor, which attention takes from the configuration instead
        freqs = actor.rotary_pos_emb(width)
        freqs_T11d = freqs[0] if isinstance(freqs, tuple) else freqs
        angle_Td = freqs_T11d[:, 0, 0, : self._d // 2]  # of the first halves; Megatron repeats them
        scale = _yarn_get_concentration_factor_from_config(config)
        self._turn_Td = torch.polar(torch.full_like(angle_Td, scale), angle_Td)
        self._layers = [self._weights(layer) for layer in self._actor.decoder.layers]
        self._embedding_VD = self._actor.embedding.word_embeddings.weight.detach()
        shared = self._actor.share_embeddings_and_output_weights
        self._output_DV = (self._embedding_VD if shared else self._actor.output_layer.weight.detach()).t()
        self._final_norm_D = self._actor.decoder.final_layernorm.weight.detach()
        places = -(-width // _LANES) * _LANES
        self._cache: list[tuple[Tensor, Tensor]] = []
        self._mask_R11C = torch.full((rows, 1, 1, places), float("-inf"))
        self._places = places
        self._seen: list[tuple[Tensor, Tensor]] = []

    def _weights(self, layer: Any) -> _Layer:
        n, g, d = self._n, self._g, self._d
        attention, moe = layer.self_attention, layer.mlp
        # Megatron's rows: of each key/value head its query heads, the key, the value
        qkv = attention.linear_qkv.weight.detach().view(g, n // g + 2, d, -1)
        paired_d = torch.arange(d).view(2, -1).t().flatten()  # (i, i + d / 2) become neighbours
        query, key, value = qkv[:, :-2].flatten(0, 1), qkv[:, -2], qkv[:, -1]
        heads_hd = None
        if type(attention.q_layernorm) is RMSNorm:
            norms = [
                attention.q_layernorm.weight.detach() * d**-0.5 if head < n else attention.k_layernorm.weight.detach()
                for head in range(n + g)
            ]
            heads_hd = torch.stack(norms)[:, paired_d]
        else:
            query = query * d**-0.5
        rows = torch.cat([torch.cat([query, key]).index_select(1, paired_d), value])
        return _Layer(
            norm_D=layer.input_layernorm.weight.detach(),
            qkv_DX=rows.flatten(0, 1).t(),
            heads_hd=heads_hd,
            proj_xD=attention.linear_proj.weight.detach().t(),
            moe_norm_D=layer.pre_mlp_layernorm.weight.detach(),
            router_DE=moe.router.weight.detach().t(),
            bias_E=moe.router.expert_bias,
            fc1=[expert.linear_fc1.weight.detach().t() for expert in moe.experts.local_experts],
            fc2=[expert.linear_fc2.weight.detach().t() for expert in moe.experts.local_experts],
        )

    def prefill(self, tokens_PS: Tensor, length_P: Tensor) -> None:
        """See `decoding.Decoder`."""
        (prompts, s), device = tokens_PS.shape, tokens_PS.device
        first_P = s + 1 - length_P  # where each prompt begins when all end at the same place
        position_PS = torch.arange(s, device=device) - first_P[:, None]
        ended_PS = position_PS >= 0
        tokens_PS = tokens_PS.gather(1, position_PS.clamp(min=0))
        earlier_ss = torch.ones(s, s, dtype=torch.bool, device=device).tril_()
        itself_ss = torch.eye(s, dtype=torch.bool, device=device)  # so that no row of padding is empty
        allowed_P1ss = ((earlier_ss & ended_PS[:, None]) | itself_ss)[:, None]

        def attend(layer: int, query_Xnd: Tensor, key_Xgd: Tensor, value_Xgd: Tensor) -> Tensor:
            query, key, value = (x.unflatten(0, (prompts, s)).transpose(1, 2) for x in (query_Xnd, key_Xgd, value_Xgd))
            self._cache.append((key, value))
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=allowed_P1ss, scale=1.0, enable_gqa=self._n != self._g
            )
            return out.transpose(1, 2).reshape(prompts * s, -1)

        # What the last layer makes of the prompts is looked at for its routes only.
        self._forward(tokens_PS.flatten(), position_PS.clamp(min=0).flatten(), attend, to_the_end=self._needs_routes)
        self._mask_R11C[:, 0, 0, :s].masked_fill_(ended_PS, 0.0)
        if self._needs_routes:  # to where the prompts' tokens are for the caller
            back_PS = (torch.arange(s, device=device) + first_P[:, None]).clamp(max=s - 1)
            place_X = (torch.arange(prompts, device=device)[:, None] * s + back_PS).flatten()
            self._seen = [(index_XK[place_X], gate_XK[place_X]) for index_XK, gate_XK in self._seen]

    def select(self, rows_R: Tensor) -> None:
        """See `decoding.Decoder`."""
        self._cache = [(k.index_select(0, rows_R), v.index_select(0, rows_R)) for k, v in self._cache]
        self._mask_R11C = self._mask_R11C.index_select(0, rows_R)

    def begin(self, rows_R: Tensor) -> None:
        """See `decoding.Decoder`."""
        cache = []
        for _ in self._layers:
            shape = (len(rows_R), self._g, self._places, self._d)
            cache.append((torch.zeros(shape), torch.zeros(shape)))
        for pair, prompt in zip(cache, self._cache, strict=False):  # nothing is there of prompts of one token
            for all_R, of_P in zip(pair, prompt, strict=True):
                all_R[:, :, : self._prefill] = of_P[rows_R]
        self._cache = cache
        self._mask_R11C = self._mask_R11C.index_select(0, rows_R)

    def step(self, tokens_R: Tensor, position_R: Tensor, number: int, *, log: bool) -> Tensor:
        """See `decoding.Decoder`."""
        place = self._prefill + number
        self._mask_R11C[..., place] = 0.0
        end = -(-(place + 1) // _LANES) * _LANES
        rows, n, g, d = len(tokens_R), self._n, self._g, self._d
        mask_R11C = self._mask_R11C[..., :end]

        def attend(layer: int, query_Rnd: Tensor, key_Rgd: Tensor, value_Rgd: Tensor) -> Tensor:
            keys, values = self._cache[layer]
            keys[:, :, place], values[:, :, place] = key_Rgd, value_Rgd
            score_RgmC = query_Rnd.reshape(rows, g, n // g, d) @ keys[:, :, :end].transpose(2, 3)
            return (score_RgmC.add_(mask_R11C).softmax(-1) @ values[:, :, :end]).view(rows, n * d)

        hidden_RD = self._forward(tokens_R, position_R, attend)
        return torch.mm(self._norm(hidden_RD, self._final_norm_D), self._output_DV)

    def routes(self) -> Tensor:
        """See `decoding.Decoder`."""
        return pack_routes(torch.stack([index_XK for index_XK, _ in self._seen], dim=1), self._experts)

    def gates(self) -> list[Tensor]:
        """See `decoding.Decoder`."""
        return [
            gate_XK.new_zeros(len(gate_XK), self._experts).scatter_(1, index_XK, gate_XK)
            for index_XK, gate_XK in self._seen
        ]

    def _norm(self, x_XD: Tensor, weight_D: Tensor) -> Tensor:
        scale = torch.linalg.vector_norm(x_XD, dim=-1, keepdim=True)
        return (x_XD * scale.square_().div_(x_XD.shape[-1]).add_(self._eps).rsqrt_()).mul_(weight_D)

    def _forward(
        self,
        tokens_X: Tensor,
        position_X: Tensor,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        *,
        to_the_end: bool = True,
    ) -> Tensor:
        """The residual stream after the last layer, [X, D]. `attend` gets a layer's number, queries, keys and values [X, heads, d]
        and returns [X, n * d]; without `to_the_end`, its call for the last layer is the last thing that happens."""
        n, g, d = self._n, self._g, self._d
        turned = (n + g) * d
        turn_X1d = self._turn_Td[position_X][:, None]
        x_XD = self._embedding_VD.index_select(0, tokens_X)
        self._seen = []
        for number, layer in enumerate(self._layers):
            qkv_Xx = torch.mm(self._norm(x_XD, layer.norm_D), layer.qkv_DX)
            heads_Xhd = qkv_Xx[:, :turned].view(-1, n + g, d)
            heads_Xhd = heads_Xhd.contiguous() if layer.heads_hd is None else self._norm(heads_Xhd, layer.heads_hd)
            pairs = torch.view_as_complex(heads_Xhd.view(-1, n + g, d // 2, 2))
            heads_Xhd = torch.view_as_real(pairs * turn_X1d).view(-1, n + g, d)
            out_Xx = attend(number, heads_Xhd[:, :n], heads_Xhd[:, n:], qkv_Xx[:, turned:].view(-1, g, d))
            if number == len(self._layers) - 1 and not to_the_end:
                break
            x_XD.addmm_(out_Xx, layer.proj_xD)
            x_XD += self._experts_of(self._norm(x_XD, layer.moe_norm_D), layer)
        return x_XD

    def _experts_of(self, x_XD: Tensor, layer: _Layer) -> Tensor:
        """Sum over each token's experts of their outputs times gates, [X, D]."""
        index_XK, gate_XK = self._route(torch.mm(x_XD, layer.router_DE), layer.bias_E)
        self._seen.append((index_XK, gate_XK))
        expert_Y = index_XK.flatten()
        sizes = expert_Y.bincount(minlength=self._experts).tolist()
        order_Y = expert_Y.argsort(stable=True)
        x_YD = x_XD.index_select(0, order_Y // self._topk)
        inner_Y2F = x_YD.new_empty(len(order_Y), layer.fc1[0].shape[1])
        for x_yD, inner_y2F, weight_D2F in zip(x_YD.split(sizes), inner_Y2F.split(sizes), layer.fc1, strict=True):
            torch.mm(x_yD, weight_D2F, out=inner_y2F)
        gate_YF, up_YF = inner_Y2F.chunk(2, dim=-1)
        act_YF = F.silu(gate_YF).mul_(up_YF)
        for act_yF, out_yD, weight_FD in zip(act_YF.split(sizes), x_YD.split(sizes), layer.fc2, strict=True):
            torch.mm(act_yF, weight_FD, out=out_yD)
        row_Y = torch.empty_like(order_Y)
        row_Y[order_Y] = torch.arange(len(order_Y))
        return F.embedding_bag(row_Y.view_as(index_XK), x_YD, mode="sum", per_sample_weights=gate_XK)

    def _route(self, logits_XE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Experts and gates of each token, [X, K], as Megatron's topk_routing_with_score_function has them."""
        if self._config.moe_router_score_function == "softmax":
            if self._config.moe_router_pre_softmax:
                gate_XK, index_XK = logits_XE.softmax(-1).topk(self._topk, dim=1)
                return index_XK, gate_XK
            logit_XK, index_XK = logits_XE.topk(self._topk, dim=1)
            return index_XK, logit_XK.softmax(-1)
        score_XE = logits_XE.sigmoid()
        index_XK = (score_XE if bias_E is None else score_XE + bias_E).topk(self._topk, dim=1)[1]
        score_XK = score_XE.gather(1, index_XK)
        return index_XK, score_XK / (score_XK.sum(-1, keepdim=True) + 1e-20) if self._topk > 1 else score_XK

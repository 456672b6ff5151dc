"""Attention for Megatron's GPTModel: torch's fused kernel in place of the local spec's unfused one, and a KV cache for decoding.

Under context parallelism (`parallel.context`) a rank has some of each sequence's positions: it gathers the keys and values of all,
and its queries look at those that are not later than they.

Shape legend (Megatron's own letters): s query positions, t key positions, b sequences, n query heads, g key/value heads,
d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vp2o.megatron.model.packed import PackedRows
from megatron_vp2o.megatron.model.shared_prefix import SharedRows
from megatron_vp2o.parallel.context import deal_one


class FusedCoreAttention(MegatronModule):
    """Scaled-dot-product attention through `torch.nn.functional.scaled_dot_product_attention`.

    Stands where the local spec has DotProductAttention (megatron/core/transformer/dot_product_attention.py), which
    materialises the scores. Takes either no mask (causal) or a boolean one [b or 1, 1, s, t], True where attention is
    forbidden, as Megatron writes masks.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.context: Any = pg_collection.cp if config.context_parallel_size > 1 else None
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query_sbnd: Tensor,
        key_tbgd: Tensor,
        value_tbgd: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Returns [s, b, n * d]. Raises ValueError for a bias, and for packed_seq_params that are no `PackedRows`."""
        dropout = self.dropout if self.training else 0.0
        grouped = query_sbnd.shape[2] != key_tbgd.shape[2]
        if isinstance(packed_seq_params, PackedRows):
            return packed_seq_params.attend(
                query_sbnd,
                key_tbgd,
                value_tbgd,
                self.context,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=grouped,
            )
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("FusedCoreAttention takes no attention_bias, and of packed_seq_params PackedRows only.")
        settings: dict[str, Any] = {"dropout_p": dropout, "scale": self.softmax_scale, "enable_gqa": grouped}
        query_bnsd, allowed = query_sbnd.permute(1, 2, 0, 3), None if attention_mask is None else ~attention_mask
        if self.context is not None:
            both = self._whole(torch.cat([key_tbgd, value_tbgd], dim=-1))
            out_bnsd = self._attend_dealt(query_bnsd, both.permute(1, 2, 0, 3), allowed, settings)
        else:
            key_bgtd, value_bgtd = key_tbgd.permute(1, 2, 0, 3), value_tbgd.permute(1, 2, 0, 3)
            out_bnsd = F.scaled_dot_product_attention(
                query_bnsd, key_bgtd, value_bgtd, attn_mask=allowed, is_causal=allowed is None, **settings
            )
        return out_bnsd.permute(2, 0, 1, 3).flatten(2)

    def _whole(self, own: Tensor) -> Tensor:
        ranks = self.context.size()
        return deal_one(len(own) * ranks, ranks, own.device).whole(own, self.context)

    def _attend_dealt(
        self, query_bnsd: Tensor, both_bgt2d: Tensor, allowed: Tensor | None, settings: dict[str, Any]
    ) -> Tensor:
        """This rank's queries with keys and values (side by side) of all positions; `allowed` has a row for each own query."""
        if allowed is not None:
            key, value = both_bgt2d.chunk(2, dim=-1)
            return F.scaled_dot_product_attention(query_bnsd, key, value, attn_mask=allowed, **settings)
        rank, ranks = self.context.rank(), self.context.size()
        length = both_bgt2d.shape[2] // (2 * ranks)
        outputs = []
        for chunk, query in zip((rank, 2 * ranks - 1 - rank), query_bnsd.chunk(2, dim=2), strict=True):
            end = (chunk + 1) * length  # what comes after the chunk is seen by none of its queries
            key, value = both_bgt2d[:, :, :end].chunk(2, dim=-1)
            seen_st = torch.ones(length, end, dtype=torch.bool, device=query.device).tril_(end - length)
            outputs.append(F.scaled_dot_product_attention(query, key, value, attn_mask=seen_st, **settings))
        return torch.cat(outputs, dim=2)


class KVCache(StaticInferenceContext):
    """Keys (already rotated) and values of one batch, each row at its own length.

    It is Megatron's static inference context to GPTModel; `CachedSelfAttention` reads and writes it.  Before every
    forward `start` says where each row's new tokens go.
    """

    def __init__(self, batch_size: int, max_length: int) -> None:
        super().__init__(batch_size, max_length)
        self.max_length = max_length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._rope: tuple[Tensor, Tensor] | None = None
        self._window: tuple[int, Tensor] | None = None
        self._rows_B: Tensor | None = None

    def start(self, position_BS: Tensor, end: int, *, prefill: bool) -> None:
        """Announce the coming forward pass.

        Args:
            position_BS: absolute positions of its tokens, [B, S].
            end: one more than the largest of them (given, not read off the tensor: that would stall the device).
            prefill: all rows start at 0 with an empty cache.
        """
        self._position_BS = position_BS
        self._end = end
        self._prefill = prefill
        self._window = None
        self._rope_at: tuple[Tensor, Tensor] | None = None
        if not self._prefill:
            key_T = torch.arange(self._end, device=position_BS.device)
            self._mask_B1ST = (key_T <= position_BS[..., None])[:, None]
            self._rows_B = torch.arange(position_BS.shape[0], device=position_BS.device)[:, None]

    def rotary(self, freqs_T11d: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """cos and sin at the coming positions times `scale` (YaRN's), [B, 1, S, d / 2], computed once per forward."""
        if self._rope is None:
            half = freqs_T11d[:, 0, 0, : freqs_T11d.shape[-1] // 2]  # Megatron repeats it for the second halves
            self._rope = (half.cos() * scale, half.sin() * scale) if scale != 1.0 else (half.cos(), half.sin())
        if self._rope_at is None:
            cos, sin = self._rope
            self._rope_at = cos[self._position_BS][:, None], sin[self._position_BS][:, None]
        return self._rope_at

    def append(self, layer: int, key_BGSd: Tensor, value_BGSd: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store new keys and values; returns all keys, all values and the mask (None: plain causal)."""
        if layer not in self.layers:
            rows, heads, _, width = key_BGSd.shape
            shape = (rows, heads, self.max_length, width)
            self.layers[layer] = (key_BGSd.new_zeros(shape), value_BGSd.new_zeros(shape))
        keys, values = self.layers[layer]
        if self._prefill:
            keys[:, :, : self._end] = key_BGSd
            values[:, :, : self._end] = value_BGSd
            return key_BGSd, value_BGSd, None
        keys[self._rows_B, :, self._position_BS] = key_BGSd.transpose(1, 2)
        values[self._rows_B, :, self._position_BS] = value_BGSd.transpose(1, 2)
        return keys[:, :, : self._end], values[:, :, : self._end], self._mask_B1ST

    def within(self, before: int) -> Tensor:
        """The mask of a sliding window, [B, 1, S, T]: each position sees itself and `before` ones before it."""
        if self._window is None or self._window[0] != before:
            key_T = torch.arange(self._end, device=self._position_BS.device)
            back_B1ST = (self._position_BS[..., None] - key_T)[:, None]
            self._window = before, (back_B1ST >= 0) & (back_B1ST <= before)
        return self._window[1]

    def select(self, rows: Tensor) -> None:
        """Keep (and repeat) rows, in the order given. Shape [new batch]."""
        self.layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.layers.items()}
        self.max_batch_size = len(rows)


class _Rotary(torch.autograd.Function):
    """Rotary embedding, halves convention: Megatron's (models/common/embeddings/rope_utils.py) without its concatenations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of the last dimension. cos, sin: half as wide, broadcast against x."""
    out = torch.empty_like(x)
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    out[..., 2 * half :] = x[..., 2 * half :]  # a partial rotary width leaves the rest alone
    return out


class CachedSelfAttention(SelfAttention):
    """Megatron's SelfAttention with `KVCache` for decoding and, with FusedCoreAttention, a leaner path for training.

    Megatron's static cache keeps all rows of a batch at one length and rotates all keys again at every token; here rows
    have their own lengths and keys are rotated once.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """[s, b, h] -> ([s, b, h], bias), as in the base class."""
        cache, packed = kwargs.get("inference_context"), kwargs.get("packed_seq_params")
        ours = isinstance(self.core_attention, FusedCoreAttention) and not self.checkpoint_core_attention
        known = packed is None or isinstance(packed, PackedRows)
        if isinstance(packed, SharedRows) and not ours:
            raise ValueError(
                "prefixes are shared (algorithm.prefix_sharing), and only FusedCoreAttention knows how to attend to them"
            )
        if not isinstance(cache, KVCache) and not (ours and cache is None and known):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        freqs = kwargs["rotary_pos_emb"]
        freqs_T11d = freqs[0] if isinstance(freqs, tuple) else freqs
        scale = _yarn_get_concentration_factor_from_config(self.config)  # 1 but for YaRN
        if isinstance(cache, KVCache):
            cos, sin = cache.rotary(freqs_T11d, scale)
            query_BNSd = _turn(query.permute(1, 2, 0, 3), cos.to(query.dtype), sin.to(query.dtype))
            key_BGSd = _turn(key.permute(1, 2, 0, 3), cos.to(key.dtype), sin.to(key.dtype))
            keys, values, mask = cache.append(self.layer_number, key_BGSd, value.permute(1, 2, 0, 3))
            window = self.config.window_size
            if window and is_layer_window_attention(window, self.config.window_attn_skip_freq, self.layer_number):
                mask = cache.within(window[0])
            out = _attend(query_BNSd, keys, values, mask, getattr(self.core_attention, "softmax_offset", None))
        else:
            if packed is None:
                half = self._own_positions(freqs_T11d[..., : freqs_T11d.shape[-1] // 2])
                cos, sin = (half.cos() * scale).to(query.dtype), (half.sin() * scale).to(query.dtype)
            else:
                cos, sin = packed.rotary(freqs_T11d, query.dtype, scale)
            query, key = _Rotary.apply(query, cos, sin), _Rotary.apply(key, cos, sin)
            out = self.core_attention(query, key, value, attention_mask, packed_seq_params=packed)
        return self.linear_proj(out)

    def _own_positions(self, values_T: Tensor) -> Tensor:
        context = self.core_attention.context
        if context is None:
            return values_T
        return deal_one(len(values_T), context.size(), values_T.device).own(values_T, context.rank())


def _attend(
    query_bnsd: Tensor, key_bgtd: Tensor, value_bgtd: Tensor, allowed: Tensor | None, sink_n: Tensor | None = None
) -> Tensor:
    """Attention over what `allowed` marks (None: causal), each head with a sink if there are any. Returns [s, b, n * d]."""
    if sink_n is not None:
        return _attend_with_sinks(query_bnsd, key_bgtd, value_bgtd, allowed, sink_n)
    if query_bnsd.shape[2] == 1 and allowed is not None:
        return _attend_from_one(query_bnsd, key_bgtd, value_bgtd, allowed)
    out_bnsd = F.scaled_dot_product_attention(
        query_bnsd,
        key_bgtd,
        value_bgtd,
        attn_mask=allowed,
        is_causal=allowed is None,
        enable_gqa=query_bnsd.shape[1] != key_bgtd.shape[1],
    )
    return out_bnsd.permute(2, 0, 1, 3).flatten(2)


def _attend_from_one(query_bn1d: Tensor, key_bgtd: Tensor, value_bgtd: Tensor, allowed_b11t: Tensor) -> Tensor:
    """One query position a row: two batched products. [1, b, n * d].

    They take less than torch's fused kernel on the CPU. On CUDA, torch gives a mask with grouped heads to cuDNN, which plans
    anew for each number of keys: 16 ms a layer and token on an H200.
    """
    b, n, _, d = query_bn1d.shape
    g = key_bgtd.shape[1]
    scores_bght = query_bn1d.reshape(b, g, n // g, d) @ key_bgtd.transpose(2, 3)  # h: the heads of a group
    scores_bght = scores_bght.mul_(d**-0.5).masked_fill_(~allowed_b11t, float("-inf"))
    shares_bght = scores_bght.softmax(dim=-1, dtype=torch.float32).to(value_bgtd.dtype)
    return (shares_bght @ value_bgtd).reshape(1, b, n * d)


def _attend_with_sinks(
    query_bnsd: Tensor, key_bgtd: Tensor, value_bgtd: Tensor, allowed: Tensor | None, sink_n: Tensor
) -> Tensor:
    """The softmax of each head has one more logit, which takes its share and gives nothing (gpt-oss). Float32 inside."""
    (b, n, s, d), (_, g, t, _) = query_bnsd.shape, key_bgtd.shape
    query_bgsd = query_bnsd.reshape(b, g, n // g * s, d)  # the heads of a group side by side
    scores_bnst = (query_bgsd @ key_bgtd.transpose(2, 3)).view(b, n, s, t).float() * d**-0.5
    if allowed is None:
        allowed = torch.ones(s, t, dtype=torch.bool, device=query_bnsd.device).tril_()
    scores_bnst = scores_bnst.masked_fill(~allowed, float("-inf"))
    sinks_bns1 = sink_n.float().view(1, n, 1, 1).expand(b, n, s, 1)
    shares_bnst = torch.cat([scores_bnst, sinks_bns1], dim=-1).softmax(dim=-1)[..., :-1].to(value_bgtd.dtype)
    out_bnsd = (shares_bnst.reshape(b, g, n // g * s, t) @ value_bgtd).view(b, n, s, d)
    return out_bnsd.permute(2, 0, 1, 3).flatten(2)

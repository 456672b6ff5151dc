"""Which of a step's tokens the trust region compares gates at, and keeping the routers' inputs there.

A context is a position from which a response token was predicted.

Shape legend: N sequences of a micro-batch, S padded sequence length, C contexts of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vp2o.megatron.model.moe_layer import VP2OMoELayer
from megatron_vp2o.megatron.model.packed import PackedRows
from megatron_vp2o.megatron.model.token_share import TokenShare
from megatron_vp2o.rl.types import TrainBatch


class ContextSampler:
    """Lets MoE layers keep their routers' inputs at some contexts of each step. A `learner.policy.MicroBatchWatcher`, which works
    on the CPU: how many contexts a micro-batch has hangs on its values.

    Args:
        layers: of this rank's pipeline stage.
        per_rank: bound of the contexts that a rank keeps of a step.
        share: which of a micro-batch's tokens the layers see.
    """

    def __init__(self, layers: Sequence[VP2OMoELayer], per_rank: int, share: TokenShare) -> None:
        self.layers, self.per_rank, self.share = layers, per_rank, share
        self.stride = 1
        """The actor logged its gates at every `stride`-th response token; contexts are chosen among these."""
        self._keys: list[Tensor] = []
        self._ranks: list[Tensor] = []
        self._share = per_rank

    def begin_step(self, micro_batches: int) -> None:
        """Forget the last step's contexts."""
        self.drop()
        self._keys, self._ranks = [], []
        self._share = max(1, self.per_rank // micro_batches)

    def before_forward(self, part: TrainBatch, packed: PackedRows | None = None) -> None:
        """Tell the layers which positions of a micro-batch to keep: evenly spread over its contexts."""
        context_NS = part.loss_mask_NS.roll(-1, dims=1)
        # how many response tokens came before the one that is predicted here
        before_NS = torch.arange(context_NS.shape[1], device=context_NS.device) - context_NS.int().argmax(1)[:, None]
        context_NS = context_NS & (before_NS % self.stride == 0)
        if packed is None:  # hidden states lie position by position
            token_SN = torch.arange(context_NS.numel(), device=context_NS.device).view(context_NS.shape[::-1])
            place_NS, tokens = token_SN.t(), token_SN
        else:
            place_NS = packed.places()
            context_NS = context_NS & packed.inside()
            tokens = torch.arange(len(packed.position_T), device=context_NS.device)
        own = self.share.own(tokens, packed).flatten()
        local = torch.full((tokens.numel(),), -1, device=tokens.device).index_copy_(
            0, own, torch.arange(len(own), device=own.device)
        )
        row_C, position_C = context_NS.nonzero().unbind(1)
        local_C = local[place_NS[row_C, position_C]]
        order_C = local_C.argsort(stable=True)  # a token that several rows share is a context of each
        order_C = order_C[local_C[order_C] >= 0]
        order_C = order_C[:: max(1, -(-len(order_C) // self._share))]
        kept_C, row_C = local_C[order_C], row_C[order_C]
        before_C = before_NS[row_C, position_C[order_C]]
        rows_N = part.gate_row_N if part.gate_row_N is not None else torch.full_like(part.length_N, -1)
        self._keys.append(torch.stack([rows_N[row_C], before_C], dim=1))
        if part.gate_rank_N is not None:
            self._ranks.append(part.gate_rank_N[row_C])
        for layer in self.layers:
            layer.context_index = kept_C

    def keys(self) -> Tensor | None:
        """[C, 2] of the step's contexts: number of the logged sequence (-1: unknown), response tokens before the context."""
        return torch.cat(self._keys) if self._keys else None

    def ranks(self) -> Tensor | None:
        """[C], the data-parallel rank that has each context's logged sequence; None where it is this one for all."""
        return torch.cat(self._ranks) if self._ranks else None

    def drop(self) -> None:
        """Free the inputs that the layers have kept."""
        for layer in self.layers:
            layer.drop_contexts()

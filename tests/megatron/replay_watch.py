"""What routers of a policy really did with a batch's routes, seen from outside: forward hooks, and the batch itself."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.model.moe_layer import moe_layers
from megatron_vp2o.megatron.model.packed import PackedRows
from megatron_vp2o.rl.types import TrainBatch


class ReplayWatch:
    """Compares, in training, each token's experts with those that its micro-batch asked for (8-bit routes).

    Attributes:
        compared: tokens, by layer and pass, that had a route.
        wrong: those of them that went to other experts.
        free: tokens that had none.
        counts_EE: of the first layer, tokens that went to both experts, of valid tokens in passes with gradients.
    """

    def __init__(self, policy: MegatronPolicy) -> None:
        self.policy, self.inner = policy, policy.watcher
        policy.watcher = self
        self.part: TrainBatch | None = None
        self.packed: PackedRows | None = None
        self.compared = self.wrong = self.free = 0
        config = policy.model.config
        self.group = policy.groups.tp if config.sequence_parallel else None
        self.context = policy.groups.cp
        self.counts_EE = torch.zeros(config.num_moe_experts, config.num_moe_experts, dtype=torch.float64)
        self.hooks = [
            layer.router.register_forward_hook(lambda module, _, out, i=i: self.see(i, module, out[1]))
            for i, layer in enumerate(moe_layers(policy.ddp))
        ]

    def begin_step(self, micro_batches: int) -> None:
        if self.inner is not None:
            self.inner.begin_step(micro_batches)

    def before_forward(self, part: TrainBatch, packed: PackedRows | None) -> None:
        self.part, self.packed = part, packed
        if self.inner is not None:
            self.inner.before_forward(part, packed)

    def see(self, layer: int, router: Any, map_TE: Tensor) -> None:
        """One forward pass of a router. Recomputation may come when another micro-batch is here, under pipeline parallelism."""
        again = router.config.recompute_granularity is not None and torch.is_grad_enabled()
        if not router.training or (again and self.policy.groups.pp.size() > 1):
            return
        assert self.part is not None and self.part.routes_NSLK is not None
        routes_NSK = self.part.routes_NSLK[:, :, layer].long()
        valid_NS = torch.arange(routes_NSK.shape[1]) < self.part.length_N[:, None]
        if self.packed is None:
            routes_SNK, valid_SN = routes_NSK.transpose(0, 1), valid_NS.t()
        else:
            routes_SNK, valid_SN = self.packed.pack(routes_NSK, 255)[:, None], self.packed.pack(valid_NS)[:, None]
        ranks = self.context.size()
        if ranks > 1:
            mine = self._own_positions(len(routes_SNK), 2 * ranks)
            routes_SNK, valid_SN = routes_SNK[mine], valid_SN[mine]
        if self.group is not None:
            routes_SNK, valid_SN = (
                whole.chunk(self.group.size(), dim=0)[self.group.rank()] for whole in (routes_SNK, valid_SN)
            )
        routes_TK, valid_T = routes_SNK.flatten(0, 1), valid_SN.flatten()
        routed_T = (routes_TK != 255).all(dim=1)
        wanted_TE = torch.zeros_like(map_TE)
        wanted_TE[routed_T] = torch.zeros_like(map_TE[routed_T]).scatter(1, routes_TK[routed_T], True)
        self.compared += int(routed_T.sum())
        self.wrong += int((wanted_TE != map_TE)[routed_T].any(dim=1).sum())
        self.free += int((valid_T & ~routed_T).sum())
        if layer == 0 and torch.is_grad_enabled():
            own = map_TE[valid_T].double()
            self.counts_EE += own.t() @ own

    def _own_positions(self, width: int, chunks: int) -> list[int]:
        """This context-parallel rank's: of each sequence, one chunk from the front and its counterpart from the back."""
        packed, rank = self.packed, self.context.rank()
        starts = [0, width] if packed is None else packed.cu_seqlens_q.tolist()
        found: list[int] = []
        for start, end in itertools.pairwise(starts):
            length = (end - start) // chunks
            for chunk in (rank, chunks - 1 - rank):
                found += range(start + chunk * length, start + (chunk + 1) * length)
        return found

    def stop(self) -> None:
        """Take the hooks away."""
        self.policy.watcher = self.inner
        for hook in self.hooks:
            hook.remove()

"""Routes recorded in one forward pass and replayed in others, through megatron-core's `RouterReplay` (moe/router_replay.py).

Megatron's class replays a whole micro-batch, is switched by globals of the process, and needs to be told when a backward pass
recomputes. `LayerReplay` is one of a model's own, lets tokens without a route choose, and tells recomputation by itself. Scores are
gathered from the router's dense logits as ever, so that gradients reach the router.

Shape legend: T tokens of a micro-batch on this rank, N rows of it, S positions, L MoE layers of this pipeline stage, M those of the
whole model, K experts of a token, C contexts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from megatron_vp2o.core.deferred import Deferred
from megatron_vp2o.core.routes import pack_routes, same_experts, sentinel, unpack_routes
from megatron_vp2o.errors import RolloutError
from megatron_vp2o.megatron.model.moe_layer import VP2OMoELayer
from megatron_vp2o.megatron.model.packed import PackedRows
from megatron_vp2o.megatron.model.token_share import TokenShare
from megatron_vp2o.rl.types import TrainBatch


class LayerReplay(RouterReplay):
    """The routes of one router. Stands in its `router_replay`.

    Args:
        layer: of the router.
    """

    def __init__(self, layer: VP2OMoELayer) -> None:
        super().__init__()
        # Whoever switches all instances of the process does not mean this one.
        RouterReplay.global_router_replay_instances.remove(self)
        self._router: Any = layer.router
        self.recorded: deque[Tensor] = deque()
        """[T, K] of each forward pass recorded, the oldest first."""
        self.coming_TK: Tensor | None = None
        """What the next forward pass replays, FREE where a token may choose."""
        self._to_come_again: deque[Tensor] = deque()
        self.sums = torch.zeros(3, dtype=torch.float64, device=layer.router.weight.device)
        """Experts replayed that the router would have chosen itself, all experts replayed, and tokens replayed."""

    def record_indices(self, topk_indices: Tensor) -> None:
        """See the base class, which keeps the last forward pass only."""
        self.recorded.append(topk_indices)

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        if self.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            assert default_compute_topk is not None
            own_TK = default_compute_topk(scores.detach(), topk, num_groups, group_topk)[1]
            self.target_topk_idx = self._targets(own_TK)
        return super().get_replay_topk(scores, topk, num_groups, group_topk, default_compute_topk)

    def _targets(self, own_TK: Tensor) -> Tensor:
        """The experts of this pass's tokens, [T, K], given those that the router would choose."""
        recomputes = self._router.training and self._router.config.recompute_granularity is not None
        if recomputes and torch.is_grad_enabled():
            # Backward passes, and with them recomputation, come in the order of the forward passes, under any schedule.
            routes_TK = self._to_come_again.popleft()
        else:
            assert self.coming_TK is not None
            routes_TK = self.coming_TK
            if recomputes:
                self._to_come_again.append(routes_TK)
            self._count(routes_TK, own_TK)
        return torch.where(routes_TK < 0, own_TK, routes_TK)

    def _count(self, routes_TK: Tensor, own_TK: Tensor) -> None:
        replayed_T, same_T = routes_TK[:, 0] >= 0, same_experts(routes_TK, own_TK)
        packed = getattr(self._router, "packed", None)
        if packed is not None and packed.weight_T is not None:  # a token counts for each row that has it
            replayed_T, same_T = replayed_T * packed.weight_T, same_T * packed.weight_T
        replayed = replayed_T.sum()
        self.sums += torch.stack([same_T.sum(), replayed * own_TK.shape[1], replayed])

    def replay(self, routes_TK: Tensor | None) -> None:
        """Let the next forward pass go by these routes; None: let all coming ones be free."""
        self.coming_TK = routes_TK
        self.router_replay_action = None if routes_TK is None else RouterReplayAction.REPLAY_FORWARD
        if routes_TK is None:
            self._to_come_again.clear()


class ModelReplay:
    """The routes of all MoE layers of this rank's pipeline stage.

    Args:
        layers: of the stage, in order.
        share: which of a micro-batch's tokens the layers see.
    """

    def __init__(self, layers: Sequence[VP2OMoELayer], share: TokenShare | None = None) -> None:
        self.layers, self.share = layers, share or TokenShare()
        self.parts: list[LayerReplay] = []
        for layer in layers:
            part = LayerReplay(layer)
            layer.replay_with(part)
            self.parts.append(part)
        config = layers[0].config
        self.experts, self.topk = int(config.num_moe_experts), int(config.moe_router_topk)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the routes of the forward passes inside, for `take`."""
        for part in self.parts:
            part.router_replay_action = RouterReplayAction.RECORD
        try:
            yield
        finally:
            for part in self.parts:
                part.router_replay_action = None

    def take(self) -> Tensor:
        """The routes of the oldest forward pass that was recorded and not taken, [T, L, K] packed."""
        return pack_routes(torch.stack([part.recorded.popleft() for part in self.parts], dim=1), self.experts)

    def before_forward(self, part: TrainBatch, packed: PackedRows | None = None) -> None:
        """Replay what a micro-batch brings along in the forward pass that follows, and in its recomputation.

        Raises:
            RolloutError: the routes are those of another model or layout.
        """
        packed_NSLK = part.routes_NSLK
        assert packed_NSLK is not None
        if packed_NSLK.shape[2:] != (len(self.layers), self.topk):
            raise RolloutError(
                f"the rollouts have routes of {packed_NSLK.shape[2]} layers with {packed_NSLK.shape[3]} experts a token, and this "
                f"rank has {len(self.layers)} layers with {self.topk}: replay rollouts of this model, generated under this layout"
            )
        if packed is None:
            packed_SNLK = packed_NSLK.transpose(0, 1)
        else:
            packed_SNLK = packed.pack(packed_NSLK, sentinel(packed_NSLK.dtype))[:, None]
        packed_SNLK = self.share.own(packed_SNLK, packed)
        routes_LTK = unpack_routes(packed_SNLK.flatten(0, 1).transpose(0, 1).contiguous())
        for replay, routes_TK in zip(self.parts, routes_LTK.unbind(), strict=True):
            replay.replay(routes_TK)

    def begin_step(self) -> None:
        """Count from here."""
        for part in self.parts:
            part.sums.zero_()

    def stop(self) -> None:
        """Let the forward passes that follow be free."""
        for part in self.parts:
            part.replay(None)

    def metrics(self, layers: int, valid: float, groups: Any) -> Deferred[dict[str, float]]:
        """What was replayed since `begin_step`, equal on all ranks. Collective over all ranks of the model.

        Args:
            layers: MoE layers of the whole model.
            valid: tokens of this data-parallel rank's rows that are no padding.
            groups: of the run.
        """
        sums_M3 = torch.zeros(layers, 3, dtype=torch.float64, device=groups.device)
        for layer, part in zip(self.layers, self.parts, strict=True):
            sums_M3[layer.layer_number - 1] = part.sums
        if self.share.sequence is None:
            sums_M3 /= groups.tp.size()  # each rank of the group counted all of them
        if self.share.context is None:
            sums_M3 /= groups.cp.size()
        # all ranks of a replica know its tokens
        tokens = torch.tensor(
            [[valid / (groups.tp.size() * groups.pp.size() * groups.cp.size()), 0.0, 0.0]], dtype=torch.float64
        )
        tokens = tokens.to(groups.device, non_blocking=True)
        total_M3 = torch.cat([sums_M3, tokens])
        dist.all_reduce(total_M3, group=groups.world)

        def finish(on_host: list[Tensor]) -> dict[str, float]:
            *by_layer, (tokens_all, _, _) = on_host[0].tolist()
            replayed = by_layer[0][2]
            found = {"replay/tokens": replayed / tokens_all} if tokens_all else {}
            if replayed:
                shares = [agreed / experts for agreed, experts, _ in by_layer]
                found |= {"replay/agreement": sum(shares) / layers, "replay/agreement_layer_min": min(shares)}
            return found

        return Deferred((total_M3,), finish)

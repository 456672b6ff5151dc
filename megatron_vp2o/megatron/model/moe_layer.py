"""Megatron's MoE layer, observed: routing statistics, specialisation losses, and our dispatcher in it.

Nothing is computed before somebody asks: `VP2OMoELayer.observe` turns statistics on, `specialise` the losses.

Shape legend: T tokens of a micro-batch on this rank, E experts, K top-k, D hidden size, R = T * K permuted rows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatron_vp2o.config.schema import SpecializationConfig
from megatron_vp2o.core.diagnostics import output_overlap
from megatron_vp2o.core.specialization import gated_orthogonality_loss, variance_loss
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.megatron.model.experts import GroupedSequentialMLP
from megatron_vp2o.megatron.model.orthogonality_weight import OrthogonalityWeight
from megatron_vp2o.megatron.model.router import ObservedRouter, PackedTokens, StepTokens
from megatron_vp2o.megatron.model.routing_statistics import RoutingStatistics

OVERLAP_TOKENS = 256
"""Tokens of a micro-batch whose expert outputs are compared for the overlap metric."""
_TINY = 1e-6


class LeanAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """The all-to-all dispatcher, without its second permutation where that is the identity, and without its last gates.

    With one rank in the expert group, tokens leave the first permutation sorted by expert. The base class still cuts them
    into one chunk an expert and concatenates these in the same order (token_dispatcher.py, sort_chunks_by_idxs), four full
    copies a layer and step: a tenth of the tiny model's training step on a CPU.
    """

    experts: Any = None
    """The layer's, whose grouped products take their numbers of tokens from the device."""

    def _sorted_already(self) -> bool:
        return self.tp_size * self.ep_size == 1 and not self.drop_and_pad and self.shared_experts is None

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Any = None) -> Any:
        """See the base class. Where nobody asks on the host how many tokens an expert gets, the host need not wait for it."""
        if (
            self._sorted_already()
            and isinstance(self.num_out_tokens, int)  # a capacity makes it a value of the device
            and isinstance(self.experts, GroupedSequentialMLP)
            and self.experts.uses_grouped_products(self.probs.device)  # type: ignore[union-attr]
        ):
            return tokens_per_expert
        return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """See the base class."""
        if not self._sorted_already():
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        counts: Tensor | None = self.tokens_per_expert
        for point in ("before_permutation_2", "before_finish"):
            counts = self._maybe_dtoh_and_synchronize(point, counts)
        self.tokens_per_expert: Tensor | None = None
        return global_input_tokens, counts, global_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """See the base class."""
        return hidden_states if self._sorted_already() else super().combine_preprocess(hidden_states)

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """See the base class."""
        combined = super().combine_postprocess(permutated_local_input_tokens)
        # self.probs keeps the autograd graph alive, and the graph keeps this module alive. Python cannot collect such a cycle:
        # a model that is dropped would stay in memory, with its process groups and their threads.
        self.probs: Tensor | None = None
        return combined


@dataclass
class _Routed:
    """What `route` leaves for `postprocess` of the same micro-batch."""

    probs_TE: Tensor
    map_TE: Tensor
    valid_T: Tensor | None
    """True for tokens that count, or how often each counts."""


class Replayed(Protocol):
    """The routes that a layer replays: `megatron.model.replay.LayerReplay`."""

    @property
    def coming_TK(self) -> Tensor | None:
        """Those of the coming forward pass, negative where a token chooses; None where all do."""
        ...

    def replay(self, routes_TK: Tensor | None) -> None:
        """Set them."""
        ...


class VP2OMoELayer(MoELayer):
    """Stands in the layer spec where MoELayer does; `adopt` makes one of a layer that is built already."""

    statistics: RoutingStatistics | None = None
    specialization = SpecializationConfig()
    orthogonality: OrthogonalityWeight | None = None
    """The weight of the orthogonality loss, which all layers have in common."""
    step_tokens: StepTokens | None = None
    """Set before each step by a policy that divides gradients by loss tokens (calculate_per_token_loss)."""
    packed: PackedTokens | None = None
    """What the tokens of the coming micro-batch are, where its rows are packed. A policy sets it before each forward pass."""
    _to_come_again: deque[PackedTokens | None]
    _routed: _Routed | None = None
    valid_tokens: Tensor | None = None
    """Which tokens of the coming micro-batch are no padding, [T], for loops that pass no `padding_mask`. The router's own losses
    do not look at it: they stay the loop's."""
    gate_log: list[Tensor] | None = None
    """Where the gates of every forward pass go, [T, E] dense; None keeps none."""
    context_index: Tensor | None = None
    """Flat positions of the coming micro-batch whose router inputs are to be kept, [C], on any device."""
    _contexts: list[Tensor] | None = None
    _context_routes: list[Tensor] | None = None
    replay: Replayed | None = None
    """Which routes are replayed; None where all choose theirs."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._replace_parts()

    @classmethod
    def adopt(cls, layer: MoELayer) -> VP2OMoELayer:
        """Make a VP2OMoELayer of a layer of a model that is built; parameters, names and hooks stay."""
        if not isinstance(layer, cls):
            if type(layer) is not MoELayer:
                raise ConfigError(
                    f"layer {layer.layer_number} is a {type(layer).__name__}: the Stein transform can adopt Megatron's own "
                    "MoELayer; derive your layer from VP2OMoELayer instead"
                )
            layer.__class__ = cls
            layer._replace_parts()
        return layer

    def _replace_parts(self) -> None:
        # The base class picks router and dispatcher itself, so ours take the places of the finished objects.
        if type(self.token_dispatcher) is MoEAlltoAllTokenDispatcher:
            self.token_dispatcher.__class__ = LeanAlltoAllTokenDispatcher
            self.token_dispatcher.experts = self.experts
        if type(self.router) is TopKRouter:
            self.router.__class__ = ObservedRouter

    def observe(self) -> None:
        """Gather routing statistics of every training micro-batch from now on.

        Raises:
            ConfigError: if the router is not Megatron's TopKRouter.
        """
        self._need_router("routing statistics")
        self.statistics = RoutingStatistics(self.config.num_moe_experts)

    def specialise(self, losses: SpecializationConfig, orthogonality: OrthogonalityWeight) -> None:
        """Attach these losses to the layer's output from now on; `orthogonality_weight.specialise` does so for all layers.

        Args:
            orthogonality: the weight of the orthogonality loss.

        Raises:
            ConfigError: where the outputs of a token's experts do not meet again on the token's rank.
        """
        if losses.variance_coef > 0:
            self._need_router("algorithm.specialization.variance_coef")
        if losses.orthogonality_coef > 0 and not self._outputs_meet():
            kind = type(self.token_dispatcher).__name__
            raise ConfigError(
                f"algorithm.specialization.orthogonality_coef={losses.orthogonality_coef} needs each token's expert outputs "
                f"apart on the token's own rank, and {kind} (drop_and_pad={getattr(self, 'drop_and_pad', False)}) adds them up "
                "elsewhere: use model.moe_token_dispatcher_type=alltoall without padding to capacity"
            )
        self.specialization, self.orthogonality = losses, orthogonality

    def begin_step(self, step_tokens: StepTokens) -> None:
        """Tell layer and router what the coming micro-batches are parts of."""
        self.step_tokens = step_tokens
        self._to_come_again = deque()
        if isinstance(self.router, ObservedRouter):
            self.router.begin_step(step_tokens)

    def contexts(self) -> Tensor:
        """Router inputs kept since `drop_contexts`, [C, D]."""
        if not self._contexts:
            return self.router.weight.new_zeros(0, self.router.weight.shape[1])
        return torch.cat(self._contexts)

    def context_routes(self) -> Tensor | None:
        """Routes replayed at the contexts, [C, K], negative where a token chose; None where nothing was replayed."""
        return None if self._context_routes is None else torch.cat(self._context_routes)

    def drop_contexts(self) -> None:
        """Forget them."""
        self._contexts = self._context_routes = None

    def replay_with(self, replay: Replayed) -> None:
        """Ask `replay`, a megatron-core RouterReplay, which experts tokens go to, from now on.

        Raises:
            ConfigError: if the router is not Megatron's TopKRouter.
        """
        self._need_router("router replay")
        self.replay = self.router.router_replay = replay

    def _need_router(self, feature: str) -> None:
        if not isinstance(self.router, ObservedRouter):
            raise ConfigError(
                f"{feature} needs Megatron's TopKRouter, and layer {self.layer_number} has a {type(self.router).__name__}: "
                "derive it from megatron_vp2o.megatron.model.router.ObservedRouter"
            )

    def _outputs_meet(self) -> bool:
        dispatcher = self.token_dispatcher
        return isinstance(dispatcher, MoEAlltoAllTokenDispatcher) and not dispatcher.drop_and_pad

    def _packed_of_pass(self) -> PackedTokens | None:
        """What the tokens of this forward pass are: those of the coming micro-batch, or of the one that is computed again."""
        if not self.training or self.config.recompute_granularity is None or self.step_tokens is None:
            return self.packed
        if not torch.is_grad_enabled():
            self._to_come_again.append(self.packed)
            return self.packed
        # Backward passes, and with them recomputation, come in the order of the forward passes, under any schedule.
        return self._to_come_again.popleft() if self._to_come_again else self.packed

    def _observing(self) -> bool:
        # Recomputation runs a layer twice: without gradients first, then with them. Count the second time only.
        return (
            self.training and torch.is_grad_enabled() and (self.statistics is not None or self.specialization.enabled)
        )

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See the base class."""
        packed = self._packed_of_pass()
        if not isinstance(self.router, ObservedRouter):
            return self._route(hidden_states, padding_mask, packed)
        self.router.packed = packed
        try:
            return self._route(hidden_states, padding_mask, packed)
        finally:
            self.router.packed = None  # who asks the router itself has other tokens

    def _route(
        self, hidden_states: Tensor, padding_mask: Tensor | None, packed: PackedTokens | None
    ) -> tuple[Tensor, Tensor]:
        if self.context_index is not None and self.training:
            # The first time a micro-batch passes; recomputation may come when another one's positions are set.
            index_C, self.context_index = self.context_index.to(hidden_states.device, non_blocking=True), None
            self._contexts = [*(self._contexts or []), hidden_states.detach().flatten(0, -2)[index_C]]
            if self.replay is not None and self.replay.coming_TK is not None:
                self._context_routes = [*(self._context_routes or []), self.replay.coming_TK[index_C]]
        if not self._observing():
            probs, routing_map = super().route(hidden_states, padding_mask)
            if self.gate_log is not None:
                self.gate_log.append(probs.detach().flatten(0, -2))
            return probs, routing_map
        self.router.keep_logits = True
        try:
            probs, routing_map = super().route(hidden_states, padding_mask)
        finally:
            self.router.keep_logits = False
        scores_TE = self.router.take_scores()
        valid_T = self._valid(scores_TE) if padding_mask is None else ~padding_mask.reshape(-1)
        if packed is not None and packed.weight_T is not None:
            valid_T = packed.weight_T  # 0 at padding
        with torch.no_grad():
            if self.statistics is not None:
                probabilities_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
                self.statistics.add_routing(routing_map, probabilities_TE, valid_T)
        if self.specialization.variance_coef > 0:
            probs = self._attach_variance(probs, scores_TE, valid_T)
        self._routed = _Routed(probs, routing_map, valid_T)
        return probs, routing_map

    def _valid(self, scores_TE: Tensor) -> Tensor | None:
        valid_T = self.valid_tokens
        if valid_T is not None and len(valid_T) != len(scores_TE):
            raise ConfigError(
                f"layer {self.layer_number} got {len(scores_TE)} tokens and was told which of {len(valid_T)} are no padding: the "
                "loop cuts or packs its micro-batches in another way"
            )
        return valid_T

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """See the base class. Here the outputs of a token's experts are back on its rank and not yet added up."""
        routed, self._routed = self._routed, None
        if routed is not None and self._outputs_meet():
            if self.statistics is not None:
                self._measure_overlap(output.detach(), routed)
            if self.specialization.orthogonality_coef > 0:
                output = self._attach_orthogonality(output, routed)
        return super().postprocess(output, shared_expert_output)

    def _attach_variance(self, probs_TE: Tensor, scores_TE: Tensor, valid_T: Tensor | None) -> Tensor:
        total, count = variance_loss(scores_TE, valid_T)
        if self.statistics is not None:
            self.statistics.add("variance", total.detach())
        return _attach(probs_TE, total, count, self.specialization.variance_coef, self._scale())

    def _attach_orthogonality(self, output_RD: Tensor, routed: _Routed) -> Tensor:
        settings = self.specialization
        stride = max(1, round(1.0 / settings.orthogonality_token_fraction))
        valid_T = (
            routed.valid_T if routed.valid_T is not None else torch.ones_like(routed.map_TE[:, 0], dtype=torch.bool)
        )
        rows_TK, selected_TK, present_TK = _rows_by_token(routed.map_TE, self.config.moe_router_topk, stride)
        gates_TK = routed.probs_TE[::stride].gather(1, selected_TK)
        # Experts multiply by the gate before their last projection; dividing gives their own outputs back, and the gate's
        # gradient through both cancels.
        total, sampled = gated_orthogonality_loss(
            output_RD,
            rows_TK,
            gates_TK,
            present_TK & (gates_TK > _TINY),
            kind=settings.orthogonality,
            valid_T=valid_T[::stride],
        )
        if self.statistics is not None:
            self.statistics.add("orthogonality", total.detach() * valid_T.sum() / sampled.clamp(min=1))
        count = valid_T.sum()
        total = total * count / sampled.clamp(min=1)
        assert self.orthogonality is not None
        if self.orthogonality.value is None:
            self.orthogonality.add(self.layer_number, total, count)
            return output_RD
        return _attach(output_RD, total, count, self.orthogonality.value, self._scale())

    @torch.no_grad()
    def _measure_overlap(self, output_RD: Tensor, routed: _Routed) -> None:
        assert self.statistics is not None
        stride = max(1, len(routed.map_TE) // OVERLAP_TOKENS)
        rows_TK, _, present_TK = _rows_by_token(routed.map_TE, self.config.moe_router_topk, stride)
        weight_T = None
        if routed.valid_T is not None:
            valid_T = routed.valid_T[::stride]
            present_TK = present_TK & (valid_T > 0)[:, None]
            weight_T = valid_T if valid_T.is_floating_point() else None
        total, pairs = output_overlap(output_RD[rows_TK].float(), present_TK, weight_T)
        self.statistics.add("output_overlap", total)
        self.statistics.add("output_pairs", pairs)

    def _scale(self) -> float | None:
        """Loss tokens a valid token, where Megatron divides gradients by loss tokens; None where it averages micro-batches."""
        if not self.config.calculate_per_token_loss:
            return None
        return 1.0 if self.step_tokens is None else self.step_tokens.loss_per_valid


def moe_layers(model: Any) -> list[VP2OMoELayer]:
    """The MoE layers of a model's decoder, adopted. Multi-token-prediction layers are left as they are."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, MoELayer) and "mtp" not in name.split("."):
            found.append(VP2OMoELayer.adopt(module))
    return found


def _attach(activation: Tensor, total: Tensor, count: Tensor, coefficient: float, scale: float | None) -> Tensor:
    loss = total * scale if scale is not None else total / count.clamp(min=1)
    return MoEAuxLossAutoScaler.apply(activation, (coefficient * loss).to(torch.float32))


def _rows_by_token(routing_map_TE: Tensor, topk: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the expert outputs of every `stride`-th token lie among rows sorted by expert, then token.

    Without a host synchronisation: the row of (t, e) is the number of rows of experts before e, and of tokens before t in e.

    Returns:
        Rows, experts and whether there is an output, each [T / stride, K]. Experts ascend; where a token has fewer than K,
        others fill up, with row 0.
    """
    # Along a contiguous dimension: a scan over rows takes CUDA ten times as long.
    within_TE = routing_map_TE.t().contiguous().cumsum(1).t()
    before_E = within_TE[-1].cumsum(0) - within_TE[-1]
    some_TE = routing_map_TE[::stride]
    selected_TK = some_TE.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :topk]
    present_TK = some_TE.gather(1, selected_TK).bool()
    rows_TK = (within_TE[::stride] - 1 + before_E).gather(1, selected_TK)
    return torch.where(present_TK, rows_TK, 0), selected_TK, present_TK

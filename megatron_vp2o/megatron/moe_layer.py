"""Megatron's MoE layer with our dispatcher in it."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


class LeanAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """The all-to-all dispatcher, without its second permutation where that is the identity.

    With one rank in the expert group, tokens leave the first permutation sorted by expert. The base class still cuts them
    into one chunk an expert and concatenates these in the same order (token_dispatcher.py, sort_chunks_by_idxs), four full
    copies a layer and step: a tenth of the tiny model's training step on a CPU.
    """

    def _sorted_already(self) -> bool:
        return self.tp_size * self.ep_size == 1 and not self.drop_and_pad and self.shared_experts is None

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


class VP2OMoELayer(MoELayer):
    """Stands in the layer spec where MoELayer does."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # The base class picks its dispatcher by a string, so ours takes the place of the finished object.
        if type(self.token_dispatcher) is MoEAlltoAllTokenDispatcher:
            self.token_dispatcher.__class__ = LeanAlltoAllTokenDispatcher

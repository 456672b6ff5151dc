"""Megatron's top-k router, whose losses and counts are shares of the whole optimizer step.

Megatron weighs each micro-batch's router losses by its valid tokens and then divides all gradients by the number of *loss*
tokens, so that a coefficient grows with the share of prompt tokens, and with how padding is dealt to ranks (router.py:466,
498 in 0.16.1; 633, 673 in 0.19.2). `ObservedRouter` computes the same losses as parts of one mean over the step's valid
tokens (or sequences), wherever its policy has said how many there are; docs/method.md has the equations.

Shape legend: T tokens of a micro-batch on this rank, S positions on this rank, B rows of a micro-batch, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_vp2o.parallel.groups import Groups

LOAD_BALANCING, Z_LOSS = "moe/load_balancing_loss", "moe/z_loss"


@dataclass(frozen=True)
class StepTokens:
    """What one optimizer step trains on, over all micro-batches and data-parallel ranks."""

    loss: float
    """Tokens that count in the loss: what Megatron divides all gradients by (calculate_per_token_loss)."""
    valid: float
    """Tokens that are no padding."""
    sequences: float
    """Rows that have a valid token."""

    @property
    def loss_per_valid(self) -> float:
        """Turns a sum over valid tokens into what becomes their mean when Megatron has divided by loss tokens."""
        return self.loss / max(self.valid, 1.0)


@dataclass(frozen=True)
class PackedTokens:
    """What this rank's tokens of a micro-batch are whose rows are packed."""

    piece_T: Tensor
    """Which piece each is of; padding counts as one more piece."""
    rows: int
    """B. Row b consists of piece b and, where it shares its beginning with others, of another one."""
    stem_B: Tensor | None = None
    """Which one."""
    weight_T: Tensor | None = None
    """Rows that each token stands for, float32; None: one."""

    def sums_of_rows(self, values_TE: Tensor) -> Tensor:
        """[B, E]."""
        pieces = 2 * self.rows + 1  # at most: of each row its own and a shared one, and padding
        sums_PE = values_TE.new_zeros(pieces, values_TE.shape[1]).index_add(0, self.piece_T, values_TE)
        own_BE = sums_PE[: self.rows]
        return own_BE if self.stem_B is None else own_BE + sums_PE.index_select(0, self.stem_B)


class ObservedRouter(TopKRouter):
    """TopKRouter that leaves its logits with whoever asked for them, and takes its losses over the step."""

    keep_logits = False
    logits_TE: Tensor | None = None
    step_tokens: StepTokens | None = None
    """Set by the policy before each step; None leaves the losses to Megatron, as in a loop that is not ours."""
    packed: PackedTokens | None = None
    """What the tokens of the micro-batch are, where its rows are packed. The layer sets it for the time of a forward pass."""
    losses: dict[str, Tensor] | None = None
    """This rank's shares of the step's mean losses so far, before their coefficients; float64 scalars."""

    def begin_step(self, step_tokens: StepTokens) -> None:
        """The micro-batches of a step follow."""
        self.step_tokens, self.losses = step_tokens, {}

    def _sum(self, values_TE: Tensor) -> Tensor:
        """Over tokens, each as often as there are rows that it stands for."""
        weight_T = None if self.packed is None else self.packed.weight_T
        return values_TE.sum(0) if weight_T is None else (weight_T[None] @ values_TE.float())[0]

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See the base class."""
        if self.keep_logits:
            self.logits_TE = logits.reshape(-1, logits.shape[-1])
        return super().routing(logits, *args, **kwargs)

    def take_scores(self) -> Tensor:
        """The router's scores of the last micro-batch before any selection, [T, E] float32: softmax or sigmoid."""
        assert self.logits_TE is not None
        logits_TE, self.logits_TE = self.logits_TE.float(), None
        return logits_TE.softmax(-1) if self.score_function == "softmax" else logits_TE.sigmoid()

    # Scores are normalised to add up to 1, and 0 at padding; so is the map, which has `topk` experts for each valid token.

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """E/k sum_i f_i P_i of each micro-batch (Fedus et al., arXiv 2101.03961), weighted by its share of valid tokens."""
        step, coefficient = self.step_tokens, self.get_aux_loss_coeff("aux_loss")
        if step is None or coefficient == 0:
            return super()._apply_aux_loss(probs, scores_for_aux_loss, routing_map, with_padding_mask)
        counts_E = _summed(self._sum(routing_map), self.tp_cp_group)
        tokens = counts_E.sum() / self.topk
        product = (self._sum(scores_for_aux_loss) * counts_E).sum() / tokens.clamp(min=1)
        return self._attach(
            probs, LOAD_BALANCING, coefficient, product * self.num_experts / (self.topk * max(step.valid, 1))
        )

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """E/k sum_i f_i P_i of each row over its own valid tokens (DeepSeek-V3, arXiv 2412.19437), mean over rows."""
        step, coefficient = self.step_tokens, self.get_aux_loss_coeff("seq_aux_loss")
        if step is None or coefficient == 0:
            return super()._apply_seq_aux_loss(
                probs, scores_for_aux_loss, routing_map, seq_length, bsz, with_padding_mask
            )
        counts_BE = _summed(self._by_row(routing_map, seq_length, bsz), self.tp_cp_group)
        tokens_B = counts_BE.sum(-1) / self.topk
        scores_BE = self._by_row(scores_for_aux_loss, seq_length, bsz)
        product = ((scores_BE * counts_BE).sum(-1) / tokens_B.square().clamp(min=1)).sum()
        return self._attach(
            probs, LOAD_BALANCING, coefficient, product * self.num_experts / (self.topk * max(step.sequences, 1))
        )

    def _by_row(self, values: Tensor, seq_length: int, bsz: int) -> Tensor:
        """Sums over each row's tokens, [B, E]."""
        if self.packed is None:
            return values.view(seq_length, bsz, -1).sum(0)
        return self.packed.sums_of_rows(values.reshape(len(self.packed.piece_T), -1).float())

    def _apply_global_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """E/k sum_i f_i P_i with f over all ranks and the step's micro-batches so far (Qiu et al., arXiv 2501.11873)."""
        step, coefficient = self.step_tokens, self.get_aux_loss_coeff("global_aux_loss")
        if step is None or coefficient == 0:
            return super()._apply_global_aux_loss(probs, scores_for_aux_loss, routing_map, with_padding_mask)
        self.global_tokens_per_expert += _summed(self._sum(routing_map), self.tp_dp_cp_group)
        share_E = self.global_tokens_per_expert / self.global_tokens_per_expert.sum().clamp(min=1)
        product = (self._sum(scores_for_aux_loss) * share_E).sum()
        return self._attach(probs, LOAD_BALANCING, coefficient, product * self.num_experts / max(step.valid, 1))

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Mean over the step's valid tokens of (log sum exp of the logits)^2 (Zoph et al., arXiv 2202.08906)."""
        step, coefficient = self.step_tokens, self.config.moe_z_loss_coeff
        if step is None or coefficient is None or not (self.training and torch.is_grad_enabled()):
            return super().apply_z_loss(logits, padding_mask=padding_mask)
        squares_T = logits.float().logsumexp(-1).square()
        if padding_mask is not None:
            squares_T = torch.where(padding_mask, 0.0, squares_T)
        total = self._sum(squares_T.reshape(-1))
        return self._attach(logits, Z_LOSS, coefficient, total / max(step.valid, 1))

    def _attach(self, activation: Tensor, name: str, coefficient: float, share: Tensor) -> Tensor:
        """Let the backward pass add `coefficient * share` to the objective; `share` is this rank's part of the step's mean."""
        assert self.step_tokens is not None and self.losses is not None
        self.losses[name] = self.losses.get(name, 0.0) + share.detach().double()
        return MoEAuxLossAutoScaler.apply(activation, coefficient * self.step_tokens.loss * share.float())

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of each expert for the update of its bias, once: not in evaluation, nor before recomputation.

        The base class combines a map [T, E] with a mask [T] (router.py:542 in 0.16.1, :738 in 0.19.2), an error unless T = E.
        """
        if self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                valid_TE = routing_map if padding_mask is None else routing_map & ~padding_mask.view(-1, 1)
                self.local_tokens_per_expert += self._sum(valid_TE)


def router_losses(routers: Sequence[Any], names: Sequence[str], layers: int, groups: Groups) -> dict[str, Tensor]:
    """The step's router losses before their coefficients, mean over MoE layers. A collective over all ranks of the model.
    What is returned stays on the device, float64 without dimensions.

    Args:
        routers: those of this rank's layers.
        names: which losses are on, the same on every rank.
        layers: MoE layers of the whole model.
    """
    if not names:
        return {}
    parts = [router.losses for router in routers if getattr(router, "losses", None)]
    sums = torch.zeros(len(names), dtype=torch.float64, device=groups.device)
    for losses in parts:
        sums += torch.stack([losses.get(name, sums.new_zeros(())) for name in names])
    dist.all_reduce(sums, group=groups.world)
    return dict(zip(names, (sums / layers).unbind(), strict=True))


def _summed(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Counts of all ranks of the group, float32, without gradient."""
    total = counts.detach().float()
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total

"""What a MoE layer sees of its routing during a step, added up over micro-batches until somebody takes it.

Shape legend: T tokens of a micro-batch on this rank, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vp2o.core.coactivation import coactivation_counts
from megatron_vp2o.core.diagnostics import router_entropy

SUMS = ("tokens", "router_entropy", "output_overlap", "output_pairs", "orthogonality", "variance")
"""Names of the scalars, in the order of `RoutingTotals.sums`."""


@dataclass
class RoutingTotals:
    """Sums over this rank's valid tokens; those of other ranks and layers stack and add up."""

    counts_EE: Tensor
    """Tokens routed to both experts, float64."""
    sums: Tensor
    """One number for each of `SUMS`, float64."""


class RoutingStatistics:
    """Accumulates `RoutingTotals`; plain tensors outside the module's state, so checkpoints do not see them."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._totals: RoutingTotals | None = None

    def add_routing(self, routing_map_TE: Tensor, probabilities_TE: Tensor, valid_T: Tensor | None) -> None:
        """Count one micro-batch.

        Args:
            routing_map_TE: True where a token goes to an expert.
            probabilities_TE: the router's distribution over all experts; rows add up to 1.
            valid_T: True for tokens that are no padding, or how many tokens each stands for; None counts all.
        """
        totals = self._open(routing_map_TE.device)
        totals.counts_EE += coactivation_counts(routing_map_TE, valid_T)
        entropy, tokens = router_entropy(probabilities_TE, valid_T)
        totals.sums[0] += tokens
        totals.sums[1] += entropy

    def add(self, name: str, value: Tensor) -> None:
        """Add to one of `SUMS`."""
        self._open(value.device).sums[SUMS.index(name)] += value

    def take(self, device: torch.device) -> RoutingTotals:
        """What came together since the last call; zeros where nothing did."""
        totals = self._open(device)
        self._totals = None
        return totals

    def _open(self, device: torch.device) -> RoutingTotals:
        if self._totals is None:
            self._totals = RoutingTotals(
                torch.zeros(self._experts, self._experts, dtype=torch.float64, device=device),
                torch.zeros(len(SUMS), dtype=torch.float64, device=device),
            )
        return self._totals

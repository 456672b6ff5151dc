"""Routing of a MoE model, recorded layer by layer, and the metrics that follow from it.

The formulas are those of `core/`, and the names those of docs/metrics.md: a model that is watched from outside has the same
numbers as one that this project trains.

Shape legend: L MoE layers, E experts, T tokens of one forward pass, K experts of a token, D hidden size, F expert
intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vp2o.core import diagnostics
from megatron_vp2o.core.coactivation import coactivation_counts, coactivation_scores
from megatron_vp2o.core.prototypes import converged_prototypes, initial_prototypes

OVERLAP_TOKENS = 256
"""Tokens of a forward pass whose experts' outputs are compared."""
PROTOTYPE_ANGLE = 1e-5
"""A prototype has arrived when an iteration turns it by less than this many radians."""
PROTOTYPE_ITERATIONS = 256
"""Most iterations of one measurement."""
_TOKENS, _ENTROPY, _OVERLAP, _PAIRS = range(4)


class LayerRecorder:
    """Adds up what one MoE layer does, until `take`.

    Args:
        experts: E.
    """

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self._counts_EE: Tensor | None = None
        self._sums = torch.zeros(4, dtype=torch.float64)

    @torch.no_grad()
    def add_routing(self, selected_TK: Tensor, scores_TE: Tensor, valid_T: Tensor | None = None) -> None:
        """Count the tokens of one forward pass.

        Args:
            selected_TK: numbers of the experts that each token goes to.
            scores_TE: the router's scores of all experts, at least 0; rows need not add up to 1.
            valid_T: True for tokens that are no padding; None counts all.
        """
        map_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, selected_TK, True)
        counts_EE = coactivation_counts(map_TE, valid_T)
        entropy, tokens = diagnostics.router_entropy(scores_TE / scores_TE.sum(-1, keepdim=True), valid_T)
        self._counts_EE = counts_EE if self._counts_EE is None else self._counts_EE + counts_EE
        self._add(_TOKENS, tokens)
        self._add(_ENTROPY, entropy)

    @torch.no_grad()
    def add_outputs(self, outputs_TKD: Tensor, present_TK: Tensor) -> None:
        """Compare the outputs of each token's experts.

        Args:
            outputs_TKD: in any scale: a gate that multiplies an output does not change a cosine.
            present_TK: True where the slot holds an output that counts.
        """
        total, pairs = diagnostics.output_overlap(outputs_TKD.float(), present_TK)
        self._add(_OVERLAP, total)
        self._add(_PAIRS, pairs)

    def _add(self, index: int, value: Tensor) -> None:
        self._sums = self._sums.to(value.device)
        self._sums[index] += value

    def take(self) -> Tensor:
        """E * E counts and four sums as one vector, float64; recording begins anew."""
        counts_EE = self._counts_EE
        if counts_EE is None:
            counts_EE = self._sums.new_zeros(self.experts, self.experts)
        taken = torch.cat([counts_EE.flatten(), self._sums])
        self._counts_EE, self._sums = None, torch.zeros_like(self._sums)
        return taken


@dataclass(frozen=True)
class RoutingReport:
    """What the MoE layers of a model did between two calls of `report_of`."""

    layers: tuple[str, ...]
    """Names of the layers."""
    counts_LEE: Tensor
    """Tokens that went to both of two experts, float64; the diagonal holds each expert's tokens."""
    tokens_L: Tensor
    router_entropy_L: Tensor
    """Mean over tokens, nats."""
    output_overlap_L: Tensor
    """Mean squared cosine of two outputs of a token."""
    prototypes_LED: Tensor | None
    """Principal output direction of each expert, unit vectors; None where they were not asked for."""
    residual_LE: Tensor | None
    """How far they are from eigenvectors."""

    @property
    def scores_LEE(self) -> Tensor:
        """C_ij, the share of tokens that went to both experts (VP2O Eq. 6)."""
        return coactivation_scores(self.counts_LEE, self.tokens_L)

    @property
    def by_layer(self) -> dict[str, list[float]]:
        """One number a layer of every metric. Without a token there are only those of prototypes."""
        loads_LE = self.counts_LEE.diagonal(dim1=-2, dim2=-1)
        found: dict[str, Tensor] = {}
        if bool((self.tokens_L > 0).all()) and len(self.layers):
            found |= {
                "moe/router_entropy": self.router_entropy_L,
                "moe/expert_utilisation": diagnostics.expert_utilisation(loads_LE),
                "moe/effective_experts": diagnostics.effective_experts(loads_LE),
                "moe/load_violation": diagnostics.load_violation(loads_LE),
                "moe/output_overlap": self.output_overlap_L,
                "stein/coactivation_sparsity": diagnostics.coactivation_sparsity(self.counts_LEE),
            }
        if self.prototypes_LED is not None and self.residual_LE is not None:
            overlap = diagnostics.prototype_overlap(self.prototypes_LED)
            found |= {
                "stein/prototype_overlap": overlap.mean,
                "stein/prototype_overlap_max": overlap.maximum,
                "stein/prototype_rank": overlap.effective_rank,
                "stein/prototype_residual": self.residual_LE.mean(-1),
            }
        return {name: value_L.double().tolist() for name, value_L in found.items()}

    @property
    def metrics(self) -> dict[str, float]:
        """Means over layers, under the names of docs/metrics.md."""
        return {name: sum(values) / len(values) for name, values in self.by_layer.items()}


def report_of(
    names: Sequence[str],
    recorders: Sequence[LayerRecorder],
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
    prototypes: tuple[Tensor, Tensor] | None = None,
) -> RoutingReport:
    """Take what the recorders of all layers hold.

    Args:
        names: one a layer.
        recorders: one a layer, all with the same number of experts.
        reduce: adds a float64 tensor up over the ranks that share the batch and returns the sum; None for one process.
        prototypes: [L, E, D] and their residuals [L, E].
    """
    rows_LX = torch.stack([recorder.take().cpu() for recorder in recorders])
    if reduce is not None:
        rows_LX = reduce(rows_LX)
    experts = recorders[0].experts
    sums_L4 = rows_LX[:, experts**2 :]
    return RoutingReport(
        tuple(names),
        rows_LX[:, : experts**2].reshape(-1, experts, experts),
        sums_L4[:, _TOKENS],
        sums_L4[:, _ENTROPY] / sums_L4[:, _TOKENS].clamp(min=1),
        sums_L4[:, _OVERLAP] / sums_L4[:, _PAIRS].clamp(min=1),
        *(prototypes if prototypes is not None else (None, None)),
    )


@torch.no_grad()
def settled_prototypes(weight_EDF: Tensor, layer: int, start_ED: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prototypes of one layer's experts [E, D] and their residuals [E], iterated until they rest.

    Args:
        weight_EDF: output projections as torch stores them, in any floating type.
        layer: its number; with `start_ED` None it seeds the directions to start from.
        start_ED: an earlier measurement's prototypes, whose signs are kept.
    """
    experts, hidden, _ = weight_EDF.shape
    if start_ED is None:
        start_ED = initial_prototypes([layer], range(experts), hidden, 0)[0]
    found = converged_prototypes(
        [weight_EDF.detach().float()],
        start_ED[None].to(weight_EDF.device),
        angle=PROTOTYPE_ANGLE,
        most=PROTOTYPE_ITERATIONS,
    )
    return found.prototypes_LED[0].cpu(), found.residual_LE[0].cpu()

"""What a step's routing, prototypes and field say, as metrics: one number a layer each, then means over all layers.

Shape legend: L MoE layers of this pipeline stage, E experts, S sums of `routing_statistics.SUMS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.core import diagnostics
from megatron_vp2o.core.diagnostics import Overlap
from megatron_vp2o.megatron.model.routing_statistics import SUMS
from megatron_vp2o.megatron.stein.prototypes import PrototypeState
from megatron_vp2o.parallel.groups import Groups


@dataclass(frozen=True)
class StageObservation:
    """What one step showed of the layers of this pipeline stage."""

    counts_LEE: Tensor
    """Tokens that were routed to both experts; on the diagonal, to the expert."""
    sums_LS: Tensor
    prototypes: PrototypeState
    attraction_LEE: Tensor
    active_LE: Tensor
    repulsion_ratio_L: Tensor

    @cached_property
    def sums(self) -> dict[str, Tensor]:
        """The sums by name, [L] each."""
        return dict(zip(SUMS, self.sums_LS.unbind(1), strict=True))

    @cached_property
    def loads_LE(self) -> Tensor:
        return self.counts_LEE.diagonal(dim1=-2, dim2=-1)

    @cached_property
    def overlap(self) -> Overlap:
        return diagnostics.prototype_overlap(self.prototypes.values_LED)

    def per_token(self, name: str) -> Tensor:
        """A sum over its tokens, [L]."""
        return self.sums[name] / self.sums["tokens"].clamp(min=1)


METRICS: dict[str, Callable[[StageObservation], Tensor]] = {
    "moe/effective_experts": lambda seen: diagnostics.effective_experts(seen.loads_LE),
    "moe/expert_utilisation": lambda seen: diagnostics.expert_utilisation(seen.loads_LE),
    "moe/load_violation": lambda seen: diagnostics.load_violation(seen.loads_LE),
    "moe/orthogonality_loss": lambda seen: seen.per_token("orthogonality"),
    "moe/output_overlap": lambda seen: seen.sums["output_overlap"] / seen.sums["output_pairs"].clamp(min=1),
    "moe/router_entropy": lambda seen: seen.per_token("router_entropy"),
    "moe/variance_loss": lambda seen: seen.per_token("variance"),
    "stein/coactivation_sparsity": lambda seen: diagnostics.coactivation_sparsity(seen.counts_LEE),
    "stein/prototype_overlap": lambda seen: seen.overlap.mean,
    "stein/prototype_overlap_max": lambda seen: seen.overlap.maximum,
    "stein/prototype_rank": lambda seen: seen.overlap.effective_rank,
    "stein/prototype_residual": lambda seen: seen.prototypes.residual_LE.mean(-1),
    "stein/repulsion_ratio": lambda seen: seen.repulsion_ratio_L,
    "stein/self_weight": lambda seen: diagnostics.self_weight(seen.attraction_LEE, seen.active_LE),
}
"""One number a layer, [L], by the metric's key; docs/metrics.md says what each means."""


def means_over_layers(seen: StageObservation | None, layers: int, groups: Groups) -> dict[str, float]:
    """Means over the layers of all pipeline stages, equal on all ranks. One reduction, one host synchronisation.

    A step without a token returns only the `stein/prototype_*` metrics: nothing else was measured.

    Args:
        seen: None on a stage without MoE layers.
        layers: MoE layers of this stage.
    """
    sums = torch.zeros(len(METRICS) + 2, dtype=torch.float64, device=groups.device)
    if seen is not None:
        rows = [measure(seen) for measure in METRICS.values()]
        parts = [row.double().sum() for row in (*rows, seen.sums["tokens"])]
        sums = torch.stack([*parts, torch.full_like(parts[0], layers)])
    if groups.pp.size() > 1:
        dist.all_reduce(sums, group=groups.pp)
    *values, tokens, count = sums.tolist()
    means = {key: value / max(count, 1.0) for key, value in zip(METRICS, values, strict=True)}
    return {key: value for key, value in means.items() if tokens > 0 or key.startswith("stein/prototype_")}

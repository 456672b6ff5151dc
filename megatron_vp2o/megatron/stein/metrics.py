"""What a step's routing, prototypes and field say, as metrics: one number a layer each, then means over all layers.

Shape legend: L MoE layers of this pipeline stage, E experts, S sums of `routing_statistics.SUMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.core import diagnostics
from megatron_vp2o.core.deferred import Deferred
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
    def overlap_LEE(self) -> Tensor:
        """Squared cosines of different experts' prototypes."""
        return diagnostics.squared_overlaps(self.prototypes.values_LED)

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
    "stein/prototype_overlap": lambda seen: diagnostics.mean_overlap(seen.overlap_LEE),
    "stein/prototype_overlap_max": lambda seen: seen.overlap_LEE.amax((-1, -2)),
    "stein/prototype_rank": lambda seen: diagnostics.effective_rank(diagnostics.gram(seen.prototypes.values_LED)),
    "stein/prototype_residual": lambda seen: seen.prototypes.residual_LE.mean(-1),
    "stein/repulsion_ratio": lambda seen: seen.repulsion_ratio_L,
    "stein/self_weight": lambda seen: diagnostics.self_weight(seen.attraction_LEE, seen.active_LE),
}
"""One number a layer, [L], by the metric's key; docs/metrics.md says what each means."""


RANK = "stein/prototype_rank"
"""The one metric that needs eigenvalues, for which torch makes the host wait: those of several steps are computed at once."""


class MeansOverLayers:
    """Means of metrics over the layers of all pipeline stages, equal on all ranks."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def of(self, seen: StageObservation | None, layers: int) -> Deferred[dict[str, float]]:
        """The means of one step; those of a step without a token are only of `stein/prototype_*`: nothing else was measured.
        Reading them is a collective.

        Args:
            seen: None on a stage without MoE layers.
            layers: MoE layers of this stage.
        """
        sums = torch.zeros(len(METRICS) + 2, dtype=torch.float64, device=self._groups.device)
        gram_LEE = sums.new_zeros(0, 1, 1)
        if seen is not None:
            rows = [measure(seen) for name, measure in METRICS.items() if name != RANK]
            parts = [row.double().sum() for row in rows]
            parts.insert(list(METRICS).index(RANK), torch.zeros_like(parts[0]))
            sums = torch.stack([*parts, seen.sums["tokens"].double().sum(), torch.full_like(parts[0], layers)])
            gram_LEE = diagnostics.gram(seen.prototypes.values_LED)
        return Deferred((sums, gram_LEE), self._finish, self._together)

    def _together(self, steps: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """Effective ranks of all steps, with one call of the eigenvalue routine, and one reduction over stages."""
        gram_XEE = torch.cat([gram_LEE for _, gram_LEE in steps])
        sums_XM = torch.stack([sums for sums, _ in steps])
        if len(gram_XEE):
            rank_X = diagnostics.effective_rank(gram_XEE).double()
            parts = rank_X.split([len(gram_LEE) for _, gram_LEE in steps])
            sums_XM[:, list(METRICS).index(RANK)] = torch.stack([rank_L.sum() for rank_L in parts])
        if self._groups.pp.size() > 1:
            dist.all_reduce(sums_XM, group=self._groups.pp)
        return [(sums,) for sums in sums_XM]

    @staticmethod
    def _finish(on_host: list[Tensor]) -> dict[str, float]:
        *values, tokens, count = on_host[0].tolist()
        means = {key: value / max(count, 1.0) for key, value in zip(METRICS, values, strict=True)}
        return {key: value for key, value in means.items() if tokens > 0 or key.startswith("stein/prototype_")}

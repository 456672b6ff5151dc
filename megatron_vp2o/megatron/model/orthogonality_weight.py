"""The weight of the orthogonality loss, where it is relative to the loss's first value.

Shape legend: L MoE layers of this pipeline stage.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.config.schema import OrthogonalityScale, SpecializationConfig
from megatron_vp2o.parallel.groups import Groups

if TYPE_CHECKING:
    from megatron_vp2o.megatron.model.moe_layer import VP2OMoELayer

logger = logging.getLogger(__name__)


class OrthogonalityWeight:
    """What the layers multiply their orthogonality loss by: `orthogonality_coef`, or that over the loss's first value.

    The paper's loss has the scale of the experts' outputs squared, so that no fixed weight suits two models. Guo et al.'s code
    (arXiv 2505.22323) weights the loss so that it begins at about 1e-4, and so does `orthogonality_scale=relative`: the first
    step with a valid token measures the loss and does not apply it; `settle` then takes the mean over all layers, tokens and ranks.

    Args:
        settings: of the losses.
        layers: numbers of the MoE layers of this pipeline stage.
        groups: of the model.
    """

    def __init__(self, settings: SpecializationConfig, layers: Sequence[int], groups: Groups) -> None:
        self._coefficient, self._groups = settings.orthogonality_coef, groups
        self._relative = settings.orthogonality_scale is OrthogonalityScale.relative
        self._seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self.first: float | None = None
        """The loss's first value, for checkpoints; None before it is known, and with orthogonality_scale=absolute."""

    @property
    def value(self) -> float | None:
        """The weight; None while it is not known, and the loss is to be measured with `add`."""
        if not self._relative:
            return self._coefficient
        return None if self.first is None else self._coefficient / self.first

    def add(self, layer: int, total: Tensor, tokens: Tensor) -> None:
        """Take a micro-batch's loss, summed over its valid tokens, into the first value.

        Args:
            layer: its number.
        """
        self._seen[layer].append(torch.stack([total.detach().double(), tokens.double()]))

    @torch.no_grad()
    def settle(self) -> None:
        """Find the first value, once a step has measured it. Collective over all ranks until it is known, free from then on.

        A step whose loss is zero (no valid token, or no token with two experts) or not finite says nothing: the next one does.
        """
        if not self._relative or self._coefficient == 0 or self.first is not None:
            return
        groups = self._groups
        rows_L2 = torch.zeros(len(self._seen), 2, dtype=torch.float64, device=groups.device)
        for row_2, seen in zip(rows_L2, self._seen.values(), strict=True):
            if seen:
                row_2 += torch.stack(seen).sum(0)
                seen.clear()
        if groups.stage.size() > 1 and len(rows_L2):
            dist.all_reduce(rows_L2, group=groups.stage)
        means = torch.stack([(rows_L2[:, 0] / rows_L2[:, 1].clamp(min=1)).sum(), rows_L2.new_full((), len(rows_L2))])
        if groups.pp.size() > 1:
            dist.all_reduce(means, group=groups.pp)
        total, layers = means.tolist()
        if layers and math.isfinite(total) and total > 0:
            self.first = total / layers
            if groups.rank == 0:
                logger.info(
                    "the orthogonality loss begins at %.4g, so its weight is %.3g (orthogonality_coef=%g, "
                    "orthogonality_scale=relative)",
                    self.first,
                    self.value,
                    self._coefficient,
                )


def specialise(layers: Sequence[VP2OMoELayer], settings: SpecializationConfig, groups: Groups) -> OrthogonalityWeight:
    """Attach the losses to the outputs of all of a stage's MoE layers from now on.

    Returns:
        Their common weight of the orthogonality loss: `settle` it after each step's backward passes.

    Raises:
        ConfigError: for a layer that cannot have them.
    """
    weight = OrthogonalityWeight(settings, [layer.layer_number for layer in layers], groups)
    for layer in layers:
        layer.specialise(settings, weight)
    return weight

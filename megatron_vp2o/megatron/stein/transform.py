"""The Stein transform of expert gradients, between gradient reduction and the optimizer.

    routing statistics -> C, A+, A-;  prototypes -> K;  g~ = w+ g + eta * w- dK/dW

`SteinTransform.apply` is called once per optimizer step, when `finalize_model_grads` has run. In this project's trainers that
is an explicit call; `install.install` puts it behind the `finalize_model_grads_func` of any Megatron loop.

Shape legend: L MoE layers of this pipeline stage, E experts, e local experts, D hidden size, F expert intermediate size (this
rank's shard), S sums of `routing_statistics.SUMS`, X counts and sums of a layer in a row, 2 terms of a rank-two gradient.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.core import diagnostics
from megatron_vp2o.core.choices import RepulsionScale
from megatron_vp2o.core.coactivation import (
    active_experts,
    attraction_mask,
    coactivation_scores,
    repulsion_mask,
    update_average,
)
from megatron_vp2o.core.deferred import Deferred
from megatron_vp2o.core.kernels import kernel_matrix, kernel_pull, temperature
from megatron_vp2o.core.prototypes import RankTwo, prototype_gradient
from megatron_vp2o.core.stein import attraction_weights, repulsion_weights
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.megatron.stein.expert_gradients import ExpertGradients
from megatron_vp2o.megatron.stein.metrics import MeansOverLayers, StageObservation
from megatron_vp2o.megatron.stein.prototypes import (
    ExpertPrototypes,
    PrototypeState,
    sharded_by_layer,
    stacked,
)

logger = logging.getLogger(__name__)

REPULSION_DROWNS = 10.0
"""Repulsion over attraction from which the transform warns."""


@dataclass(frozen=True)
class FieldWeights:
    """The weights w+ and w- of one step, and which experts are active (at least one token reached them)."""

    active_LE: Tensor
    attraction_LEE: Tensor
    """w+, what the gradients are mixed by."""
    repulsion_LEE: Tensor
    """w-, what the kernel's gradients are added by."""


class SteinTransform:
    """Transforms the expert gradients of all MoE layers of this rank's pipeline stage.

    Its state between steps: the moving average of C, and the number of steps.

    Args:
        prototypes: of a model whose chunks are wrapped in Megatron's DistributedDataParallel; with their settings.
        optimizer: Megatron's; needed only where it scales the loss (fp16).

    Raises:
        ConfigError: for routers or gradient layouts that it does not know, by name.
    """

    def __init__(self, prototypes: ExpertPrototypes, *, optimizer: Any = None) -> None:
        self.prototypes, self.settings, self.groups = prototypes, prototypes.settings, prototypes.groups
        self.optimizer = optimizer
        self._average: tuple[Tensor, Tensor] | None = None
        """Moving average of C, and whether any step in it had a token: True or False on the device."""
        self.steps = 0
        """Steps transformed so far."""
        self._warned = False
        self._means = MeansOverLayers(self.groups)
        layers = prototypes.layers
        for layer in layers:
            layer.observe()
        if layers:
            settings = self.settings
            self.tau = temperature(settings.tau, prototypes.experts, settings.temperature_scaling)
            self.gradients = ExpertGradients(
                prototypes.chunks,
                prototypes.weights,
                self.groups,
                prototypes.experts,
                int(settings.chunk_mib * 2**20),
            )

    def save_state(self) -> tuple[tuple[Tensor, Tensor] | None, int]:
        """The present state, for `restore_state`. Costs nothing: tensors are never changed in place."""
        return self._average, self.steps

    def restore_state(self, saved: tuple[tuple[Tensor, Tensor] | None, int]) -> None:
        """Return to what `save_state` returned."""
        self._average, self.steps = saved

    @property
    def coactivation_LEE(self) -> Tensor | None:
        """Moving average of C; None before the first step with a token. The host waits for the device."""
        return self._average[0] if self._average is not None and bool(self._average[1]) else None

    @coactivation_LEE.setter
    def coactivation_LEE(self, average_LEE: Tensor | None) -> None:
        self._average = None
        if average_LEE is not None:
            self._average = average_LEE, torch.ones((), dtype=torch.bool, device=average_LEE.device)

    # --- the transform ------------------------------------------------------------------------------------------------

    def apply(self) -> dict[str, float]:
        """`transform_gradients`, waited for."""
        return self.transform_gradients().read()

    @torch.no_grad()
    def transform_gradients(self) -> Deferred[dict[str, float]]:
        """Replace the reduced expert gradients by the field's (only measure, where `enabled` is false).

        A collective over the stage; call it once a step, before clipping.

        Returns:
            Metrics, means over the layers of all stages, equal on all ranks. Reading them is a collective, too; those of several
            steps are best read at once.
        """
        layers, seen = len(self.prototypes.layers), None
        if layers:
            counts_LEE, sums_LS = self._collect_statistics()
            if self.prototypes.state is None or self.steps % self.settings.prototype_interval == 0:
                self.prototypes.update()
            field = self._compute_field(counts_LEE, sums_LS[:, 0])
            ratio_L = torch.zeros(layers, device=self.groups.device)
            if self.settings.enabled:
                if self.settings.attraction:
                    self.gradients.mix(field.attraction_LEE)
                ratio_L = self._repel(field)
            assert self.prototypes.state is not None
            seen = StageObservation(
                counts_LEE, sums_LS, self.prototypes.state, field.attraction_LEE, field.active_LE, ratio_L
            )
        self.steps += 1
        self.prototypes.mark_stale()  # an optimizer step follows
        return self._means.of(seen, layers).then(self._warn_of_repulsion)

    def _warn_of_repulsion(self, means: dict[str, float]) -> dict[str, float]:
        """Say once that the repulsion, whose size is fixed, drowns the gradients, as it does at fresh weights."""
        settings, ratio = self.settings, means.get("stein/repulsion_ratio", 0.0)
        if self._warned or settings.repulsion_scale is not RepulsionScale.absolute or ratio <= REPULSION_DROWNS:
            return means
        self._warned = True
        if self.groups.rank == 0:
            logger.warning(
                "the repulsion between experts is %.3g times as large as the gradients that it is added to "
                "(stein/repulsion_ratio; algorithm.stein.eta=%g, repulsion_scale=absolute): lower eta by about that factor, "
                "or set algorithm.stein.repulsion_scale=relative",
                ratio,
                settings.eta,
            )
        return means

    def _collect_statistics(self) -> tuple[Tensor, Tensor]:
        """Statistics of all layers and ranks of the stage, in one reduction: counts [L, E, E] and sums [L, S]."""
        taken = []
        for layer in self.prototypes.layers:
            assert layer.statistics is not None
            taken.append(layer.statistics.take(self.groups.device))
        flat = torch.cat([torch.cat([totals.counts_EE.flatten(), totals.sums]) for totals in taken])
        if self.groups.stage.size() > 1:
            dist.all_reduce(flat, group=self.groups.stage)
        rows_LX = flat.view(len(taken), -1)
        experts = self.prototypes.experts
        return rows_LX[:, : experts**2].reshape(-1, experts, experts), rows_LX[:, experts**2 :]

    def _compute_field(self, counts_LEE: Tensor, tokens_L: Tensor) -> FieldWeights:
        """Weights from this step's counts and the present prototypes; adds the counts to the average of C."""
        settings = self.settings
        scores_LEE = self._update_average(counts_LEE, tokens_L)
        active_LE = active_experts(counts_LEE)
        near_LEE = attraction_mask(
            scores_LEE, active_LE, neighbours=settings.neighbours, threshold=settings.coactivation_threshold
        )
        far_LEE = repulsion_mask(near_LEE, active_LE)
        kernel_LEE = kernel_matrix(self.prototypes.values_LED, tau=self.tau, kernel=settings.kernel)
        return FieldWeights(
            active_LE,
            attraction_weights(kernel_LEE, near_LEE, settings.normalisation),
            repulsion_weights(kernel_LEE, far_LEE, near_LEE, settings.normalisation),
        )

    def _update_average(self, counts_LEE: Tensor, tokens_L: Tensor) -> Tensor:
        """The average of C with this step in it. A step without a token says nothing of C, and leaves the average alone."""
        current_LEE = coactivation_scores(counts_LEE, tokens_L).float()
        present_L11, decay = tokens_L[:, None, None] > 0, self.settings.coactivation_ema
        if self._average is None:
            self._average = update_average(None, current_LEE, decay), present_L11.any()
            return self._average[0]
        before_LEE, begun = self._average
        moved_LEE = torch.where(present_L11, update_average(before_LEE, current_LEE, decay), before_LEE)
        self._average = torch.where(begun, moved_LEE, current_LEE), begun | present_L11.any()
        return self._average[0]

    def _repel(self, field: FieldWeights) -> Tensor:
        """Add the repulsion to the output projections' gradients. Returns |repulsion| / |attraction| by layer."""
        settings, prototypes = self.settings, self.prototypes
        if settings.eta == 0:
            return torch.zeros(len(prototypes.layers), device=self.groups.device)
        values_LED, local = prototypes.values_LED, prototypes.local
        pull_LED = kernel_pull(values_LED, field.repulsion_LEE, tau=self.tau, kernel=settings.kernel)
        gradient = prototype_gradient(
            prototypes.projections(),
            values_LED[:, local],
            pull_LED[:, local].contiguous(),
            settings.power_iterations,
            prototypes.reduce,
        )
        attraction_LE = self.gradients.norms()
        repulsion_LE = prototypes.gather(gradient.norms(prototypes.reduce))
        scale_LE = torch.full_like(repulsion_LE, settings.eta) * self._loss_scale()
        if settings.repulsion_scale is RepulsionScale.relative:
            present_LE = repulsion_LE > 0
            scale_LE = torch.where(
                present_LE, settings.eta * attraction_LE / torch.where(present_LE, repulsion_LE, 1.0), 0.0
            )
        scale_LE = scale_LE * field.active_LE
        self._add(gradient, scale_LE[:, local])
        return diagnostics.repulsion_ratio(repulsion_LE * scale_LE, attraction_LE)

    def _add(self, gradient: RankTwo, scale_Le: Tensor) -> None:
        left_LeD2 = torch.stack([gradient.left_a_LED, gradient.left_b_LED], dim=-1) * scale_Le[..., None, None]
        for index, gradients in enumerate(self.gradients.outputs):
            gradients.add(left_LeD2[index], torch.stack([gradient.right_a[index], gradient.right_b[index]], dim=1))

    def _loss_scale(self) -> Tensor | float:
        return self.optimizer.get_loss_scale() if self.optimizer is not None else 1.0

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def sharded_state_dict(self, *, loading: bool = False) -> dict[str, Any]:
        """The average of C by the layer's global number, so that any layout can load it; for Megatron's checkpoints.

        Args:
            loading: give tensors to load into, which `load_sharded` then takes.
        """
        prototypes = self.prototypes
        if not prototypes.layers:
            return {}
        average_LEE = self.coactivation_LEE
        if loading:
            shape = (len(prototypes.layers), prototypes.experts, prototypes.experts)
            average_LEE = torch.zeros(shape, device=self.groups.device)
        assert average_LEE is not None
        return sharded_by_layer({"coactivation_LEE": average_LEE}, prototypes.weights, self.groups)

    def load_sharded(self, loaded: dict[str, Any], *, steps: int, average: bool) -> None:
        """Load the state from the tensors of `sharded_state_dict(loading=True)`, once a checkpoint has been read into them.

        Args:
            steps: transforms so far.
            average: whether there was an average; there is none before the first step with a token.
        """
        self.steps = steps
        if self.prototypes.layers and average:
            self.coactivation_LEE = stacked("coactivation_LEE", loaded, self.prototypes.weights)

    def state_dict(self) -> dict[str, Any]:
        """The state, prototypes included, as plain values and tensors on the CPU: for loops with checkpoints of their own.

        It is equal on all ranks of a pipeline stage and names layers by their global numbers.
        """
        state = self.prototypes.state
        layers: dict[int, dict[str, Tensor]] = {}
        for index, weights in enumerate(self.prototypes.weights if state is not None else ()):
            assert state is not None
            named = {
                "prototypes": state.values_LED,
                "residual": state.residual_LE,
                "coactivation": self.coactivation_LEE,
            }
            layers[weights.layer] = {k: v[index].cpu().clone() for k, v in named.items() if v is not None}
        return {"steps": self.steps, "prototypes_current": self.prototypes.current, "layers": layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ConfigError: it is of other layers or of other shapes.
        """
        prototypes, layers = self.prototypes, state["layers"]
        numbers = [weights.layer for weights in prototypes.weights]
        if layers and not set(numbers) <= set(layers):
            raise ConfigError(
                f"the Stein state is of MoE layers {sorted(layers)}, and this pipeline stage has {numbers}: load the state that "
                "was saved under this pipeline layout"
            )
        saved = [layers[number] for number in numbers] if layers else []
        for number, weights, tensors in zip(numbers, prototypes.weights, saved, strict=False):
            there, here = tuple(tensors["prototypes"].shape), (prototypes.experts, weights.hidden)
            if there != here:
                raise ConfigError(
                    f"the Stein state of layer {number} has prototypes of shape {there}, and the model's are {here} (experts, "
                    "hidden size): load the state of this model"
                )

        def together(name: str) -> Tensor:
            return torch.stack([tensors[name] for tensors in saved]).to(self.groups.device)

        self.steps, prototypes.current = int(state["steps"]), bool(state["prototypes_current"])
        prototypes.state = PrototypeState(together("prototypes"), together("residual")) if saved else None
        self.coactivation_LEE = together("coactivation") if saved and "coactivation" in saved[0] else None

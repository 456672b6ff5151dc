"""The Stein transform of expert gradients, between gradient reduction and the optimizer.

    routing statistics -> C, A+, A-;  prototypes -> K;  g~ = w+ g + eta * w- dK/dW

`SteinHook.transform` is called once a step, when `finalize_model_grads` has run. In this project's trainer that is an explicit
call; `install` puts it behind the `finalize_model_grads_func` of any Megatron loop.

Shape legend: L MoE layers of this pipeline stage, E experts, e local experts, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_vp2o.config.schema import SteinConfig
from megatron_vp2o.core import diagnostics
from megatron_vp2o.core.choices import RepulsionScale
from megatron_vp2o.core.coactivation import (
    active_experts,
    attraction_mask,
    coactivation_scores,
    repulsion_mask,
    update_average,
)
from megatron_vp2o.core.kernels import kernel_matrix, kernel_pull, temperature
from megatron_vp2o.core.prototypes import (
    RankTwo,
    Reduce,
    converged_prototypes,
    initial_prototypes,
    local_sum,
    power_iteration,
    prototype_gradient,
)
from megatron_vp2o.core.stein import attraction_weights, repulsion_weights
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.megatron.model.moe_layer import moe_layers
from megatron_vp2o.megatron.model.routing_statistics import SUMS
from megatron_vp2o.megatron.platform.world import current_groups
from megatron_vp2o.megatron.stein.expert_gradients import ExpertGradients
from megatron_vp2o.megatron.stein.expert_weights import ExpertWeights, OutputProjections, expert_weights
from megatron_vp2o.parallel.groups import Groups, gather_rows

logger = logging.getLogger(__name__)

REPULSION_DROWNS = 10.0
"""Repulsion over attraction from which the hook warns."""
SETTLED_ANGLE = 1e-5
"""A prototype rests when an iteration turns it by less than this many radians. What is left of its way is some 1e-3 then, and
16 updates of unmoved weights turn it by less than 2e-4: nothing beside a delta of 0.1."""
PROTOTYPE_SEED = 0
"""Seed of the directions from which power iteration starts; its result does not depend on it."""


@dataclass
class SteinState:
    """What the hook carries from step to step. Everything is the same on all ranks of a stage."""

    prototypes_LED: Tensor
    residual_LE: Tensor
    coactivation_LEE: Tensor | None = None
    """Moving average of C; None before the first step."""


@dataclass
class Field:
    """The field of one step: everything that is [L, E, E], and what it was made of."""

    scores_LEE: Tensor
    active_LE: Tensor
    kernel_LEE: Tensor
    attraction_LEE: Tensor
    repulsion_LEE: Tensor
    repelled_LEE: Tensor
    """A-, bool."""


class SteinHook:
    """Transforms the gradients of all MoE layers of this rank's pipeline stage.

    Args:
        model: a module (or model chunks) wrapped in Megatron's DistributedDataParallel. Its MoE layers become VP2OMoELayers.
        settings: which field.
        optimizer: Megatron's; needed only where it scales the loss (fp16).
        observe: gather routing statistics; without them there are prototypes, but no transform.

    Raises:
        ConfigError: for experts or layouts that it does not know, by name.
    """

    def __init__(
        self,
        model: Any,
        settings: SteinConfig,
        groups: Groups | None = None,
        *,
        optimizer: Any = None,
        observe: bool = True,
    ) -> None:
        self.settings, self.groups, self.optimizer = settings, groups or current_groups(), optimizer
        chunks: Sequence[Any] = model if isinstance(model, (list, tuple)) else [model]
        self.layers = [layer for chunk in chunks for layer in moe_layers(chunk)]
        for layer in self.layers:
            if observe:
                layer.observe()
        self.weights: list[ExpertWeights] = [expert_weights(layer) for layer in self.layers]
        self.state: SteinState | None = None
        self._steps = 0
        self._prototypes_current = False
        self._warned = False
        if not self.layers:
            return
        config = self.layers[0].config
        self.experts, self.topk = int(config.num_moe_experts), int(config.moe_router_topk)
        self.tau = temperature(settings.tau, self.experts, settings.temperature_scaling)
        self.gradients = ExpertGradients(
            chunks, self.weights, self.groups, self.experts, int(settings.chunk_mib * 2**20)
        )

    def weights_changed(self) -> None:
        """Tell the hook that prototypes are behind the weights; after `transform` it assumes so itself."""
        self._prototypes_current = False

    def carry(self) -> tuple[SteinState | None, int, bool]:
        """What goes on from step to step, as it is now; tensors are never changed in place, so nothing is copied."""
        return (None if self.state is None else replace(self.state)), self._steps, self._prototypes_current

    def put_back(self, carried: tuple[SteinState | None, int, bool]) -> None:
        """Return to what `carry` said: the step did not happen."""
        state, self._steps, self._prototypes_current = carried
        self.state = None if state is None else replace(state)

    @property
    def steps(self) -> int:
        """Steps transformed so far."""
        return self._steps

    # --- the transform ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def transform(self) -> dict[str, float]:
        """Replace the reduced expert gradients by the field's (only look, where `enabled` is false).

        A collective over the stage; call it once a step, before clipping.

        Returns:
            Metrics, means over the layers of all stages, equal on all ranks.
        """
        totals = self._collect()
        metrics: dict[str, Tensor] = {}
        if self.layers:
            counts_LEE, sums_LS = totals
            self.update_prototypes()
            field = self.field(counts_LEE, sums_LS[:, 0])
            ratio_L = torch.zeros(len(self.layers), device=self.groups.device)
            if self.settings.enabled:
                if self.settings.attraction:
                    self.gradients.mix(field.attraction_LEE)
                ratio_L = self._repel(field)
            metrics = self._metrics(field, counts_LEE, sums_LS, ratio_L)
        self._steps += 1
        self._prototypes_current = False  # an optimizer step follows
        means = self._mean_over_layers(metrics)
        self._warn_of_repulsion(means.get("stein/repulsion_ratio", 0.0))
        return means

    def _warn_of_repulsion(self, ratio: float) -> None:
        """Say once that the repulsion, of a fixed size, drowns the gradients: it does at fresh weights."""
        settings = self.settings
        if self._warned or settings.repulsion_scale is not RepulsionScale.absolute or ratio <= REPULSION_DROWNS:
            return
        self._warned = True
        if self.groups.rank == 0:
            logger.warning(
                "the repulsion between experts is %.3g times as large as the gradients that it is added to "
                "(stein/repulsion_ratio; algorithm.stein.eta=%g, repulsion_scale=absolute): lower eta by about that factor, "
                "or set algorithm.stein.repulsion_scale=relative",
                ratio,
                settings.eta,
            )

    def _collect(self) -> tuple[Tensor, Tensor]:
        """Statistics of all layers and ranks of the stage, in one reduction: counts [L, E, E] and sums [L, S]."""
        if not self.layers:
            return torch.empty(0), torch.empty(0)
        taken = []
        for layer in self.layers:
            assert layer.statistics is not None
            taken.append(layer.statistics.take(self.groups.device))
        flat = torch.cat([torch.cat([totals.counts_EE.flatten(), totals.sums]) for totals in taken])
        if self.groups.stage.size() > 1:
            dist.all_reduce(flat, group=self.groups.stage)
        rows_LX = flat.view(len(taken), -1)
        size = self.experts**2
        return rows_LX[:, :size].reshape(-1, self.experts, self.experts), rows_LX[:, size:]

    def field(self, counts_LEE: Tensor, tokens_L: Tensor) -> Field:
        """Masks, kernel and weights from this step's counts and the present prototypes; moves the average of C on."""
        settings, state = self.settings, self.state
        assert state is not None
        scores_LEE = self._move_average(state, counts_LEE, tokens_L)
        active_LE = active_experts(counts_LEE)
        near_LEE = attraction_mask(
            scores_LEE, active_LE, neighbours=settings.neighbours, threshold=settings.coactivation_threshold
        )
        far_LEE = repulsion_mask(near_LEE, active_LE)
        kernel_LEE = kernel_matrix(state.prototypes_LED, tau=self.tau, kernel=settings.kernel)
        return Field(
            scores_LEE,
            active_LE,
            kernel_LEE,
            attraction_weights(kernel_LEE, near_LEE, settings.normalisation),
            repulsion_weights(kernel_LEE, far_LEE, near_LEE, settings.normalisation),
            far_LEE,
        )

    def _move_average(self, state: SteinState, counts_LEE: Tensor, tokens_L: Tensor) -> Tensor:
        """The average of C with this step in it. A step without a token says nothing of C, and leaves the average alone."""
        current_LEE = coactivation_scores(counts_LEE, tokens_L).float()
        before_LEE = state.coactivation_LEE
        moved_LEE = update_average(before_LEE, current_LEE, self.settings.coactivation_ema)
        if before_LEE is not None:
            state.coactivation_LEE = torch.where(tokens_L[:, None, None] > 0, moved_LEE, before_LEE)
            return state.coactivation_LEE
        if bool((tokens_L > 0).any()):  # the run's first steps only: else there is an average
            state.coactivation_LEE = moved_LEE
        return moved_LEE

    def _repel(self, field: Field) -> Tensor:
        """Add the repulsion to the output projections' gradients. Returns |repulsion| / |attraction| by layer."""
        settings, state = self.settings, self.state
        assert state is not None
        if settings.eta == 0:
            return torch.zeros(len(self.layers), device=self.groups.device)
        pull_LED = kernel_pull(state.prototypes_LED, field.repulsion_LEE, tau=self.tau, kernel=self.settings.kernel)
        own = self._own()
        gradient = prototype_gradient(
            self._projections(),
            state.prototypes_LED[:, own],
            pull_LED[:, own].contiguous(),
            settings.power_iterations,
            self._reduce,
        )
        attraction_LE = self.gradients.norms()
        local_Le = gradient.norms(self._reduce)
        repulsion_LE = self._gather(local_Le)
        scale_LE = torch.full_like(repulsion_LE, settings.eta * self._loss_scale())
        if settings.repulsion_scale is RepulsionScale.relative:
            present_LE = repulsion_LE > 0
            scale_LE = torch.where(
                present_LE, settings.eta * attraction_LE / torch.where(present_LE, repulsion_LE, 1.0), 0.0
            )
        scale_LE = scale_LE * field.active_LE
        self._add(gradient, scale_LE[:, own])
        return diagnostics.repulsion_ratio(repulsion_LE * scale_LE, attraction_LE)

    def _add(self, gradient: RankTwo, scale_Le: Tensor) -> None:
        left_LeD2 = torch.stack([gradient.left_a_LED, gradient.left_b_LED], dim=-1) * scale_Le[..., None, None]
        for index, weights in enumerate(self.weights):
            right_e2F = torch.stack([gradient.right_a[index], gradient.right_b[index]], dim=1)
            rows = weights.parts[weights.output]
            gradients = [row.of(self.gradients.of(row.parameter)) for row in rows]
            weights.add_to_outputs(gradients, left_LeD2[index], right_e2F)

    def _loss_scale(self) -> float:
        scale = self.optimizer.get_loss_scale() if self.optimizer is not None else 1.0
        return float(scale)

    # --- prototypes ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_prototypes(self, *, always: bool = False) -> Tensor:
        """Bring the prototypes up to the present weights: [L, E, D]. A collective over the expert groups.

        A second call before the weights change returns the same.

        Args:
            always: also between two `prototype_interval`s: for who measures how far the weights have moved.
        """
        settings = self.settings
        if self.state is None:
            return self.settle_prototypes()
        if not self._prototypes_current and (always or self._steps % settings.prototype_interval == 0):
            local_LeD, residual_Le = power_iteration(
                self._projections(),
                self.state.prototypes_LED[:, self._own()].contiguous(),
                settings.power_iterations,
                self._reduce,
            )
            self.state.prototypes_LED, self.state.residual_LE = self._gather(local_LeD), self._gather(residual_Le)
        self._prototypes_current = True
        return self.state.prototypes_LED

    @torch.no_grad()
    def settle_prototypes(self) -> Tensor:
        """Bring the prototypes up to the present weights until their directions rest: [L, E, D]. A collective, as above.

        For the start, and for anchors: distances from an unsettled prototype would take its own arrival for movement.
        """
        first = self.weights[0]
        if self.state is None:
            start_LeD = initial_prototypes(
                [weights.layer for weights in self.weights],
                range(first.first, first.first + first.experts),
                first.hidden,
                PROTOTYPE_SEED,
            ).to(self.groups.device)
        else:
            start_LeD = self.state.prototypes_LED[:, self._own()].contiguous()
        found = converged_prototypes(
            self._projections(),
            start_LeD,
            angle=SETTLED_ANGLE,
            most=self.settings.initial_power_iterations,
            reduce=self._reduce,
        )
        average_LEE = None if self.state is None else self.state.coactivation_LEE
        self.state = SteinState(self._gather(found.prototypes_LED), self._gather(found.residual_LE), average_LEE)
        self._prototypes_current = True
        return self.state.prototypes_LED

    def _projections(self) -> Sequence[Tensor]:
        """Output projections of all layers: copies, which may be as large as a good part of the model. Where they would take
        more than the exchange's workspace may, each is made when it is needed, and no two are there at once."""
        shapes = [(weights.experts, weights.parts[weights.output][0].numel) for weights in self.weights]
        copied = sum(experts * numel * torch.float32.itemsize for experts, numel in shapes)
        lazy = OutputProjections(self.weights)
        return lazy if copied > self.settings.chunk_mib * 2**20 else list(lazy)

    def _own(self) -> slice:
        return slice(self.weights[0].first, self.weights[0].first + self.weights[0].experts)

    @property
    def _reduce(self) -> Reduce:
        """Sums over the ranks that share an expert; `local_sum` itself where none does, which needs one layer at a time."""
        return self._sum_of_shards if self.groups.etp.size() > 1 else local_sum

    def _sum_of_shards(self, partial: Tensor) -> Tensor:
        dist.all_reduce(partial, group=self.groups.etp)
        return partial

    def _gather(self, rows_LeX: Tensor) -> Tensor:
        """All experts' rows from all expert-parallel ranks' local ones: dimension 1 grows from e to E."""
        return gather_rows(rows_LeX.transpose(0, 1).contiguous(), self.groups.ep).transpose(0, 1).contiguous()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def prototypes_current(self) -> bool:
        """Whether the prototypes are those of the present weights, so that the next update has nothing to do."""
        return self._prototypes_current

    def sharded_state_dict(self, *, averages: bool, loading: bool = False) -> dict[str, Any]:
        """Prototypes, and co-activation averages where asked for, by the layer's global number, so that any layout can load them.

        Args:
            averages: there are none before the first transform.
        """
        if not self.layers:
            return {}
        if loading:
            shape = (len(self.layers), self.experts)
            self.state = SteinState(
                torch.zeros(*shape, self.weights[0].hidden, device=self.groups.device),
                torch.zeros(shape, device=self.groups.device),
                torch.zeros(*shape, self.experts, device=self.groups.device) if averages else None,
            )
        assert self.state is not None
        tree: dict[str, Any] = {}
        for index, weights in enumerate(self.weights):
            for name in _saved(averages):
                key = f"stein.{name}.{weights.layer}"
                value = getattr(self.state, name)[index]
                tree[key] = ShardedTensor.from_rank_offsets(key, value, replica_id=self.groups.stage.rank())
        return tree

    def load_state_dict(self, loaded: dict[str, Any], *, averages: bool, steps: int, prototypes_current: bool) -> None:
        """Take up what `sharded_state_dict(loading=True)` was filled with.

        Args:
            averages: as given to `sharded_state_dict`.
            steps: transforms so far.
            prototypes_current: whether the saved prototypes were those of the saved weights. If so, another power iteration
                would move them, and the resumed run would be another one.
        """
        self._steps = steps
        self._prototypes_current = prototypes_current
        if not self.layers:
            return
        parts = {
            name: torch.stack([loaded[f"stein.{name}.{weights.layer}"] for weights in self.weights])
            for name in _saved(averages)
        }
        self.state = SteinState(**parts)

    # --- metrics ------------------------------------------------------------------------------------------------------

    def _metrics(self, field: Field, counts_LEE: Tensor, sums_LS: Tensor, ratio_L: Tensor) -> dict[str, Tensor]:
        """One number a layer for each metric."""
        assert self.state is not None
        sums = dict(zip(SUMS, sums_LS.unbind(1), strict=True))
        tokens_L = sums["tokens"].clamp(min=1)
        loads_LE = counts_LEE.diagonal(dim1=-2, dim2=-1)
        gram = diagnostics.prototype_overlap(self.state.prototypes_LED)
        return {
            _TOKENS: sums["tokens"],
            "moe/router_entropy": sums["router_entropy"] / tokens_L,
            "moe/expert_utilisation": diagnostics.expert_utilisation(loads_LE),
            "moe/effective_experts": diagnostics.effective_experts(loads_LE),
            "moe/load_violation": diagnostics.load_violation(loads_LE),
            "moe/output_overlap": sums["output_overlap"] / sums["output_pairs"].clamp(min=1),
            "moe/orthogonality_loss": sums["orthogonality"] / tokens_L,
            "moe/variance_loss": sums["variance"] / tokens_L,
            "stein/prototype_overlap": gram.mean,
            "stein/prototype_overlap_max": gram.maximum,
            "stein/prototype_rank": gram.effective_rank,
            "stein/prototype_residual": self.state.residual_LE.mean(-1),
            "stein/coactivation_sparsity": diagnostics.coactivation_sparsity(counts_LEE),
            "stein/self_weight": diagnostics.self_weight(field.attraction_LEE, field.active_LE),
            "stein/repulsion_ratio": ratio_L,
        }

    def _mean_over_layers(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Means over the layers of all pipeline stages, in one reduction and one host synchronisation.

        Without a token there are those of prototypes only: nothing else was measured.
        """
        names = [*sorted(METRICS), _TOKENS]
        rows = [metrics[name].double().sum() if metrics else torch.zeros((), dtype=torch.float64) for name in names]
        flat = (
            torch.stack([*rows, torch.tensor(float(len(self.layers)), dtype=torch.float64)])
            if not metrics
            else (torch.stack([*rows, rows[0].new_tensor(float(len(self.layers)))]))
        )
        flat = flat.to(self.groups.device)
        if self.groups.pp.size() > 1:
            dist.all_reduce(flat, group=self.groups.pp)
        *values, layers = flat.tolist()
        means = {name: value / max(layers, 1.0) for name, value in zip(names, values, strict=True)}
        measured = means.pop(_TOKENS) > 0
        return {name: value for name, value in means.items() if measured or name.startswith("stein/prototype_")}


_TOKENS = "tokens"


def _saved(averages: bool) -> tuple[str, ...]:
    """Names of the tensors of `SteinState` that a checkpoint has."""
    return ("prototypes_LED", "residual_LE", *(("coactivation_LEE",) if averages else ()))


METRICS = (
    "moe/router_entropy",
    "moe/expert_utilisation",
    "moe/effective_experts",
    "moe/load_violation",
    "moe/output_overlap",
    "moe/orthogonality_loss",
    "moe/variance_loss",
    "stein/prototype_overlap",
    "stein/prototype_overlap_max",
    "stein/prototype_rank",
    "stein/prototype_residual",
    "stein/coactivation_sparsity",
    "stein/self_weight",
    "stein/repulsion_ratio",
)


@dataclass
class Installed:
    """A hook in somebody else's loop."""

    hook: SteinHook
    metrics: dict[str, float]
    """Of the last step; filled in by the hook."""
    _remove: Callable[[], None]

    def remove(self) -> None:
        """Take the hook out again; the layers stop observing."""
        self._remove()


def install(model: Any, optimizer: Any, config: SteinConfig) -> Installed:
    """Put the transform into a stock Megatron training loop, behind its gradient reduction.

    Args:
        model: what the loop hands to Megatron's schedules: one DistributedDataParallel module or a list of chunks.
        optimizer: Megatron's optimizer.
        config: which field; `enabled` is taken for granted.

    Raises:
        ConfigError: if the model's configuration has no `finalize_model_grads_func` yet, or the hook is in it already.
    """
    chunks = model if isinstance(model, (list, tuple)) else [model]
    hook = SteinHook(chunks, replace(config, enabled=True), optimizer=optimizer)
    model_config = hook.layers[0].config if hook.layers else _config_of(chunks[0])
    finalize = model_config.finalize_model_grads_func
    if finalize is None:
        raise ConfigError(
            "the model's config.finalize_model_grads_func is None, so gradients are not reduced by the schedule: set it "
            "(megatron.core.distributed.finalize_model_grads) before install()"
        )
    if hasattr(finalize, "stein_hook"):
        raise ConfigError("the Stein hook is installed in this model already: call remove() on that one first")
    metrics: dict[str, float] = {}

    def finalize_then_transform(*args: Any, **kwargs: Any) -> Any:
        result = finalize(*args, **kwargs)
        metrics.update(hook.transform())
        return result

    finalize_then_transform.stein_hook = hook  # type: ignore[attr-defined]
    model_config.finalize_model_grads_func = finalize_then_transform

    def remove() -> None:
        model_config.finalize_model_grads_func = finalize
        for layer in hook.layers:
            layer.statistics = None

    return Installed(hook, metrics, remove)


def _config_of(module: Any) -> Any:
    while not hasattr(module, "decoder"):
        module = module.module
    return module.config

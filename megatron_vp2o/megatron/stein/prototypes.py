"""Prototypes of experts: the dominant left singular vector of each expert's output projection, followed by power iteration.

The Stein transform takes its kernel from them (docs/method.md section 4), the trust region its barycenters (section 7).

Shape legend: L MoE layers of this pipeline stage, E experts, e local experts, D hidden size, X anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_vp2o.config.schema import SteinConfig
from megatron_vp2o.core.prototypes import Reduce, converged_prototypes, initial_prototypes, local_sum, power_iteration
from megatron_vp2o.megatron.model.moe_layer import VP2OMoELayer, moe_layers
from megatron_vp2o.megatron.platform.world import current_groups
from megatron_vp2o.megatron.stein.expert_weights import ExpertWeights, OutputProjections, expert_weights
from megatron_vp2o.parallel.groups import Groups, gather_rows

SETTLED_ANGLE = 1e-5
"""A prototype rests when an iteration turns it by less than this many radians. It is then about 1e-3 radians from its limit.
Sixteen more updates with unchanged weights turn it by less than 2e-4, far below a trust region's delta of 0.1."""
PROTOTYPE_SEED = 0
"""Seed of the directions from which power iteration starts; its result does not depend on it."""


@dataclass(frozen=True)
class PrototypeState:
    """Prototypes of one moment. The same on all ranks of a stage; tensors are never changed in place."""

    values_LED: Tensor
    residual_LE: Tensor
    """How far each is from a singular vector: |W W^T v - lambda v| / lambda."""


class ExpertPrototypes:
    """The prototypes of all MoE layers of this rank's pipeline stage.

    Args:
        model: a module or a list of model chunks. Its MoE layers become VP2OMoELayers.
        settings: `power_iterations` of an update, `initial_power_iterations` of the first, and `chunk_mib`, the bound of copies.

    Raises:
        ConfigError: for experts that it does not know, by name.
    """

    def __init__(self, model: Any, settings: SteinConfig, groups: Groups | None = None) -> None:
        self.settings, self.groups = settings, groups or current_groups()
        self.chunks: Sequence[Any] = model if isinstance(model, (list, tuple)) else [model]
        self.layers: list[VP2OMoELayer] = [layer for chunk in self.chunks for layer in moe_layers(chunk)]
        self.weights: list[ExpertWeights] = [expert_weights(layer) for layer in self.layers]
        self.experts = int(self.layers[0].config.num_moe_experts) if self.layers else 0
        self.state: PrototypeState | None = None
        """None before the first update."""
        self.current = False
        """Whether `state` is that of the present weights, so that an update has nothing to do."""

    def mark_stale(self) -> None:
        """Make the next `update` compute: the weights have changed."""
        self.current = False

    def save_state(self) -> tuple[PrototypeState | None, bool]:
        """The present state, for `restore_state`. Costs nothing: tensors are never changed in place."""
        return self.state, self.current

    def restore_state(self, saved: tuple[PrototypeState | None, bool]) -> None:
        """Return to what `save_state` returned."""
        self.state, self.current = saved

    @property
    def values_LED(self) -> Tensor:
        """Unit vectors, [L, E, D] float32."""
        assert self.state is not None, "update() comes first"
        return self.state.values_LED

    @torch.no_grad()
    def update(self) -> Tensor:
        """Bring the prototypes up to the present weights: [L, E, D]. A collective over the expert groups.

        A second call before `mark_stale` returns the same.
        """
        if self.state is None:
            return self.settle()
        if not self.current:
            local_LeD, residual_Le = power_iteration(
                self.projections(),
                self.state.values_LED[:, self.local].contiguous(),
                self.settings.power_iterations,
                self.reduce,
            )
            self.state = PrototypeState(self.gather(local_LeD), self.gather(residual_Le))
            self.current = True
        return self.state.values_LED

    @torch.no_grad()
    def settle(self) -> Tensor:
        """Iterate under the present weights until directions rest: [L, E, D]. A collective, as `update`.

        For the start and for anchors: a distance from a prototype that still moves would measure that movement, too.
        """
        first = self.weights[0]
        if self.state is None:
            start_LeD = initial_prototypes(
                [weights.layer for weights in self.weights],
                range(first.first, first.first + first.experts),
                first.hidden,
                PROTOTYPE_SEED,
            ).to(self.groups.device, non_blocking=True)
        else:
            start_LeD = self.state.values_LED[:, self.local].contiguous()
        found = converged_prototypes(
            self.projections(),
            start_LeD,
            angle=SETTLED_ANGLE,
            most=self.settings.initial_power_iterations,
            reduce=self.reduce,
        )
        self.state = PrototypeState(self.gather(found.prototypes_LED), self.gather(found.residual_LE))
        self.current = True
        return self.state.values_LED

    # --- local experts and the others ---------------------------------------------------------------------------------

    def projections(self) -> Sequence[Tensor]:
        """Output projections of the local experts, one [e, D, F] a layer.

        They are copies, and may be as large as a good part of the model. Where they would take more than `chunk_mib`, each is
        made when it is asked for, and no two exist at once.
        """
        shapes = [(weights.experts, weights.parts[weights.output][0].numel) for weights in self.weights]
        copied = sum(experts * numel * torch.float32.itemsize for experts, numel in shapes)
        lazy = OutputProjections(self.weights)
        return lazy if copied > self.settings.chunk_mib * 2**20 else list(lazy)

    @property
    def local(self) -> slice:
        """The local experts among all."""
        return slice(self.weights[0].first, self.weights[0].first + self.weights[0].experts)

    @property
    def reduce(self) -> Reduce:
        """Sum over the ranks that share an expert. Where no rank shares one it is `local_sum`, that very object: `power_iteration`
        checks for it, and then works layer by layer to save memory."""
        return self._sum_of_shards if self.groups.etp.size() > 1 else local_sum

    def _sum_of_shards(self, partial: Tensor) -> Tensor:
        dist.all_reduce(partial, group=self.groups.etp)
        return partial

    def gather(self, rows_LeX: Tensor) -> Tensor:
        """All experts' rows from all expert-parallel ranks' local ones: dimension 1 grows from e to E. Collective."""
        return gather_rows(rows_LeX.transpose(0, 1).contiguous(), self.groups.ep).transpose(0, 1).contiguous()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def sharded_state_dict(self, *, loading: bool = False) -> dict[str, Any]:
        """Prototypes by the layer's global number, so that any layout can load them.

        Args:
            loading: give tensors to load into, which `load_state_dict` then takes; what is here stays until then.
        """
        if not self.layers:
            return {}
        if loading:
            shape, device = (len(self.layers), self.experts), self.groups.device
            state = PrototypeState(
                torch.zeros(*shape, self.weights[0].hidden, device=device), torch.zeros(shape, device=device)
            )
        else:
            assert self.state is not None
            state = self.state
        named = {"prototypes_LED": state.values_LED, "residual_LE": state.residual_LE}
        return sharded_by_layer(named, self.weights, self.groups)

    def load_state_dict(self, loaded: dict[str, Any], *, current: bool) -> None:
        """Load the state from the tensors of `sharded_state_dict(loading=True)`, once a checkpoint has been read into them.

        Args:
            current: whether the saved prototypes were those of the saved weights. If so, another power iteration would move
                them, and the resumed run would be another one.
        """
        self.current = current
        if self.layers:
            self.state = PrototypeState(
                stacked("prototypes_LED", loaded, self.weights), stacked("residual_LE", loaded, self.weights)
            )


def sharded_by_layer(named: dict[str, Tensor], weights: Sequence[ExpertWeights], groups: Groups) -> dict[str, Any]:
    """Megatron's description of tensors [L, ...] that are equal on a stage's ranks, one entry `stein.NAME.LAYER` a layer."""
    return {
        (key := f"stein.{name}.{layer.layer}"): ShardedTensor.from_rank_offsets(
            key, tensor[index], replica_id=groups.stage.rank()
        )
        for index, layer in enumerate(weights)
        for name, tensor in named.items()
    }


def stacked(name: str, loaded: dict[str, Any], weights: Sequence[ExpertWeights]) -> Tensor:
    """The tensor [L, ...] of which `sharded_by_layer` described the layers."""
    return torch.stack([loaded[f"stein.{name}.{layer.layer}"] for layer in weights])

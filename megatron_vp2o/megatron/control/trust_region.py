"""The trust region on the learner: contexts from its forward pass, the anchor, the distance, and what becomes of a step.

The learner's gates are recomputed from the sampled router inputs of the step's own forward pass, with its routers as they are
after the step. So the step's changes of routers and prototypes are measured exactly; what it changed in the inputs of the routers
(attention, norms, earlier layers) is not seen, because they are not computed again. The actors' gates are those that the
rollouts logged, or, where an engine logs none, what the anchor's routers make of the same inputs.

Shape legend: L MoE layers of this pipeline stage, C contexts of this rank, E experts, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_vp2o.config.schema import ControlMode, TrustRegionConfig
from megatron_vp2o.core.calibration import Calibration
from megatron_vp2o.core.deferred import Deferred, merged, read
from megatron_vp2o.core.trust_region import Outcome, consecutive_rejections, deviation, renormalised, verdict
from megatron_vp2o.errors import ControlError
from megatron_vp2o.megatron.control.contexts import ContextSampler
from megatron_vp2o.megatron.control.snapshot import Snapshot
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.learner.step_state import StepState
from megatron_vp2o.megatron.model.moe_layer import VP2OMoELayer
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes
from megatron_vp2o.parallel.groups import gather_rows
from megatron_vp2o.parallel.row_exchange import RowExchange
from megatron_vp2o.rl.interfaces import PolicyDrift, Restorable
from megatron_vp2o.rl.types import LoggedGates, Rollouts, StepStats, TrainBatch

DRIFT = "trust_region/policy_drift"
_DISTANCES = ("trust_region/distance", "trust_region/distance_gates", "trust_region/distance_prototypes")
_LEARNT = ("product", "square", "pairs")  # of the calibration
_COUNTERS = ("consecutive_rejections", "steps_rejected", "steps_halved")


class TrustRegion:
    """Takes optimizer steps for a policy, no further than the region allows. Implements `rl.interfaces.Stepper`.

    Args:
        prototypes: of the policy's experts.
        others: what else forward, backward or the gradient transform change, and a rejected step must put back.
        drift: measures what a step did to the policy itself, for the verdict and for delta; None where `drift_share` is 0.
    """

    def __init__(
        self,
        policy: MegatronPolicy,
        prototypes: ExpertPrototypes,
        settings: TrustRegionConfig,
        *others: Restorable,
        drift: PolicyDrift | None = None,
    ) -> None:
        self.policy, self.prototypes, self.settings, self.drift = policy, prototypes, settings, drift
        self.calibration = Calibration()
        self.groups = policy.groups
        self.consecutive_rejections = 0
        self.steps_rejected = 0
        self.steps_halved = 0
        self.by_layer: list[float] = []
        """D of the last step by layer of all stages."""
        self._anchor: dict[str, Tensor] | None = None
        self._others = (prototypes, *others)
        self._saved: tuple[StepState, list[Any]] = policy.save_state(), [part.save_state() for part in self._others]
        self._logged: LoggedGates | None = None
        self._fetched_LCE: Tensor | None = None  # of the step's contexts, where other ranks logged them
        self.contexts = ContextSampler(prototypes.layers, settings.contexts_per_rank, policy.share)
        policy.watcher = self.contexts

    # --- the anchor ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_anchor(self) -> None:
        """Make the present weights the actors': called when these have been refreshed. Collective."""
        self.policy.gather_parameters()
        self.prototypes.mark_stale()
        self._anchor = {}
        if self.prototypes.layers:
            self._anchor["prototypes"] = self.prototypes.settle().clone()
        for layer in self.prototypes.layers:
            for name, tensor in _router_tensors(layer).items():
                self._anchor[f"{name}.{layer.layer_number}"] = tensor.detach().clone()

    def sharded_state_dict(self, *, loading: bool = False) -> dict[str, Any]:
        """The anchor by the layer's global number, so that any layout can load it."""
        if loading:
            self._anchor = {}
        replica = self.groups.stage.rank()
        tree: dict[str, Any] = {}
        for index, layer in enumerate(self.prototypes.layers):
            assert self._anchor is not None
            shape = (self.prototypes.experts, self.prototypes.weights[index].hidden)
            zeros = torch.zeros(shape, device=self.groups.device)
            value = zeros if loading else self._anchor["prototypes"][index]
            key = f"anchor.prototypes.{layer.layer_number}"
            tree[key] = ShardedTensor.from_rank_offsets(key, value, replica_id=replica)
            for name, tensor in _router_tensors(layer).items():
                key = f"anchor.{name}.{layer.layer_number}"
                value = torch.zeros_like(tensor) if loading else self._anchor[f"{name}.{layer.layer_number}"]
                tree[key] = ShardedTensor.from_rank_offsets(key, value.detach(), replica_id=replica)
        return tree

    def counters(self) -> dict[str, float]:
        """Plain numbers that a resumed run needs."""
        learnt = {name: getattr(self.calibration, name) for name in _LEARNT}
        return {name: getattr(self, name) for name in _COUNTERS} | learnt

    def load_state_dict(self, loaded: dict[str, Any], counters: dict[str, float]) -> None:
        """Load the anchor from the tensors of `sharded_state_dict(loading=True)`, once a checkpoint has been read into them, and
        the numbers of `counters`."""
        for name in _COUNTERS:
            setattr(self, name, counters[name])
        # checkpoints from before there was a calibration have none of its numbers
        learnt: dict[str, Any] = {name: counters[name] for name in _LEARNT if name in counters}
        self.calibration = Calibration(**learnt)
        self._anchor = {}
        if not self.prototypes.layers:
            return
        numbers = [layer.layer_number for layer in self.prototypes.layers]
        self._anchor["prototypes"] = torch.stack([loaded[f"anchor.prototypes.{number}"] for number in numbers])
        for layer in self.prototypes.layers:
            for name in _router_tensors(layer):
                self._anchor[f"{name}.{layer.layer_number}"] = loaded[f"anchor.{name}.{layer.layer_number}"]

    @property
    def ready(self) -> bool:
        """Whether there is an anchor."""
        return self._anchor is not None

    def observe_rollouts(self, rollouts: Rollouts) -> None:
        """Take the actor's gates from what the rollouts carry; without them the anchor's routers are asked."""
        self._logged = rollouts.gates
        self.contexts.stride = 1 if rollouts.gates is None else rollouts.gates.stride

    # --- the step -----------------------------------------------------------------------------------------------------

    def begin(self, batch: TrainBatch) -> None:
        """Before the forward pass: remember what the passes and the transform change, in case the step does not happen."""
        if self.drift is not None:
            self.drift.observe(batch)
        self._fetched_LCE = None
        self._saved = self.policy.save_state(), [part.save_state() for part in self._others]

    def _restore(self) -> None:
        policy, others = self._saved
        self.policy.restore_state(policy)
        for part, saved in zip(self._others, others, strict=True):
            part.restore_state(saved)

    @torch.no_grad()
    def step(self, measured: Deferred[dict[str, float]]) -> StepStats:
        """An optimizer step, halved or taken back where it leaves the region. One verdict for all ranks; collective.

        The host waits once for a step that is accepted, and once more for each halving: only the verdict says what comes next.

        Raises:
            ControlError: after `max_consecutive_rejections` in a row.
        """
        present = self.prototypes.save_state()  # each attempt is measured from here, as if it had been the only one
        before, stats, first = self._propose(measured)
        if stats.skipped:
            self._restore()
            self.contexts.drop()
            return stats
        halvings = 0
        metrics = first
        delta = (
            self.delta
        )  # one bound for all attempts at this step; what is learnt from it counts from the next one on
        outcome = self._judge(metrics, 0)
        while before is not None and outcome is Outcome.backtrack:
            halvings += 1
            before.halve()
            self._saved[0].halve()
            self.prototypes.restore_state(present)
            metrics = self._look().read()
            outcome = self._judge(metrics, halvings)
        rejected = outcome is Outcome.reject
        if before is not None and rejected:
            before.restore()
            self._restore()
        self.contexts.drop()
        metrics |= {
            "trust_region/delta": delta,
            "trust_region/proposed": first["trust_region/distance"],
            "trust_region/halvings": float(halvings),
        }
        if DRIFT in first:
            metrics["trust_region/policy_drift_proposed"] = first[DRIFT]
            self.calibration.observe(first["trust_region/distance"], first[DRIFT])
        self._count(rejected, halvings, metrics)
        metrics |= {
            "trust_region/halved": float(self.steps_halved),
            "trust_region/rejected": float(self.steps_rejected),
        }
        return replace(stats, metrics={**stats.metrics, **metrics}, rejected=rejected)

    def _propose(self, measured: Deferred[dict[str, float]]) -> tuple[Snapshot | None, StepStats, dict[str, float]]:
        """Take the whole step and look at it. With a snapshot to return to it is taken before anyone knows whether the optimizer
        should have refused it, so that one transfer tells that, what the passes measured, and what the step did.

        Returns:
            The snapshot, what is known of the step, and what `_look` found; nothing where it is to be skipped.
        """
        policy, settings = self.policy, self.settings
        lr, norm = policy.learning_rate, policy.gradient_norm()
        if settings.mode is not ControlMode.enforce:
            stats = StepStats.of(*read(measured, norm), lr=lr)
            if stats.skipped:
                return None, stats, {}
            policy.take_step()
            return None, stats, self._look().read()
        before = Snapshot(policy, on_host=settings.snapshot_on_host)
        policy.take_step()
        metrics, grad_norm, seen = read(measured, norm, self._look())
        stats = StepStats.of(metrics, grad_norm, lr=lr)
        if stats.skipped:
            before.restore()
        return before, stats, seen

    @property
    def delta(self) -> float:
        """The bound of D in force: the setting, or what the run has learnt."""
        settings = self.settings
        if settings.delta_nats is None:
            return settings.delta
        return self.calibration.delta(settings.delta_nats, settings.delta)

    def _look(self) -> Deferred[dict[str, float]]:
        """What an attempt at a step did: distances of barycenters, and where it is wanted the policy's drift. Collective."""
        distances = self._measure()
        if self.drift is None:
            return distances
        return merged(distances, self.drift.measure().then(lambda nats: {DRIFT: nats}))

    def _judge(self, metrics: dict[str, float], attempt: int) -> Outcome:
        settings = self.settings
        most = settings.max_policy_drift
        return verdict(
            metrics["trust_region/distance"],
            self.delta,
            attempt=attempt,
            max_backtracks=settings.max_backtracks,
            drift=metrics.get(DRIFT, 0.0),
            max_drift=math.inf if most is None else most,
            accept_all=settings.mode is not ControlMode.enforce,
        )

    def _count(self, rejected: bool, halvings: int, metrics: dict[str, float]) -> None:
        self.steps_halved += halvings > 0 and not rejected
        self.steps_rejected += rejected
        outcome = Outcome.reject if rejected else Outcome.accept
        self.consecutive_rejections = consecutive_rejections(self.consecutive_rejections, outcome)
        limit = self.settings.max_consecutive_rejections
        if self.consecutive_rejections >= limit:
            raise ControlError(
                f"{limit} steps in a row left the trust region: the last one moved the barycenters by "
                f"D={metrics['trust_region/proposed']:.4g} and algorithm.trust_region.delta={metrics['trust_region/delta']:g}"
                f"{self._drift_said(metrics)}, even when halved {self.settings.max_backtracks} times; lower optimizer.lr or raise "
                "what was exceeded (the last checkpoint is untouched)"
            )

    def _drift_said(self, metrics: dict[str, float]) -> str:
        if DRIFT not in metrics:
            return ""
        bound = self.settings.max_policy_drift
        return (
            f", and the policy by {metrics['trust_region/policy_drift_proposed']:.4g} nats a token and "
            f"algorithm.trust_region.max_policy_drift={'null' if bound is None else f'{bound:g}'}"
        )

    # --- the distance -------------------------------------------------------------------------------------------------

    def _measure(self) -> Deferred[dict[str, float]]:
        """Mean distance over contexts and layers of all ranks, and by layer. Collective."""
        assert self._anchor is not None
        self.policy.gather_parameters()
        self.prototypes.mark_stale()
        layers = int(self.policy.model.config.num_layers)
        sums_L4 = torch.zeros(layers, 4, dtype=torch.float64, device=self.groups.device)
        if self.prototypes.layers:
            self._fetch_gates()
            prototypes_LED = self.prototypes.update()
            for index, layer in enumerate(self.prototypes.layers):
                inputs_CD = layer.contexts()
                parts = deviation(
                    _gates(layer, inputs_CD, {}),  # over the experts that were replayed, where some were
                    prototypes_LED[index],
                    self._anchor_gates(index, layer, inputs_CD),
                    self._anchor["prototypes"][index],
                )
                sums_L4[layer.layer_number - 1] = torch.stack(parts)
        dist.all_reduce(sums_L4, group=self.groups.world)
        mean_4 = sums_L4.sum(0)
        means_3 = mean_4[:3] / mean_4[3].clamp(min=1)
        means = torch.cat([means_3, sums_L4[:, 0] / sums_L4[:, 3].clamp(min=1)])

        def finish(on_host: list[Tensor]) -> dict[str, float]:
            *mean_3, self.by_layer = *on_host[0][:3].tolist(), on_host[0][3:].tolist()
            return dict(zip(_DISTANCES, mean_3, strict=True)) | {"trust_region/distance_layer_max": max(self.by_layer)}

        return Deferred((means,), finish)

    def _anchor_gates(self, index: int, layer: VP2OMoELayer, inputs_CD: Tensor) -> Tensor:
        """The actor's gates at the contexts of this step, [C, E]: as logged, or as the anchor's router says."""
        keys_C2 = self.contexts.keys()
        if self._logged is None or keys_C2 is None:
            return _gates(layer, inputs_CD, self._router_of_anchor(layer))
        if self._fetched_LCE is not None:
            return renormalised(self._fetched_LCE[index])
        row_C, before_C = keys_C2.to(self.groups.device, non_blocking=True).unbind(1)
        return renormalised(self._logged.gates_LMJE[index, row_C, before_C // self._logged.stride])

    def _fetch_gates(self) -> None:
        """The actors' gates at this step's contexts, from the ranks that logged them, where rows have changed their rank.
        Collective over data-parallel ranks, once a step."""
        rank_C, keys_C2 = self.contexts.ranks(), self.contexts.keys()
        if self._fetched_LCE is not None or self._logged is None or rank_C is None or keys_C2 is None:
            return
        group = self.groups.dp
        counts = torch.bincount(rank_C, minlength=group.size())
        arriving = gather_rows(counts[None].to(self.groups.device, non_blocking=True), group)[:, group.rank()].tolist()
        exchange = RowExchange(rank_C, arriving, group, self.groups.device)
        asked_A2 = exchange.send(keys_C2).to(self.groups.device, non_blocking=True)
        row_A, before_A = asked_A2.unbind(1)  # what the other ranks ask of this one
        found_LAE = self._logged.gates_LMJE[:, row_A, before_A // self._logged.stride]
        self._fetched_LCE = exchange.back(found_LAE.transpose(0, 1)).transpose(0, 1).to(self.groups.device)

    def _router_of_anchor(self, layer: VP2OMoELayer) -> dict[str, Tensor]:
        assert self._anchor is not None
        return {name: self._anchor[f"{name}.{layer.layer_number}"] for name in _router_tensors(layer)}


def _router_tensors(layer: VP2OMoELayer) -> dict[str, Tensor]:
    """What decides gates: weight, and where there are any, bias and expert bias."""
    router = layer.router
    named = {"weight": router.weight, "bias": getattr(router, "bias", None), "expert_bias": router.expert_bias}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _gates(layer: VP2OMoELayer, inputs_CD: Tensor, router: dict[str, Tensor]) -> Tensor:
    """Dense normalised gates of a layer's router, [C, E], with other tensors in the place of its own if given.

    Where routes were replayed at the contexts, the gates are of these experts.
    """
    module, routes_CK = layer.router, layer.context_routes()
    if not len(inputs_CD):  # a rank without rows in this minibatch; Megatron's router cannot route nothing
        return inputs_CD.new_zeros(0, module.weight.shape[0], dtype=torch.float32)
    training = module.training
    module.eval()  # no auxiliary losses, no jitter, no counting
    if layer.replay is not None:
        layer.replay.replay(routes_CK)
    try:
        probs, _ = torch.func.functional_call(module, router, (inputs_CD[:, None],))
    finally:
        module.train(training)
        if layer.replay is not None:
            layer.replay.replay(None)
    return renormalised(probs.reshape(len(inputs_CD), -1).float())

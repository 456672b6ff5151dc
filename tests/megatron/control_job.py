"""What the ranks of test_trust_region.py do: take steps, have one rejected in between, and compare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_vp2o.config.schema import ControlMode, Precision, TrustRegionConfig
from megatron_vp2o.errors import ControlError
from megatron_vp2o.megatron.actor.generation import MegatronEngine
from megatron_vp2o.megatron.control.trust_region import TrustRegion
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.platform import world
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes
from megatron_vp2o.megatron.stein.transform import SteinTransform
from megatron_vp2o.rl.batching import policy_batch, split
from megatron_vp2o.rl.objectives import next_token
from megatron_vp2o.rl.types import SamplingParams, StepStats
from tests.megatron.policy_job import PROMPTS
from tests.megatron.stein_job import ROWS, VOCAB, global_batch, small_config

WIDE, NARROW = 1.9, 1e-9


class Learner:
    """A policy with transform and region, stepped by hand."""

    def __init__(self, layout: dict[str, Any]) -> None:
        layout = dict(layout)
        precision = Precision[layout.pop("precision", "fp32")]
        on_host = layout.pop("on_host", False)
        config = small_config(model={"precision": precision}, **layout)
        self.groups = world.start(config.parallel, config.seed)
        self.policy = MegatronPolicy(config, self.groups, vocab_size=VOCAB, optimizer_steps=20)
        self.transform = SteinTransform(
            ExpertPrototypes(self.policy.ddp, config.algorithm.stein, self.groups), optimizer=self.policy.optimizer
        )
        settings = TrustRegionConfig(mode=ControlMode.enforce, contexts_per_rank=64, snapshot_on_host=on_host)
        self.region = TrustRegion(self.policy, self.transform.prototypes, settings, self.transform)
        self.region.set_anchor()

    def step(self, batch: int, delta: float) -> StepStats:
        share = ROWS // self.groups.dp_size
        rows = range(self.groups.dp_rank * share, (self.groups.dp_rank + 1) * share)
        self.region.settings = replace(self.region.settings, delta=delta)
        part = global_batch(batch, rows)
        self.region.begin(part)
        measured = self.policy.accumulate_gradients(part, next_token, micro_batch_size=3)
        self.transform.apply()
        return self.region.step(measured)

    def bits(self) -> list[torch.Tensor]:
        """Everything that a step changes: weights, masters, moments, learning rate, prototypes, co-activation average."""
        self.policy.gather_parameters()
        tensors = [parameter.detach().clone() for parameter in self.policy.model.parameters()]
        for optimizer in self.policy.optimizers():
            for group in optimizer.optimizer.param_groups:
                for parameter in group["params"]:
                    tensors.append(parameter.detach().clone())
                    state = optimizer.optimizer.state.get(parameter, {})
                    tensors.extend(state[key].clone() for key in sorted(state) if isinstance(state[key], torch.Tensor))
        tensors.append(torch.tensor([self.policy.scheduler.num_steps, self.transform.steps]))
        if self.transform.prototypes.state is not None:
            state_ = (*vars(self.transform.prototypes.state).values(), self.transform.coactivation_LEE)
            tensors.extend(t.clone() for t in state_ if t is not None)
        return tensors


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    results = []
    for layout in layouts:
        try:
            results.append(rejections(layout))
        finally:
            world.stop_model_parallel()
    world.stop()
    return results


def rejections(layout: dict[str, Any]) -> dict[str, Any]:
    plain = Learner(layout)
    steps = [plain.step(batch, WIDE) for batch in (0, 1, 2)]
    expected = plain.bits()
    world.stop_model_parallel()

    disturbed = Learner(layout)
    first_of_all = disturbed.bits()
    rejected = [disturbed.step(7, NARROW)]  # before the optimizer has any state
    untouched = [same(first_of_all, disturbed.bits())]
    disturbed.step(0, WIDE)
    for batch in (8, 9):
        before = disturbed.bits()
        rejected.append(disturbed.step(batch, NARROW))
        untouched.append(same(before, disturbed.bits()))
    disturbed.step(1, WIDE)
    disturbed.step(2, WIDE)
    result: dict[str, Any] = {
        "distance": [stats.metrics["trust_region/distance"] for stats in steps],
        "by_layer": disturbed.region.by_layer,
        "accepted": not any(stats.rejected for stats in steps),
        "rejected": all(stats.rejected for stats in rejected),
        "halvings": [stats.metrics["trust_region/halvings"] for stats in rejected],
        "untouched": untouched,
        "same_end": same(expected, disturbed.bits()),
        "consecutive": disturbed.region.consecutive_rejections,
    }
    # A step that is too far by a little is halved until it fits.
    proposed = disturbed.step(3, WIDE).metrics["trust_region/distance"]
    halved = disturbed.step(4, proposed * 1.02)
    result["fits"] = halved.metrics["trust_region/distance"] <= proposed * 1.02
    result["halved"] = [halved.rejected, halved.metrics["trust_region/halvings"]]
    with_error = disturbed.region
    with_error.settings = replace(with_error.settings, max_consecutive_rejections=2)
    try:
        for batch in (5, 6):
            disturbed.step(batch, NARROW)
        result["error"] = ""
    except ControlError as error:
        result["error"] = str(error)
    flags = torch.tensor([float(result["same_end"] and all(untouched))])
    dist.all_reduce(flags, op=dist.ReduceOp.MIN)
    result["everywhere"] = bool(flags.item())
    return result


def intervals(layout: dict[str, Any]) -> dict[str, Any]:
    """D of three steps by prototype_interval, and of weights that do not move at all, measured 16 times."""
    torch.set_num_threads(1)
    moved, unmoved = {}, []
    for interval in (1, 2, 5):
        learner = Learner({**layout, "stein": {"prototype_interval": interval, "enabled": False, "monitor": True}})
        moved[str(interval)] = [learner.step(batch, WIDE).metrics["trust_region/distance"] for batch in range(5)]
        world.stop_model_parallel()
        learner = Learner({**layout, "stein": {"prototype_interval": interval}})
        learner.policy.forward_backward(global_batch(0, range(ROWS)), next_token, micro_batch_size=3)
        unmoved.append([learner.region._measure().read()["trust_region/distance"] for _ in range(16)][-1])
        world.stop_model_parallel()
    world.stop()
    return {"moved": moved, "unmoved": unmoved}


def fresh(layouts: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Actors with the learner's weights: what they log while decoding is what the learner's forward pass finds."""
    torch.set_num_threads(1)
    results = []
    for layout in layouts:
        try:
            results.append(_logged_against_recomputed(layout))
        finally:
            world.stop_model_parallel()
    world.stop()
    return results


def _logged_against_recomputed(layout: dict[str, Any]) -> dict[str, float]:
    learner = Learner(layout)
    groups, policy, region = learner.groups, learner.policy, learner.region
    config = small_config(**layout)
    engine = MegatronEngine(config, policy, eos_ids=[1], pad_id=0)
    engine.log_gates(layout_contexts := 64)
    engine.refresh(0)
    share = len(PROMPTS) // groups.dp_size
    mine = range(groups.dp_rank * share, (groups.dp_rank + 1) * share)
    rollouts = engine.generate([PROMPTS[i] for i in mine], list(mine), SamplingParams(1.0, 1.0, 10, seed=3), 4)
    assert rollouts.gates is not None and rollouts.gates.stride == -(-len(mine) * 4 * 10 // layout_contexts)
    region.observe_rollouts(rollouts)
    keep_N = torch.arange(len(rollouts.total_len_N)) % 3 != 0
    batch = policy_batch(rollouts, torch.ones(len(keep_N)), keep_N, 1.0)
    batch.row_N = torch.arange(len(batch.length_N))
    (_, part) = split(batch, 2, seed=(1, 2), rows=len(batch.length_N))  # rows in another order, not all of them
    policy.forward_backward(part, next_token, micro_batch_size=3)
    logged = region._measure().read()["trust_region/distance_gates"]
    contexts = sum(len(layer.contexts()) for layer in learner.transform.prototypes.layers)
    region._logged = None
    return {
        "logged": logged,
        "recomputed": region._measure().read()["trust_region/distance_gates"],
        "contexts": float(contexts),
    }

"""What the ranks of test_steps.py do: steps that are taken, and steps that are not, of which nothing may remain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import megatron.core.optimizer
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_vp2o.config.model import LoadBalancing, RouterScore
from megatron_vp2o.config.schema import ControlMode, Precision, TrustRegionConfig
from megatron_vp2o.megatron.control.trust_region import TrustRegion
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.platform import world
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes
from megatron_vp2o.megatron.stein.transform import SteinTransform
from megatron_vp2o.rl.control import PlainSteps
from megatron_vp2o.rl.drift import SampledDrift
from megatron_vp2o.rl.interfaces import Stepper
from megatron_vp2o.rl.objectives import next_token
from megatron_vp2o.rl.types import TrainBatch
from tests.megatron.stein_job import ROWS, VOCAB, global_batch, small_config

WIDE, NARROW = 1.9, 1e-12


class CountingAdamW(torch.optim.AdamW):
    """Counts steps in the parameter groups, from the first one on, as transformer-engine's FusedAdam does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if "step" in group:
                group["step"] += 1
            else:
                group["step"] = 1
        return super().step(closure)


class Learner:
    """A policy with what a case asks for, stepped by hand."""

    def __init__(self, case: dict[str, Any]) -> None:
        model = dict(case["model"])
        model["moe_router_score_function"] = RouterScore(model["moe_router_score_function"])
        model["moe_router_load_balancing_type"] = LoadBalancing(model["moe_router_load_balancing_type"])
        model["precision"] = Precision[case["precision"]]
        stein = {key: case[key] for key in ("prototype_interval", "power_iterations")}
        stein |= {"enabled": case["stein"] == "enabled", "monitor": case["stein"] == "monitor"}
        config = small_config(model=model, stein=stein, specialization=case["specialization"], **case["layout"])
        self.groups = world.start(config.parallel, config.seed)
        adam = megatron.core.optimizer.Adam
        if case["counting"]:
            megatron.core.optimizer.Adam = CountingAdamW
        try:
            self.policy = MegatronPolicy(config, self.groups, vocab_size=VOCAB, optimizer_steps=20)
        finally:
            megatron.core.optimizer.Adam = adam
        settings = config.algorithm.stein
        observed, bounded = case["stein"] != "off", case["region"] != "off"
        self.prototypes = ExpertPrototypes(self.policy.ddp, settings, self.groups) if observed or bounded else None
        self.transform: SteinTransform | None = None
        if self.prototypes is not None and observed:
            self.transform = SteinTransform(self.prototypes, optimizer=self.policy.optimizer)
        others = [] if self.transform is None else [self.transform]
        self.region: TrustRegion | None = None
        if self.prototypes is not None and bounded:
            bounds = TrustRegionConfig(
                mode=ControlMode[case["region"]], contexts_per_rank=16, snapshot_on_host=case["on_host"]
            )
            drift = SampledDrift(self.policy, self.groups, share=0.3, micro_batch_size=2)
            self.region = TrustRegion(self.policy, self.prototypes, bounds, *others, drift=drift)
            self.region.set_anchor()
        plain = [] if self.prototypes is None else [self.prototypes]
        self.stepper: Stepper = self.region or PlainSteps(self.policy, *plain, *others)

    def step(self, number: int, event: str) -> str:
        """One step, and what became of it."""
        share = ROWS // self.groups.dp_size
        rows = range(self.groups.dp_rank * share, (self.groups.dp_rank + 1) * share)
        batch = global_batch(number, rows)
        batch.row_N = torch.tensor(rows)
        batch.behaviour_logprobs_NS = -3 * torch.rand(
            batch.tokens_NS.shape, generator=torch.Generator().manual_seed(number)
        )
        if event == "no rows":
            batch = batch.rows(torch.arange(0))
        elif event == "empty":
            batch = replace(batch, loss_mask_NS=torch.zeros_like(batch.loss_mask_NS))
        poisoned = event == "skipped" and self.groups.dp_rank == 0

        def objective(logprob_NS: Tensor, entropy_NS: Tensor, part: TrainBatch) -> Any:
            torch.rand(3)  # whatever draws random numbers in a step
            loss, metrics = next_token(logprob_NS, entropy_NS, part)
            return loss * float("nan") if poisoned else loss, metrics

        if self.region is not None:
            delta = NARROW if event == "rejected" else WIDE
            most = NARROW if event == "drifted" else None
            self.region.settings = replace(self.region.settings, delta=delta, max_policy_drift=most)
        self.stepper.begin(batch)
        measured = self.policy.accumulate_gradients(batch, objective, micro_batch_size=3)
        if self.transform is not None:
            self.transform.apply()
        stats = self.stepper.step(measured)
        return "rejected" if stats.rejected else "skipped" if stats.skipped else "taken"

    def everything(self) -> dict[str, Any]:
        """All state that one step hands to the next, cloned."""
        self.policy.gather_parameters()
        state: dict[str, Any] = {f"weight {n}": p for n, p in self.policy.model.named_parameters()}
        state |= {f"buffer {n}": b for n, b in self.policy.model.named_buffers()}
        for o, optimizer in enumerate(self.policy.optimizers()):
            for g, group in enumerate(optimizer.optimizer.param_groups):
                state |= {f"group {o}.{g} {k}": v for k, v in group.items() if k != "params"}
                for p, parameter in enumerate(group["params"]):
                    state[f"master {o}.{g}.{p}"] = parameter
                    moments = optimizer.optimizer.state.get(parameter, {})
                    state |= {f"moment {o}.{g}.{p} {k}": v for k, v in moments.items()}
        state["schedule"] = self.policy.scheduler.num_steps
        state["generator"] = torch.get_rng_state()
        state |= {f"generator {k}": v for k, v in get_cuda_rng_tracker().get_states().items()}
        if self.prototypes is not None:
            prototypes = self.prototypes.state
            state |= {f"prototypes {k}": v for k, v in (vars(prototypes) if prototypes is not None else {}).items()}
            state["prototypes current"] = self.prototypes.current
        if self.transform is not None:
            state |= {"coactivation": self.transform.coactivation_LEE, "stein steps": self.transform.steps}
        if self.region is not None:
            state |= {f"anchor {k}": v for k, v in (self.region._anchor or {}).items()}
        return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of what is not the same to the bit."""
    names = sorted(a.keys() ^ b.keys())
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        same = torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y) and x == y
        names += [] if same else [name]
    return names


def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    results = []
    for case in cases:
        found = disturbed(case)
        world.stop_model_parallel()
        found["end"] = differences(found.pop("state"), undisturbed(case))
        world.stop_model_parallel()
        results.append(found)
    dist.barrier()
    world.stop()
    return results


def disturbed(case: dict[str, Any]) -> dict[str, Any]:
    learner = Learner(case)
    outcomes, traces, moved = [], [], []
    for number, event in enumerate(case["events"]):
        before = learner.everything()
        outcomes.append(learner.step(number, event))
        changed = differences(before, learner.everything())
        if event == "taken":
            moved.append(any(name.startswith("weight") for name in changed))
        else:
            traces.append(changed)
    return {"outcomes": outcomes, "traces": traces, "moved": moved, "state": learner.everything()}


def undisturbed(case: dict[str, Any]) -> dict[str, Any]:
    """The same run without the steps that are not taken."""
    learner = Learner(case)
    for number, event in enumerate(case["events"]):
        if event == "taken":
            learner.step(number, event)
    return learner.everything()

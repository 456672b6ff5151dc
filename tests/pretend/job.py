"""A run on the pretended device, in a process (or several ranks) of its own; on the CPU where ON_CPU is in the environment."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from tests.pretend.job_names import GENERATION, ON_CPU, REFRESH, STEP
from tests.pretend.megatron import become

if ON_CPU not in os.environ:
    become()

from megatron_vp2o import session
from megatron_vp2o.config.compose import compose
from megatron_vp2o.megatron.actor.generation import MegatronEngine
from megatron_vp2o.rl.trainer import RLTrainer
from tests.pretend.device import WAITS, Wait
from tests.small_run import SMALL


def run(recipe: str, run_dir: str, overrides: list[str]) -> dict[str, Any]:
    """Train a recipe with a small model, and say what its last step's waits were.

    Returns:
        `status`; `where`: devices of the learner's and the actor's tensors; `steps`: of each training step the metrics, and
        `waits`: [phase, why, line, count].
    """
    steps: list[dict[str, Any]] = []
    where: set[str] = set()
    originals = RLTrainer.step, RLTrainer._refresh_actors, MegatronEngine.generate

    def step(self: RLTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        WAITS.counts.clear()
        with WAITS.during(STEP):
            metrics = originals[0](self, *args, **kwargs)
        steps.append({"metrics": metrics, "waits": _listed(WAITS.counts)})
        models = self.policy.model, self.engine.actor  # type: ignore[attr-defined]
        where.update(str(tensor.device) for model in models for tensor in (*model.parameters(), *model.buffers()))
        return metrics

    def refresh(self: RLTrainer, *args: Any, **kwargs: Any) -> None:
        with WAITS.during(REFRESH):
            originals[1](self, *args, **kwargs)

    def generate(self: MegatronEngine, *args: Any, **kwargs: Any) -> Any:
        with WAITS.during(GENERATION):
            return originals[2](self, *args, **kwargs)

    RLTrainer.step, RLTrainer._refresh_actors, MegatronEngine.generate = step, refresh, generate  # type: ignore[assignment, method-assign]
    try:
        config = compose(recipe, [*SMALL, f"run_dir={run_dir}", "init_from=null", *overrides])
        status = session.train(config)
    finally:
        RLTrainer.step, RLTrainer._refresh_actors, MegatronEngine.generate = originals  # type: ignore[method-assign]
    return {"status": status, "where": sorted(where), "steps": steps}


def run_with(mistake: str, recipe: str, run_dir: str, overrides: list[str]) -> str:
    """`run` with a mistake in the library. Returns what kind of error it ended with, and its message; "" for none."""
    MISTAKES[mistake]()
    try:
        run(recipe, run_dir, overrides)
    except Exception as error:  # whatever it is, the test looks at it
        return f"{type(error).__name__}: {error}"
    return ""


def _forgets_to_move_advantages() -> None:
    from megatron_vp2o.megatron.learner import scoring

    move = scoring._to

    def moves_all_but_one(batch: Any, device: torch.device) -> Any:
        moved = move(batch, device)
        moved.advantages_N = batch.advantages_N
        return moved

    scoring._to = moves_all_but_one


def _counts_routes_on_the_cpu() -> None:
    from megatron_vp2o.megatron.model.routing_statistics import RoutingStatistics

    opened = RoutingStatistics._open
    RoutingStatistics._open = lambda self, device: opened(self, torch.device("cpu"))  # type: ignore[method-assign]


def _anchors_on_the_cpu() -> None:
    from megatron_vp2o.megatron.control.trust_region import TrustRegion

    anchor = TrustRegion.set_anchor

    def set_anchor(self: TrustRegion) -> None:
        anchor(self)
        assert self._anchor is not None
        self._anchor["prototypes"] = self._anchor["prototypes"].cpu()

    TrustRegion.set_anchor = set_anchor  # type: ignore[method-assign]


MISTAKES: dict[str, Callable[[], None]] = {
    "advantages": _forgets_to_move_advantages,
    "statistics": _counts_routes_on_the_cpu,
    "anchor": _anchors_on_the_cpu,
}


def _listed(counts: Counter[Wait]) -> list[list[Any]]:
    return sorted([wait.phase, wait.why, wait.line, count] for wait, count in counts.items())

"""One rank fails, wherever and however: all ranks end within seconds, and say which rank it was and why.

VP2O_FAULTS is the number of faults that are drawn (`VP2O_FAULTS=60 pytest tests/test_faults.py`), VP2O_FAULT_SEED their seed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.fault_job import BACKWARD, Fault, found
from tests.small_run import SMALL

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 10.0
NUMBER, SEED = int(os.environ.get("VP2O_FAULTS", "3")), int(os.environ.get("VP2O_FAULT_SEED", "1"))
# A model that knows nothing earns no reward; entropy and the distance from the reference give it gradients.
ARGUMENTS = [
    "--config-name=countdown_tiny_vp2o",
    "init_from=null",
    *SMALL,
    "algorithm.steps=3",
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=4",
    "algorithm.minibatches=2",
    "algorithm.filter_uniform_groups=false",
    "algorithm.entropy_coef=0.1",
    "algorithm.kl_coef=0.1",
    "algorithm.kl_reference=initial",
    "algorithm.trust_region.delta=1e-6",  # steps are halved, and rejected
    "algorithm.trust_region.contexts_per_rank=16",
    "evaluation.interval=2",
]
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (2, {"distributed_optimizer": True}),
    (2, {"expert_parallel": 2}),
    (2, {"tensor_parallel": 2, "expert_tensor_parallel": 2}),
    (2, {"pipeline_parallel": 2}),
    (4, {"expert_parallel": 2, "pipeline_parallel": 2}),
    (4, {"tensor_parallel": 2, "expert_parallel": 2, "distributed_optimizer": True}),
]
LEARNER, ACTOR = "megatron_vp2o.megatron.learner", "megatron_vp2o.megatron.actor.generation"
CONTROL, CHECKPOINT = "megatron_vp2o.megatron.control.trust_region", "megatron_vp2o.megatron.checkpoint.checkpointer"
LAST_STAGE = {f"{ACTOR}:sample", "backward", "megatron_vp2o.rl.objectives:OnRollouts.__call__"}
ONCE = {  # called once a run
    "megatron_vp2o.session:make_task",
    "torch.distributed:init_process_group",
    "megatron_vp2o.session:MegatronPolicy",
    "megatron_vp2o.session:ExpertPrototypes",
    "megatron_vp2o.session:SteinTransform",
    f"{LEARNER}.policy:get_megatron_optimizer",
    "megatron_vp2o.session:save_config",
    "megatron_vp2o.megatron.platform.world:stop",
}
RANK_ZERO = {"megatron_vp2o.session:save_config", f"{CHECKPOINT}:MegatronCheckpointer._write_rest"}
PLACES = sorted(
    ONCE
    | LAST_STAGE
    | RANK_ZERO
    | {
        "megatron_vp2o.rl.batching:PromptSchedule.__call__",
        f"{ACTOR}:MegatronEngine.refresh",
        "megatron_vp2o.rl.trainer:verify_sync",
        f"{ACTOR}:MegatronEngine._generate_batch",
        "megatron_vp2o.rl.grading:Grading.verdicts",
        "megatron_vp2o.rl.trainer:policy_batch",
        "megatron_vp2o.rl.trainer:split",
        f"{LEARNER}.policy:micro_batches",
        "megatron_vp2o.megatron.model.moe_layer:VP2OMoELayer.route",
        "megatron_vp2o.megatron.model.moe_layer:VP2OMoELayer.postprocess",
        f"{LEARNER}.policy:MegatronPolicy._reduce",
        f"{LEARNER}.policy:MegatronPolicy.take_step",
        "megatron_vp2o.megatron.stein.transform:SteinTransform._collect_statistics",
        "megatron_vp2o.megatron.stein.transform:SteinTransform._repel",
        "megatron_vp2o.parallel.exchange:ExpertExchange.mix",
        f"{CONTROL}:Snapshot",
        f"{CONTROL}:Snapshot.halve",
        f"{CONTROL}:Snapshot.restore",
        f"{CONTROL}:TrustRegion._measure",
        "megatron_vp2o.rl.control:BudgetMeter.spent",
        "megatron_vp2o.tracking.sink:RunSink.write",
        f"{CHECKPOINT}:MegatronCheckpointer._tree",
        f"{CHECKPOINT}:write_tensors",
        f"{CHECKPOINT}:files.describe",
        "megatron_vp2o.rl.evaluate:_tally",
    }
)
KINDS = ["error"] * 4 + ["refused", "memory", "interrupt", "kill", "exit"]


def draw(seed: int, number: int, folder: Path) -> list[Fault]:
    """Faults at places in a random order (each once before any comes again), of random kind, rank and layout."""
    chance = random.Random(seed)
    places: list[str] = []
    while len(places) < number:
        places += chance.sample(PLACES, len(PLACES))
    faults = []
    for index, place in enumerate(places[:number]):
        ranks, layout = chance.choice(LAYOUTS)
        rank = chance.randrange(ranks)
        if place in LAST_STAGE:
            rank = ranks - 1  # of the last stage, or of all ranks where there is one stage
        if place in RANK_ZERO:
            rank = 0
        settings = [f"parallel.{name}={str(value).lower()}" for name, value in layout.items()]
        faults.append(
            Fault(
                str(folder / f"fault-{index}"),
                [*ARGUMENTS, *settings],
                ranks,
                place,
                rank,
                1 if place in ONCE else chance.randint(1, 2),
                chance.choice(KINDS),
            )
        )
    return faults


def do(folder: Path, faults: list[Fault]) -> list[Fault]:
    spec = folder / "faults.json"
    spec.write_text(json.dumps([asdict(fault) for fault in faults]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.fault_job", str(spec)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60 + sum(fault.limit + 30 for fault in faults),
    )
    assert done.returncode == 0, done.stderr
    return [Fault(**found) for found in json.loads(spec.read_text())]


def check(fault: Fault) -> None:
    """What a user sees of it."""
    where = f"{fault}\n" + "\n".join(f"--- rank {rank}: {text}" for rank, text in enumerate(fault.outputs))
    assert fault.came, where
    assert all(seconds is not None and seconds < LIMIT_S for seconds in fault.seconds), where
    assert all(fault.statuses), where
    silent = fault.kind in ("kill", "exit")
    message = f"the fault at {fault.place}"
    for rank, (text, status) in enumerate(zip(fault.outputs, fault.statuses, strict=True)):
        own = rank == fault.rank
        if fault.kind == "refused":
            assert status == 2 and f"error: {'' if own and not rank else f'rank {fault.rank}: '}{message}" in text, (
                where
            )
            assert "Traceback" not in text, where
        elif own and not silent:
            assert f"rank {rank} failed" in text and "Traceback" in text and message in text, where
        elif not own:
            reason = "its process ended without a word" if silent else message
            assert f"rank {rank} ends, because rank {fault.rank} failed" in text and reason in text, where
            assert "Traceback" not in text, where
    if fault.kind == "interrupt":
        assert fault.statuses == [130] * fault.ranks, where


def test_the_places_are_there() -> None:
    import megatron_vp2o.session  # noqa: F401 - applies what Megatron needs on a CPU

    for place in set(PLACES) - {"backward"} | {BACKWARD}:
        found(place)


@pytest.mark.distributed
@pytest.mark.timeout(130 * NUMBER + 60)
def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    for fault in do(tmp_path, draw(SEED, NUMBER, tmp_path)):
        check(fault)

"""Training gives the same losses however the model is laid out over ranks: Megatron's modules and the patches under them."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.megatron.cases import Case

# The first test waits for all runs: a minute or two on two idle cores.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

TP, EP, ETP, PP = (f"{name}_parallel" for name in ("tensor", "expert", "expert_tensor", "pipeline"))
SHARDED = {"distributed_optimizer": True}
SAVED_AT, RESUMED_STEPS = 10, 10
NO_CUDA = {"CUDA_VISIBLE_DEVICES": ""}  # the same runs on a machine that has a GPU
Results = dict[str, dict[str, Any]]

# Each layout trains 50 steps with one optimizer and the first 10 of them with the other. A name in `save` and `load` is
# that of a checkpoint.
TWO_RANKS = [
    Case("TP=2", {TP: 2}),
    Case("TP=2 sharded", {TP: 2, **SHARDED}, steps=SAVED_AT, save="TP=2 sharded"),
    Case("EP=2", {EP: 2, **SHARDED}),
    Case("EP=2 sharded", {EP: 2, **SHARDED}, steps=SAVED_AT, save="EP=2 sharded"),
    Case("EP=2 plain", {EP: 2}, steps=SAVED_AT, save="EP=2 plain"),
    Case("ETP=2", {ETP: 2}),
    Case("ETP=2 sharded", {ETP: 2, **SHARDED}, steps=SAVED_AT),
    Case("PP=2", {PP: 2, **SHARDED}),
    Case("PP=2 plain", {PP: 2}, steps=SAVED_AT, save="PP=2 plain"),
    Case("DP=2", SHARDED),
    Case("DP=2 plain", {}, steps=SAVED_AT),
    Case("DP=2 overlapping", {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}, steps=SAVED_AT),
    Case("TP=2, project's layers", {TP: 2}, steps=SAVED_AT, project_spec=True),
    Case("EP=2, project's layers", {EP: 2}, steps=SAVED_AT, project_spec=True),
]
FOUR_RANKS = [
    Case("TP=2 x EP=2", {TP: 2, EP: 2, **SHARDED}),
    Case("PP=2 x EP=2", {PP: 2, EP: 2}),
    Case("DP=2 x EP=2", {EP: 2, **SHARDED}, micro_batches=4),
]
RESUMED = [
    Case("EP=2 sharded -> DP=2", SHARDED, steps=RESUMED_STEPS, load="EP=2 sharded"),
    Case("EP=2 sharded -> 1", SHARDED, steps=RESUMED_STEPS, load="EP=2 sharded"),
    Case("TP=2 sharded -> 1", SHARDED, steps=RESUMED_STEPS, load="TP=2 sharded"),
    Case("EP=2 plain -> 1", steps=RESUMED_STEPS, load="EP=2 plain"),
    Case("PP=2 plain -> 1", steps=RESUMED_STEPS, load="PP=2 plain"),
]
WORLDS = {
    2: [
        *TWO_RANKS,
        Case("PP=2 tied", {PP: 2}, steps=SAVED_AT, tied=True),
        Case("EP=2 bf16", {EP: 2}, steps=SAVED_AT, bf16=True),
        Case("TP=2 bf16 sharded", {TP: 2, **SHARDED}, steps=SAVED_AT, bf16=True),
        RESUMED[0],
    ],
    1: [
        Case("reference"),
        Case("reference of 4 micro-batches", micro_batches=4),
        Case("reference tied", steps=SAVED_AT, tied=True),
        Case("project's layers", steps=SAVED_AT, project_spec=True),
        *RESUMED[1:],
    ],
    4: FOUR_RANKS,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All runs by name. One world of each size: starting Python and importing megatron.core takes most of a short run."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def placed(name: str | None) -> str | None:
        return None if name is None else str(folder / name)

    found: Results = {}
    for world_size, cases in WORLDS.items():
        settings = [asdict(replace(case, save=placed(case.save), load=placed(case.load))) for case in cases]
        ranks = run_distributed("tests.megatron.training_job:run", world_size, settings, timeout=600, env=NO_CUDA)
        found.update(ranks[0])
    return found


def test_the_reference_learns(results: Results) -> None:
    losses = results["reference"]["losses"]
    assert losses[0] == pytest.approx(4.16, abs=0.1)  # ln 64
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("case", TWO_RANKS + FOUR_RANKS, ids=lambda case: case.name)
def test_losses_do_not_depend_on_the_layout(results: Results, case: Case) -> None:
    reference = results["reference of 4 micro-batches" if case.micro_batches == 4 else "reference"]
    found = results[case.name]
    assert len(found["losses"]) == case.steps
    assert found["losses"] == pytest.approx(reference["losses"][: case.steps], rel=1e-4)
    assert found["norms"][:5] == pytest.approx(reference["norms"][:5], rel=1e-4)


@pytest.mark.parametrize("name", ["TP=2", "EP=2", "ETP=2", "PP=2", "DP=2", "TP=2 x EP=2", "PP=2 x EP=2"])
def test_auxiliary_losses_do_not_depend_on_the_layout(results: Results, name: str) -> None:
    expected = results["reference"]["auxiliary"]
    assert set(expected) == {"moe/load_balancing_loss", "moe/z_loss"}
    assert results[name]["auxiliary"] == pytest.approx(expected, rel=1e-3)


def test_the_projects_layers_compute_what_megatrons_do(results: Results) -> None:
    found = results["project's layers"]["losses"]
    assert found == pytest.approx(results["reference"]["losses"][: len(found)], rel=1e-4)


def test_tied_embeddings_over_two_stages(results: Results) -> None:
    assert results["PP=2 tied"]["losses"] == pytest.approx(results["reference tied"]["losses"], rel=1e-4)


@pytest.mark.parametrize("name", ["EP=2 bf16", "TP=2 bf16 sharded"])
def test_bf16_trains_nearly_alike(results: Results, name: str) -> None:
    assert results[name]["losses"] == pytest.approx(results["reference"]["losses"][:SAVED_AT], rel=5e-3)


@pytest.mark.parametrize("name", [case.name for case in RESUMED])
def test_a_checkpoint_continues_under_another_layout(results: Results, name: str) -> None:
    """Weights and optimizer state: with fresh moments the next losses would differ in the second digit."""
    expected = results["reference"]
    after = slice(SAVED_AT, SAVED_AT + RESUMED_STEPS)
    assert results[name]["losses"] == pytest.approx(expected["losses"][after], rel=1e-4)
    assert results[name]["norms"][:3] == pytest.approx(expected["norms"][after][:3], rel=1e-3)

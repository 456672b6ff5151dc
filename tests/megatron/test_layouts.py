"""Training gives the same losses however the model is laid out over ranks: Megatron's modules and the patches under them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.megatron.training_job import Case

# The first test waits for all runs: a minute or two on two idle cores.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

TP, EP, ETP, PP = (f"{name}_parallel" for name in ("tensor", "expert", "expert_tensor", "pipeline"))
SHARDED = {"distributed_optimizer": True}
SAVED_AT, RESUMED_STEPS = 10, 10
Results = dict[str, dict[str, Any]]

# Each layout trains 50 steps with one optimizer and the first 10 of them with the other.
TWO_RANKS: list[Case] = [
    Case("TP=2", {TP: 2}),
    Case("TP=2 sharded", {TP: 2, **SHARDED}, steps=SAVED_AT),
    Case("EP=2", {EP: 2, **SHARDED}),
    Case("EP=2 plain", {EP: 2}, steps=SAVED_AT),
    Case("ETP=2", {ETP: 2}),
    Case("ETP=2 sharded", {ETP: 2, **SHARDED}, steps=SAVED_AT),
    Case("PP=2", {PP: 2, **SHARDED}),
    Case("PP=2 plain", {PP: 2}, steps=SAVED_AT),
    Case("DP=2", SHARDED),
    Case("DP=2 plain", {}, steps=SAVED_AT),
    Case("DP=2 overlapping", {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}, steps=SAVED_AT),
    Case("TP=2, project's layers", {TP: 2}, steps=SAVED_AT, project_spec=True),
    Case("EP=2, project's layers", {EP: 2}, steps=SAVED_AT, project_spec=True),
]
FOUR_RANKS: list[Case] = [
    Case("TP=2 x EP=2", {TP: 2, EP: 2, **SHARDED}),
    Case("PP=2 x EP=2", {PP: 2, EP: 2}),
    Case("DP=2 x EP=2", {EP: 2, **SHARDED}, micro_batches=4),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All runs by name. One world of each size, because starting Python and importing megatron.core takes most of the time."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def checkpoint(name: str) -> str:
        return str(folder / name)

    def resumed(name: str, layout: dict[str, Any], source: str) -> Case:
        return Case(name, layout, steps=RESUMED_STEPS, load=checkpoint(source))

    two = [
        *TWO_RANKS,
        Case("PP=2 tied", {PP: 2}, steps=SAVED_AT, tied=True),
        Case("EP=2 bf16", {EP: 2}, steps=SAVED_AT, bf16=True),
        Case("TP=2 bf16 sharded", {TP: 2, **SHARDED}, steps=SAVED_AT, bf16=True),
        resumed("EP=2 -> DP=2 sharded", SHARDED, "EP=2 sharded"),
    ]
    savers = [
        Case("EP=2 sharded", {EP: 2, **SHARDED}, steps=SAVED_AT, save=checkpoint("EP=2 sharded")),
        Case("EP=2 to save", {EP: 2}, steps=SAVED_AT, save=checkpoint("EP=2")),
        Case("TP=2 to save", {TP: 2}, steps=SAVED_AT, save=checkpoint("TP=2")),
        Case("TP=2 sharded to save", {TP: 2, **SHARDED}, steps=SAVED_AT, save=checkpoint("TP=2 sharded")),
    ]
    one = [
        Case("reference"),
        Case("reference of 4 micro-batches", micro_batches=4),
        Case("reference tied", steps=SAVED_AT, tied=True),
        Case("project's layers", steps=SAVED_AT, project_spec=True),
        *(resumed(f"{source} -> 1", {}, source) for source in ("EP=2", "TP=2")),
        *(resumed(f"{source} -> 1", SHARDED, source) for source in ("EP=2 sharded", "TP=2 sharded")),
    ]
    found: Results = {}
    for world_size, cases in ((2, savers + two), (1, one), (4, FOUR_RANKS)):
        ranks = run_distributed(
            "tests.megatron.training_job:run", world_size, [asdict(case) for case in cases], timeout=600
        )
        assert all(rank.keys() == ranks[0].keys() for rank in ranks)
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


@pytest.mark.parametrize(
    "name", ["EP=2 -> 1", "TP=2 -> 1", "EP=2 sharded -> 1", "TP=2 sharded -> 1", "EP=2 -> DP=2 sharded"]
)
def test_a_checkpoint_continues_under_another_layout(results: Results, name: str) -> None:
    """Weights and optimizer state: with fresh moments the next losses would differ in the second digit."""
    expected = results["reference"]
    after = slice(SAVED_AT, SAVED_AT + RESUMED_STEPS)
    assert results[name]["losses"] == pytest.approx(expected["losses"][after], rel=1e-4)
    assert results[name]["norms"][:3] == pytest.approx(expected["norms"][after][:3], rel=1e-3)

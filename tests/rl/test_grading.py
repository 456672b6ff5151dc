"""From a reward's results to verdicts, and from verdicts to what a group's rewards are."""

from __future__ import annotations

import pytest

from megatron_vp2o.rl.types import RewardResult, Verdict
from tests.distributed import run_distributed


def test_a_verdict_is_worth_one_or_nothing_unless_it_says_otherwise():
    assert Verdict(True, "x", "").reward == 1.0
    assert Verdict(False, None, "value").reward == 0.0
    assert Verdict(False, None, "short", score=0.25).reward == 0.25


@pytest.mark.parametrize(
    ("result", "correct", "canonical"),
    [
        (RewardResult(1.0), True, ""),  # right, with no canonical form: all right answers are one
        (RewardResult(1.0, canonical="1/2"), True, "1/2"),
        (RewardResult(0.9, reason="long", canonical="1/2"), False, None),
        (RewardResult(0.9, correct=True, canonical="1/2"), True, "1/2"),  # right, and too long
        (RewardResult(1.5, correct=False), False, None),
    ],
)
def test_a_result_becomes_a_verdict(result, correct, canonical):
    verdict = result.verdict()
    assert (verdict.correct, verdict.canonical, verdict.reward) == (correct, canonical, result.reward)
    assert verdict.reason == result.reason


@pytest.mark.distributed
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 2), (1, 3), (3, 1)])
def test_one_rank_of_a_replica_speaks_for_all(tensor, pipeline):
    """Verdicts within a time limit may differ between ranks; a replica's ranks must train on the same ones."""
    said = run_distributed("tests.rl.grading_job:say", tensor * pipeline, tensor, pipeline)
    assert said == [["made by 0", int(rank == 0)] for rank in range(tensor * pipeline)]

"""What a study's tables say of a run, against counting by hand."""

from __future__ import annotations

import itertools

import pytest

from megatron_vp2o.study.results import Result
from megatron_vp2o.study.spec import Job


def test_distinct_among_some_of_the_samples_is_the_mean_over_all_subsets():
    answers = {"a": 3, "b": 1, "c": 1}
    samples = ["a", "a", "a", "b", "c", None, None]
    result = Result(Job("t", "v", 1, ()), {}, {}, {}, [{"answers": answers, "samples": 7}])
    for draws in (1, 3, 7):
        subsets = list(itertools.combinations(samples, draws))
        want = sum(len(set(subset) - {None}) for subset in subsets) / len(subsets)
        assert result.distinct_among(draws) == pytest.approx(want)
    assert result.distinct_among(7) == result.distinct_P().mean() == 3
    assert result.accuracy_P().tolist() == [5 / 7] and result.right_samples() == 5


def test_the_ceiling_is_over_solved_problems():
    problems = [{"answers": {"a": 1, "b": 1}, "samples": 8}, {"answers": {}, "samples": 8}]
    result = Result(Job("t", "v", 1, ()), {}, {}, {}, problems)
    assert result.ceiling(2) == pytest.approx(1.5) and result.right_samples() == 2
    assert Result(Job("t", "v", 1, ()), {}, {}, {}, problems[1:]).ceiling(2) is None

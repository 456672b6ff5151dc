"""Group-relative advantages against plain Python arithmetic."""

from __future__ import annotations

import statistics

import pytest
import torch

from megatron_vp2o.core.advantages import group_relative_advantages, uniform_groups_P

REWARDS = [[0.0, 1.0, 0.0, 0.0], [0.5, 0.25, 1.0, 0.75], [1.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("normalise_by_std", [True, False])
def test_advantages_equal_the_formula(normalise_by_std):
    got = group_relative_advantages(torch.tensor(REWARDS), normalise_by_std=normalise_by_std, epsilon=1e-3)
    for group, got_group in zip(REWARDS, got.tolist(), strict=True):
        scale = statistics.stdev(group) + 1e-3 if normalise_by_std else 1.0
        want = [(reward - statistics.fmean(group)) / scale for reward in group]
        assert got_group == pytest.approx(want, abs=1e-6)
    assert got.dtype is torch.float32


def test_equal_rewards_have_no_advantage_whatever_their_rounding():
    rewards_PG = torch.tensor([0.1, 1 / 3, 0.7], dtype=torch.float64)[:, None].expand(-1, 11)
    assert (rewards_PG - rewards_PG.mean(dim=1, keepdim=True)).any(), "a mean that is off, for epsilon to blow up"
    assert uniform_groups_P(rewards_PG).all()
    assert not group_relative_advantages(rewards_PG, normalise_by_std=True, epsilon=1e-12).any()


def test_uniform_groups_are_found_for_any_type():
    assert uniform_groups_P(torch.tensor([[True, True], [True, False]])).tolist() == [True, False]
    assert uniform_groups_P(torch.tensor([[0.0, 1e-9], [3.0, 3.0]])).tolist() == [False, True]


def test_large_offsets_do_not_matter():
    rewards_PG = torch.tensor(REWARDS[:2]).double()
    near = group_relative_advantages(rewards_PG, normalise_by_std=True, epsilon=0.0)
    far = group_relative_advantages(rewards_PG + 1e9, normalise_by_std=True, epsilon=0.0)
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 1), (4,), (2, 2, 2)])
def test_what_is_no_group_is_refused(shape):
    with pytest.raises(ValueError, match=r"group_size must be at least 2|\[prompts, group\]"):
        group_relative_advantages(torch.zeros(shape), normalise_by_std=True, epsilon=1e-6)

"""One line of metrics from several optimizer steps: what was not measured is absent, and weighs nothing."""

from __future__ import annotations

import pytest

from megatron_vp2o.rl.combine import combine

EMPTY = {"tokens": 0.0, "loss": 0.0, "ratio_max": 0.0, "optimizer/lr": 1.0, "stein/prototype_rank": 2.0}
FULL = {
    "tokens": 30.0,
    "loss": 0.5,
    "ratio_max": 1.25,
    "optimizer/lr": 3.0,
    "optimizer/grad_norm": 4.0,
    "moe/router_entropy": 1.5,
    "trust_region/rejected": 2.0,
    "stein/prototype_rank": 4.0,
}


@pytest.mark.parametrize("updates", [[EMPTY, FULL], [FULL, EMPTY], [EMPTY, FULL, EMPTY]])
def test_updates_without_a_token_measure_no_token(updates):
    combined = combine([dict(update) for update in updates])
    assert combined["policy/loss"] == 0.5 and combined["policy/ratio_max"] == 1.25 and combined["tokens"] == 30
    assert combined["optimizer/grad_norm"] == 4.0 and combined["moe/router_entropy"] == 1.5
    assert combined["trust_region/rejected"] == 2.0
    lr = [update["optimizer/lr"] for update in updates]
    assert combined["optimizer/lr"] == sum(lr) / len(lr)


def test_a_step_of_empty_updates_says_only_what_it_knows():
    combined = combine([dict(EMPTY), dict(EMPTY)])
    assert combined == {"tokens": 0.0, "optimizer/lr": 1.0, "stein/prototype_rank": 2.0}


def test_means_weigh_tokens():
    combined = combine([{"tokens": 10.0, "loss": 1.0}, {"tokens": 30.0, "loss": 2.0}])
    assert combined["policy/loss"] == 1.75

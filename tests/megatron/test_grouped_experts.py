"""Training with grouped products of experts, which CUDA uses, against training with those of the CPU, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.megatron.model.experts import GroupedSequentialMLP  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from tests.megatron import policy_job  # noqa: E402


@pytest.mark.parametrize(
    "layout",
    [{}, {"distributed_optimizer": True}, {"overlap_grad_reduce": True}],
    ids=["plain", "sharded", "overlapped"],
)
def test_training_with_grouped_products_is_the_same(monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any]) -> None:
    results = []
    for grouped in (False, True):
        monkeypatch.setattr(GroupedSequentialMLP, "grouped", grouped)
        try:
            results.append(policy_job.train(policy_job.small_config(**layout)))
        finally:
            world.stop_model_parallel()
    world.stop()
    plain, with_groups = results
    assert len({tuple(map(tuple, tokens)) for tokens in plain["tokens"]}) > 1  # the policy moved
    assert with_groups["tokens"] == plain["tokens"]
    for name in ("loss", "grad_norm", "final"):
        torch.testing.assert_close(torch.tensor(with_groups[name]), torch.tensor(plain[name]), rtol=1e-4, atol=1e-5)

"""Training and scoring with log-probabilities computed in chunks of tokens against the plain path, under several layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import run_distributed

TINY_CHUNK = 24 * 4 * 5 / 2**20
"""MiB: five tokens of a vocabulary of 24, padded to 64: at most one token on one rank, and a few where it is split."""


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (1, [{}]),
        (2, [{"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"expert_parallel": 2, "distributed_optimizer": True}]),
    ],
)
def test_chunks_change_nothing(ranks: int, layouts: list[dict[str, Any]], tied: bool) -> None:
    model = {"share_embeddings_and_output_weights": tied}
    job = "tests.megatron.policy_job:run"
    plain = run_distributed(job, ranks, layouts, model)[0]
    chunked = run_distributed(job, ranks, layouts, {**model, "logits_chunk_mib": TINY_CHUNK})[0]
    for expected, found in zip(plain, chunked, strict=True):
        assert expected["tokens"][0] != expected["tokens"][-1]  # the policy moved
        assert found["tokens"] == expected["tokens"]
        assert max(found["mismatch"]) < 1e-4
        for name in ("loss", "entropy", "grad_norm", "final"):
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected[name]), rtol=1e-4, atol=1e-5)

"""Log-probabilities from hidden states in chunks against the plain path, in value and gradient; vocabulary split over ranks."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.parallel import output_logprobs
from megatron_vp2o.parallel.logprobs import log_probs_and_entropy
from megatron_vp2o.parallel.output_logprobs import output_log_probs_and_entropy
from tests.distributed import run_distributed

INSTALLED = importlib.util.find_spec("triton") is not None  # megatron-core brings it on Python 3.12
RUNNABLE = INSTALLED and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def case(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens, width, vocab = draw.randint(0 if seed else 1, 23), draw.randint(1, 9), 4 * draw.randint(1, 12)
    valid = draw.randint(1, vocab)
    return {
        "hidden": torch.randn(tokens, width, generator=generator, dtype=dtype) * draw.choice([0.1, 3.0]),
        "weight": torch.randn(vocab, width, generator=generator, dtype=dtype),
        "targets": torch.randint(valid, (tokens,), generator=generator),
        "temperature": draw.choice([1.0, 0.7, 2.0]),
        "valid_vocab": valid,
        "chunk": draw.randint(1, tokens + 2),
        "seeds": torch.randn(2, tokens, generator=generator, dtype=dtype),
        "entropy": draw.random() < 0.6,
    }


def plain(given: dict[str, Any]) -> list[Tensor]:
    """Values and gradients by autograd in float64."""
    hidden_TD, weight_VD = (given[name].double().requires_grad_() for name in ("hidden", "weight"))
    z_TV = (hidden_TD @ weight_VD.t())[:, : given["valid_vocab"]] / given["temperature"]
    logp_TV = z_TV.log_softmax(-1)
    logprob_T = logp_TV.gather(-1, given["targets"][:, None]).squeeze(1)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    outputs, seeds = [logprob_T, entropy_T], list(given["seeds"].double())
    if not given["entropy"]:
        outputs, seeds = outputs[:1], seeds[:1]
    return [logprob_T, entropy_T, *torch.autograd.grad(outputs, [hidden_TD, weight_VD], seeds)]


def chunked(given: dict[str, Any], group: dist.ProcessGroup) -> list[Tensor]:
    hidden_TD, weight_VD = (given[name].clone().requires_grad_() for name in ("hidden", "weight"))
    shard_VD = weight_VD.chunk(group.size())[group.rank()]
    logprob_T, entropy_T = output_log_probs_and_entropy(
        hidden_TD,
        shard_VD,
        given["targets"],
        temperature=given["temperature"],
        valid_vocab=given["valid_vocab"],
        group=group,
        chunk_tokens=given["chunk"],
    )
    outputs, seeds = [logprob_T, entropy_T], list(given["seeds"].float())
    if not given["entropy"]:
        outputs, seeds = outputs[:1], seeds[:1]
    gradients = torch.autograd.grad(outputs, [hidden_TD, weight_VD], seeds)
    for gradient in gradients if group.size() > 1 else ():  # hidden: shares of a sum; weight: zero outside the shard
        dist.all_reduce(gradient, group=group)
    return [value.detach() for value in (logprob_T, entropy_T, *gradients)]


@pytest.mark.parametrize("seed", range(25))
def test_chunked_equals_autograd(group: dist.ProcessGroup, seed: int) -> None:
    given = case(seed)
    for found, expected in zip(chunked(given, group), plain(given), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(
    not RUNNABLE, reason="without CUDA, test_kernels_are_interpreted runs these in a process of their own"
)
@pytest.mark.parametrize("seed", range(6))
def test_kernels_equal_autograd(monkeypatch: pytest.MonkeyPatch, group: dist.ProcessGroup, seed: int) -> None:
    monkeypatch.setattr(output_logprobs, "_USE_TRITON", True)
    given = case(seed)
    if torch.cuda.is_available():
        given = {key: value.cuda() if isinstance(value, Tensor) else value for key, value in given.items()}
    for found, expected in zip(chunked(given, group), plain(given), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.smoke
@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
def test_kernels_are_interpreted() -> None:
    """On the CPU. Triton decides so when it is imported, and another test may have imported it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "kernels_equal", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


def test_a_target_in_the_padding_is_impossible(group: dist.ProcessGroup) -> None:
    given = case(5) | {"valid_vocab": 3}
    given["targets"] = torch.full_like(given["targets"], 3)
    given["targets"][0] = 2
    logprob_T = chunked(given | {"entropy": True}, group)[0]
    assert torch.isfinite(logprob_T[0]) and (logprob_T[1:] == float("-inf")).all()


def test_half_precision_equals_the_plain_path(group: dist.ProcessGroup) -> None:
    """Both take the same bfloat16 logits, so that they agree as far as float32 sums do."""
    given = case(3, torch.bfloat16)
    logits = given["hidden"] @ given["weight"].t()
    expected = log_probs_and_entropy(
        logits, given["targets"], temperature=given["temperature"], valid_vocab=given["valid_vocab"], group=group
    )
    for found, wanted in zip(chunked(given, group)[:2], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_one_chunk_of_logits_is_alive_at_a_time(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(1) | {"chunk": 2}
    seen: list[int] = []
    original = output_logprobs._statistics

    def watched(kernels: Any, logits_cV: Tensor, *rest: Any) -> Any:
        seen.append(logits_cV.shape[0])
        return original(kernels, logits_cV, *rest)

    monkeypatch.setattr(output_logprobs, "_statistics", watched)
    chunked(given, group)
    assert seen and max(seen) <= 2 and sum(seen) == given["hidden"].shape[0]


def split_vocabulary(seeds: list[int]) -> list[list[list[float]]]:
    """A rank's results, for each seed."""
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    try:
        return [[value.flatten().tolist() for value in chunked(case(seed), dist.group.WORLD)] for seed in seeds]
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
def test_a_split_vocabulary_gives_the_same() -> None:
    seeds = list(range(12))
    for rank_results in run_distributed("tests.parallel.test_output_logprobs:split_vocabulary", 4, seeds):
        for seed, found in zip(seeds, rank_results, strict=True):
            for mine, expected in zip(found, plain(case(seed)), strict=True):
                torch.testing.assert_close(torch.tensor(mine).double(), expected.flatten(), rtol=2e-5, atol=2e-5)

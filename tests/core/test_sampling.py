"""Random numbers that depend on (seed, sequence, position) only, and tokens drawn with them.

Shape legend: N draws, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vp2o.core.logprobs import token_log_probs_and_entropy
from megatron_vp2o.core.sampling import _to_open_unit, sample, uniform_N

WORD = (1 << 64) - 1
SMALLEST, LARGEST = 2.0**-53, 1 - 2.0**-53


def splitmix64(state: int) -> int:
    """Output function of splitmix64, in Python integers."""
    z = state & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def chi_square(observed: torch.Tensor) -> float:
    """Normalised: (chi^2 - dof) / sqrt(2 dof), about standard normal under uniformity."""
    expected = observed.double().mean()
    dof = observed.numel() - 1
    return float((((observed - expected) ** 2 / expected).sum() - dof) / math.sqrt(2 * dof))


def joint_counts(x_N: torch.Tensor, y_N: torch.Tensor, bins: int = 16) -> torch.Tensor:
    return torch.bincount((x_N * bins).long() * bins + (y_N * bins).long(), minlength=bins * bins)


def test_splitmix_reference_vector():
    # first outputs of splitmix64 seeded with 1234567 (Vigna's reference program)
    golden = 0x9E3779B97F4A7C15
    assert [splitmix64(1234567 + golden * i) for i in (1, 2)] == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize("seed", [0, 1234, -1, 2**63, 2**64 + 5])
def test_numbers_equal_splitmix64_in_python_integers(seed):
    golden = 0x9E3779B97F4A7C15
    uids = [0, 1, 17, 2**40 + 3, 2**62]
    for position in (0, 1, 1000):
        got = uniform_N(seed, torch.tensor(uids), position)
        for uid, value in zip(uids, got.tolist(), strict=True):
            key = splitmix64(uid * golden + splitmix64(seed))
            word = splitmix64(key + (position + 1) * golden)
            assert value == ((word >> 12) + 0.5) / 2**52


def test_numbers_depend_on_nothing_but_seed_uid_and_position():
    uid_N = torch.randperm(1000)
    alone = torch.cat([uniform_N(3, uid_N[n : n + 1], 5) for n in range(1000)])
    assert torch.equal(alone, uniform_N(3, uid_N, 5))
    steps = torch.arange(7)
    grid = uniform_N(3, uid_N[:, None], steps)
    assert torch.equal(grid, torch.stack([uniform_N(3, uid_N, int(step)) for step in steps], dim=1))
    assert torch.equal(
        uniform_N(3, uid_N, uid_N), grid.new_tensor([uniform_N(3, u[None], int(u)).item() for u in uid_N])
    )
    assert (
        len(
            {
                uniform_N(seed, torch.tensor([uid]), pos).item()
                for seed in range(8)
                for uid in range(8)
                for pos in range(8)
            }
        )
        == 512
    )


def test_the_interval_is_open():
    words = torch.tensor([0, -1, 2**63 - 1, -(2**63), 4095])
    values = _to_open_unit(words)
    assert values.min().item() == SMALLEST
    assert values.max().item() == LARGEST < 1


@pytest.mark.parametrize("axis", ["uid", "position", "seed"])
@pytest.mark.parametrize("stride", [1, 8, 1 << 20])
def test_uniform_and_independent_along_every_axis(axis, stride):
    """Neighbours (at a distance of `stride` and of twice that) fill a 16 x 16 grid evenly and do not correlate."""
    count = 1 << 17 if axis != "seed" else 1 << 10
    index = torch.arange(count) * stride
    if axis == "uid":
        u = uniform_N(11, index, 3)
    elif axis == "position":
        u = uniform_N(11, torch.tensor([5]), index)
    else:
        u = torch.cat([uniform_N(int(seed), torch.arange(64), 0)[None] for seed in index])
    assert abs(chi_square(torch.bincount((u.flatten() * 256).long(), minlength=256))) < 5
    for lag in (1, 2):
        x, y = u[lag:].flatten(), u[:-lag].flatten()
        assert abs(chi_square(joint_counts(x, y))) < 5
        correlation = torch.corrcoef(torch.stack((x, y)))[0, 1].item()
        assert abs(correlation) * math.sqrt(len(x)) < 5
    # the low bits too: 8 bits below the first 24
    assert abs(chi_square(torch.bincount((u.flatten() * 2.0**32).long() & 255, minlength=256))) < 5


def even_u(count: int) -> torch.Tensor:
    """Every probability interval gets its share of these to within one draw."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def naive_nucleus(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """Sort, add up until top_p is reached, renormalise; float64."""
    peak = max(logits)
    weights = [math.exp((z - peak) / temperature) for z in logits]
    p = [weight / math.fsum(weights) for weight in weights]
    kept, reached = [], 0.0
    for index in sorted(range(len(p)), key=lambda i: -p[i]):
        if reached >= top_p:
            break
        kept.append(index)
        reached += p[index]
    return [p[i] / reached if i in kept else 0.0 for i in range(len(p))]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-9])
@pytest.mark.parametrize("seed", range(3))
def test_frequencies_and_log_probs_equal_the_naive_nucleus(temperature, top_p, seed):
    logits_V = torch.randn(11, generator=torch.Generator().manual_seed(seed)) * 2
    draws = 20_000
    want = naive_nucleus(logits_V.tolist(), temperature, top_p)
    token_N, logprob_N = sample(logits_V.expand(draws, -1), even_u(draws), temperature=temperature, top_p=top_p)
    counts = torch.bincount(token_N, minlength=11).tolist()
    for count, p in zip(counts, want, strict=True):
        assert abs(count - p * draws) <= 1.1
    for token, logprob in set(zip(token_N.tolist(), logprob_N.tolist(), strict=True)):
        assert logprob == pytest.approx(math.log(want[token]), abs=2e-6)


def test_log_probs_without_nucleus_equal_the_recomputed_ones():
    logits_NV = torch.randn(64, 30) * 3
    token_N, logprob_N = sample(logits_NV, torch.rand(64), temperature=0.8, top_p=1.0, valid_vocab=25)
    again_N, _ = token_log_probs_and_entropy(logits_NV, token_N, temperature=0.8, valid_vocab=25)
    torch.testing.assert_close(logprob_N, again_N, rtol=0, atol=1e-6)
    assert logprob_N.dtype is torch.float32


@pytest.mark.parametrize("top_p", [1.0, 0.95])
@pytest.mark.parametrize("u", [SMALLEST, LARGEST, 0.5])
def test_impossible_tokens_are_never_drawn(u, top_p):
    """Both ends of the vocabulary, and ids that only pad it, have no probability, but the largest logits."""
    logits_NV = torch.randn(512, 20)
    logits_NV[:, :3] = float("-inf")
    logits_NV[:, 3] = -200.0  # underflows to 0 in float32
    logits_NV[:, 14:16] = float("-inf")
    logits_NV[:, 16:] = 100.0
    token_N, logprob_N = sample(
        logits_NV, torch.full((512,), u, dtype=torch.float64), temperature=1.0, top_p=top_p, valid_vocab=16
    )
    assert token_N.min() >= 4
    assert token_N.max() < 14
    assert logprob_N.isfinite().all()
    assert (logprob_N <= 1e-6).all()


def test_one_certain_token():
    logits_NV = torch.full((3, 5), float("-inf"))
    logits_NV[:, 2] = -7.0
    for u in (SMALLEST, LARGEST):
        token_N, logprob_N = sample(logits_NV, torch.full((3,), u, dtype=torch.float64), temperature=1.0, top_p=1.0)
        assert token_N.tolist() == [2, 2, 2]
        assert logprob_N.tolist() == [0.0, 0.0, 0.0]


def test_large_vocabulary_is_drawn_from_evenly():
    vocabulary = 200_000
    token_N, logprob_N = sample(torch.zeros(1, vocabulary).expand(64, -1), even_u(64), temperature=1.0, top_p=1.0)
    torch.testing.assert_close(token_N.double(), ((even_u(64)) * vocabulary).floor(), rtol=0, atol=1.5)
    torch.testing.assert_close(logprob_N, torch.full((64,), -math.log(vocabulary)), rtol=1e-6, atol=0)


def test_equal_tokens_at_the_border_of_the_nucleus_keep_the_lower_ids():
    logits_NV = torch.zeros(1000, 8)
    token_N, logprob_N = sample(logits_NV, even_u(1000), temperature=1.0, top_p=0.5)
    assert sorted(set(token_N.tolist())) == [0, 1, 2, 3]
    assert logprob_N.tolist() == pytest.approx([-math.log(4)] * 1000, abs=1e-6)


def test_greedy_is_a_point_mass_and_ignores_padding():
    logits_NV = torch.tensor([[0.0, 3.0, 3.0, 9.0], [5.0, 3.0, 3.0, 9.0]])
    token_N, logprob_N = sample(logits_NV, torch.full((2,), LARGEST), temperature=0.0, top_p=0.7, valid_vocab=3)
    assert token_N.tolist() == [1, 0]
    assert logprob_N.tolist() == [0.0, 0.0]


def test_half_precision_and_empty_batches():
    token_N, _ = sample(torch.randn(4, 9).bfloat16(), torch.rand(4), temperature=1.0, top_p=0.9)
    assert token_N.dtype is torch.int64
    for temperature in (0.0, 1.0):
        token_N, logprob_N = sample(torch.zeros(0, 9), torch.zeros(0), temperature=temperature, top_p=0.9)
        assert token_N.shape == logprob_N.shape == (0,)


def test_not_a_number_gives_a_valid_id_and_shows():
    logits_NV = torch.full((2, 6), float("nan"))
    for top_p in (1.0, 0.9):
        token_N, logprob_N = sample(logits_NV, torch.tensor([0.1, 0.9]), temperature=1.0, top_p=top_p)
        assert ((token_N >= 0) & (token_N < 6)).all()
        assert logprob_N.isnan().all()


@pytest.mark.parametrize(
    ("temperature", "top_p", "message"),
    [(-1.0, 1.0, "temperature is -1"), (1.0, 0.0, "top_p is 0"), (1.0, 1.5, "top_p is 1.5")],
)
def test_settings_out_of_range_are_refused(temperature, top_p, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(1, 2), torch.rand(1), temperature=temperature, top_p=top_p)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_numbers_and_tokens_are_the_same_on_a_gpu():
    nan_NV = torch.full((2, 6), float("nan"), device="cuda")
    token_N, logprob_N = sample(nan_NV, torch.tensor([0.1, 0.9], device="cuda"), temperature=1.0, top_p=1.0)
    assert ((token_N >= 0) & (token_N < 6)).all() and logprob_N.isnan().all()
    uid_N = torch.arange(4096)
    u_N = uniform_N(7, uid_N, 9)
    assert torch.equal(uniform_N(7, uid_N.cuda(), 9).cpu(), u_N)
    logits_NV = torch.randn(4096, 1000) * 3
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.9), (0.0, 1.0)):
        here = sample(logits_NV, u_N, temperature=temperature, top_p=top_p, valid_vocab=990)
        there = sample(logits_NV.cuda(), u_N.cuda(), temperature=temperature, top_p=top_p, valid_vocab=990)
        assert (here[0] == there[0].cpu()).float().mean() > 0.999  # a softmax differs in its last bits
        same = here[0] == there[0].cpu()
        torch.testing.assert_close(here[1][same], there[1].cpu()[same], rtol=0, atol=1e-5)

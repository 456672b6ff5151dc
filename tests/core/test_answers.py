"""Kernels between answers, and the rewards that follow, against plain Python over pairs."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import product

import pytest
import torch

from megatron_vp2o.core.answers import (
    count_repulsion,
    edit_kernel,
    embedding_kernel,
    equality_kernel,
    leave_one_out_repulsion,
    levenshtein,
    ngram_kernel,
    right_density,
)


def draw_answers(seed: int, P: int = 3, G: int = 5, S: int = 7, letters: int = 3):
    """Answers as lists of tokens, and padded tensors of them (padding is rubbish on purpose)."""
    rng = random.Random(seed)
    answers = [[[rng.randrange(letters) for _ in range(rng.randrange(S + 1))] for _ in range(G)] for _ in range(P)]
    tokens_PGS = torch.tensor(
        [[a + [rng.randrange(letters) for _ in range(S - len(a))] for a in group] for group in answers]
    )
    return answers, tokens_PGS, torch.tensor([[len(a) for a in group] for group in answers])


def edit_distance(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def ngram_distance(a: list[int], b: list[int], n: int) -> float:
    def counts(answer: list[int]) -> Counter[tuple[int, ...]]:
        grams = [tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)]
        return Counter(grams or [tuple(answer)])

    x, y = counts(a), counts(b)
    product = sum(x[key] * y[key] for key in x)
    return 1.0 - product / math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))


@pytest.mark.parametrize("seed", range(4))
def test_ngrams_of_large_vocabularies_are_exact_whatever_is_held_at_a_time(seed, monkeypatch):
    rng = random.Random(seed)
    P, G, S, n = rng.randint(1, 5), rng.randint(1, 5), rng.randint(1, 6), rng.randint(1, 4)
    some = [rng.randrange(10**6) for _ in range(3)]  # few of many tokens, so that n-grams repeat
    tokens_PGS = torch.tensor(rng.choices(some, k=P * G * S)).view(P, G, S)
    length_PG = torch.tensor([[rng.randint(0, S) for _ in range(G)] for _ in range(P)])
    whole_PGG = ngram_kernel(tokens_PGS, length_PG, n=n, bandwidth=0.7)
    monkeypatch.setattr("megatron_vp2o.core.answers.WORKSPACE", rng.choice([1, 20, 40]))
    assert torch.equal(ngram_kernel(tokens_PGS, length_PG, n=n, bandwidth=0.7), whole_PGG)
    for p, i, j in product(range(P), range(G), range(G)):
        a, b = (tokens_PGS[p, g, : length_PG[p, g]].tolist() for g in (i, j))
        expected = math.exp(-(ngram_distance(a, b, n) if i != j else 0.0) / 0.7)
        assert whole_PGG[p, i, j].item() == pytest.approx(expected, abs=1e-9)


def test_no_answers_have_a_kernel():
    none = torch.zeros((0, 3, 2), dtype=torch.int64)
    assert ngram_kernel(none, none[..., 0], n=2, bandwidth=1.0).shape == (0, 3, 3)


@pytest.mark.parametrize("seed", range(6))
def test_kernels_equal_pairwise_python(seed):
    answers, tokens_PGS, length_PG = draw_answers(seed)
    n = 1 + seed % 3
    got_edit = edit_kernel(tokens_PGS, length_PG, bandwidth=0.4)
    got_ngram = ngram_kernel(tokens_PGS, length_PG, n=n, bandwidth=0.7)
    different = 0
    for p, group in enumerate(answers):
        for i, a in enumerate(group):
            for j, b in enumerate(group):
                d = edit_distance(a, b) / max(len(a), len(b), 1)
                different += 0 < d < 1
                assert got_edit[p, i, j].item() == pytest.approx(math.exp(-d / 0.4), abs=1e-12)
                d = ngram_distance(a, b, n) if i != j else 0.0
                assert got_ngram[p, i, j].item() == pytest.approx(math.exp(-d / 0.7), abs=1e-9)
    assert different > 10, "distances between none and all are what a kernel is for"


def test_levenshtein_of_unequal_widths():
    a, b = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 4]])
    assert levenshtein(a, torch.tensor([4]), b, torch.tensor([2])).tolist() == [2]
    assert levenshtein(a, torch.tensor([0]), b, torch.tensor([2])).tolist() == [2]
    assert levenshtein(a, torch.tensor([3]), b, torch.tensor([0])).tolist() == [3]


def test_embedding_kernel():
    embedding_PGD = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0]]])
    got = embedding_kernel(embedding_PGD, bandwidth=0.5)[0]
    assert got.diagonal().tolist() == [1.0] * 4
    assert got[0, 1].item() == pytest.approx(math.exp(-2.0))
    assert got[0, 2].item() == pytest.approx(math.exp(-2.0 * (1 - math.sqrt(0.5))))
    assert got[3, :3].tolist() == pytest.approx([math.exp(-2.0)] * 3)
    with pytest.raises(ValueError, match="bandwidth is 0"):
        embedding_kernel(embedding_PGD, bandwidth=0.0)


def test_repulsion_by_hand():
    """Answers a a b, one wrong; and a group with a single right answer; and one with none."""
    answer_PG = torch.tensor([[0, 0, 1, -4], [0, -2, -3, -4], [-1, -2, -3, -4]])
    right_PG = answer_PG >= 0
    kernel_PGG = equality_kernel(answer_PG)
    density_PG = right_density(right_PG, kernel_PGG)
    assert density_PG[0, :3].tolist() == [0.5, 0.5, 0.0] and density_PG[1, 0] == 0
    got = leave_one_out_repulsion(right_PG, right_PG, kernel_PGG, 0.5)
    assert got.tolist() == [[0.75, 0.75, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4]
    got = count_repulsion(right_PG, right_PG, kernel_PGG, 1.0)
    assert got.tolist() == [[0.5, 0.5, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4]
    got = count_repulsion(right_PG, right_PG, kernel_PGG, 0.5)
    assert got[0].tolist() == pytest.approx([2**-0.5, 2**-0.5, 1.0, 0.0])


@pytest.mark.parametrize("seed", range(4))
def test_repulsion_equals_pairwise_python_and_right_beats_wrong(seed):
    _, tokens_PGS, length_PG = draw_answers(seed, P=4, G=6)
    generator = torch.Generator().manual_seed(seed)
    right_PG = torch.rand(4, 6, generator=generator) < 0.6
    rewards_PG = torch.where(right_PG, 1.0, 0.1 * torch.rand(4, 6, generator=generator))
    kernel_PGG = edit_kernel(tokens_PGS, length_PG, bandwidth=0.5)
    loo = leave_one_out_repulsion(rewards_PG, right_PG, kernel_PGG, 0.8)
    count = count_repulsion(rewards_PG, right_PG, kernel_PGG, 0.7)
    for p in range(4):
        right = [g for g in range(6) if right_PG[p, g]]
        for g in range(6):
            reward = rewards_PG[p, g].item()
            if g in right:
                rho = sum(kernel_PGG[p, g, j].item() for j in right if j != g) / max(len(right) - 1, 1)
                alike = sum(kernel_PGG[p, g, j].item() for j in right)
                assert loo[p, g].item() == pytest.approx(1 - 0.8 * rho) and loo[p, g] >= 0.2 - 1e-12
                assert count[p, g].item() == pytest.approx(alike**-0.7)
            else:
                assert loo[p, g].item() == count[p, g].item() == pytest.approx(reward)
    assert 0 < right_PG.sum() < right_PG.numel()


def test_all_alike_answers_stay_a_uniform_group():
    """Where a task has one right answer, leave-one-out takes the same from all, and the group keeps no false signal."""
    right_PG = torch.ones(1, 8, dtype=torch.bool)
    kernel_PGG = equality_kernel(torch.zeros(1, 8))
    got = leave_one_out_repulsion(right_PG, right_PG, kernel_PGG, 0.5)
    assert (got == got[:, :1]).all() and got[0, 0] == 0.5

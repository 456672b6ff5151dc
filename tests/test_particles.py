"""Which experts a perturbed rollout goes to: the most probable ones are kept, the rest drawn as Plackett and Luce have it."""

from __future__ import annotations

import itertools

import pytest
import torch

from tools.particles import chosen_experts


def gumbel(*shape: int, seed: int = 0) -> torch.Tensor:
    return -(-torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).log()).log()


@pytest.mark.parametrize("head", range(4))
def test_so_many_are_chosen_and_the_most_probable_are_among_them(head: int) -> None:
    logits_SBE = torch.randn(5, 7, 8, generator=torch.Generator().manual_seed(1))
    chosen_SBE = chosen_experts(logits_SBE, gumbel(7, 8), topk=3, head=head, temperature=1.0)
    assert (chosen_SBE.sum(-1) == 3).all()
    assert chosen_SBE.gather(-1, logits_SBE.topk(head, dim=-1).indices).all()
    plain_SBE = torch.zeros_like(chosen_SBE).scatter(-1, logits_SBE.topk(3, dim=-1).indices, True)
    assert torch.equal(chosen_SBE, plain_SBE) == (head == 3)


def test_tails_have_the_probabilities_of_draws_without_replacement() -> None:
    logits_E = torch.tensor([2.0, 0.5, 0.1, -0.4, -1.0])
    temperature, draws = 0.7, 40_000
    chosen_BE = chosen_experts(logits_E.expand(1, draws, 5), gumbel(draws, 5), topk=3, head=1, temperature=temperature)[
        0
    ]
    weights = (logits_E / temperature).exp().tolist()
    for pair in itertools.combinations(range(1, 5), 2):
        rest = sum(weights[1:])
        expected = sum(weights[a] / rest * weights[b] / (rest - weights[a]) for a, b in itertools.permutations(pair))
        found = chosen_BE[:, list(pair)].all(-1).float().mean().item()
        assert found == pytest.approx(expected, abs=0.01), pair

"""Barycenter distances: against loops, and their properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vp2o.core.choices import Barycenter
from megatron_vp2o.core.trust_region import (
    Verdict,
    barycenter_distance,
    distances,
    normalised_gates,
    verdict,
)

T, E, D = 5, 6, 9


def unit(seed: int) -> Tensor:
    raw = torch.randn(E, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return raw / raw.norm(dim=-1, keepdim=True)


def gates(seed: int, topk: int = 3) -> Tensor:
    raw = torch.rand(T, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalised_gates(torch.zeros_like(raw).scatter(1, raw.topk(topk).indices, raw))


@pytest.mark.parametrize("kind", Barycenter)
def test_distance_is_that_of_loops(kind: Barycenter) -> None:
    g, v, a, u = gates(1), unit(2), gates(3), unit(4)
    found = barycenter_distance(g, v, a, u, kind)
    for t in range(T):
        if kind is Barycenter.vector:
            difference = sum(g[t, i] * v[i] - a[t, i] * u[i] for i in range(E))
        else:
            difference = sum(g[t, i] * torch.outer(v[i], v[i]) - a[t, i] * torch.outer(u[i], u[i]) for i in range(E))
        assert isinstance(difference, Tensor)
        assert found[t].item() == pytest.approx(difference.norm().item(), rel=1e-9)


@pytest.mark.parametrize("kind", Barycenter)
def test_parts_are_what_they_say(kind: Barycenter) -> None:
    g, v, a, u = gates(1), unit(2), gates(3), unit(4)
    parts = distances(g, v, a, u, kind)
    assert parts.gates == distances(g, u, a, u, kind).total and parts.prototypes == distances(a, v, a, u, kind).total
    assert distances(g, u, a, u, kind).prototypes == 0 and distances(a, v, a, u, kind).gates == 0


@pytest.mark.parametrize("kind", Barycenter)
def test_nothing_moved_is_exactly_zero(kind: Barycenter) -> None:
    g, v = gates(1).float(), unit(2).float()
    assert distances(g, v, g, v, kind) == (0, 0, 0)


@pytest.mark.parametrize("kind", Barycenter)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), data=st.data())
def test_invariances(kind: Barycenter, seed: int, data: st.DataObject) -> None:
    g, v, a, u = gates(seed), unit(seed + 1), gates(seed + 2), unit(seed + 3)
    expected = barycenter_distance(g, v, a, u, kind)
    order = torch.tensor(data.draw(st.permutations(range(E))))
    assert torch.allclose(barycenter_distance(g[:, order], v[order], a[:, order], u[order], kind), expected)
    signs = torch.tensor(data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=E, max_size=E)), dtype=v.dtype)[
        :, None
    ]
    if kind is Barycenter.vector:
        signs = signs[0].expand(E, 1)  # all at once
    assert torch.allclose(barycenter_distance(g, signs * v, a, signs * u, kind), expected)


def test_a_vector_barycenter_does_see_the_sign_of_one_prototype() -> None:
    """Why `projective` exists: flipping one expert's prototype, learner's and anchor's alike, changes the paper's distance."""
    v = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    g, a = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    flipped = v * torch.tensor([[1.0], [-1.0]])
    assert barycenter_distance(g, v, a, v, Barycenter.vector).item() == pytest.approx(0.0, abs=1e-7)
    assert barycenter_distance(g, flipped, a, flipped, Barycenter.vector).item() == pytest.approx(0.8)
    assert barycenter_distance(g, flipped, a, flipped, Barycenter.projective).item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("kind", Barycenter)
def test_grows_along_a_direction(kind: Barycenter) -> None:
    a, u = gates(1), unit(2)
    turn, more = unit(5), gates(6)
    found = []
    for step in (0.0, 0.05, 0.1, 0.2, 0.4):
        v = u + step * turn
        found.append(distances((1 - step) * a + step * more, v / v.norm(dim=-1, keepdim=True), a, u, kind).total.item())
    assert found[0] == pytest.approx(0, abs=1e-6) and found == sorted(found) and found[-1] > found[1] > 0


def test_gates_without_an_expert() -> None:
    rows = normalised_gates(torch.tensor([[0.0, 0.0], [1.0, 3.0]]))
    assert rows.tolist() == [[0.0, 0.0], [0.25, 0.75]]


def test_verdicts() -> None:
    assert verdict(0.1, 0.1, 0, 3) is Verdict.accept
    assert verdict(0.11, 0.1, 0, 3) is Verdict.backtrack
    assert verdict(0.11, 0.1, 3, 3) is Verdict.reject
    assert verdict(math.nan, 0.1, 0, 0) is Verdict.reject
    assert verdict(math.inf, 0.1, 2, 3) is Verdict.backtrack

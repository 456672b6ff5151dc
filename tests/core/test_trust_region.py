"""Barycenters, their distance and the verdict on a step.

Shape legend: L layers, T contexts, E experts, K experts of a context, D hidden size.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vp2o.core.trust_region import (
    Outcome,
    barycenters,
    consecutive_rejections,
    deviation,
    oriented,
    verdict,
)


class Case(NamedTuple):
    """Arguments of `deviation`."""

    gates_TE: Tensor
    prototypes_ED: Tensor
    anchor_gates_TE: Tensor
    anchor_prototypes_ED: Tensor


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def top_gates(T: int, E: int, K: int, generator: torch.Generator) -> Tensor:
    """Dense gates of a top-k router."""
    top = normal(T, E, generator=generator).topk(K, dim=1)
    return torch.zeros(T, E, dtype=torch.float64).scatter(1, top.indices, top.values.softmax(1))


def case(T: int = 5, E: int = 4, K: int = 2, D: int = 6, seed: int = 0, step: float = 0.1) -> Case:
    generator = torch.Generator().manual_seed(seed)
    anchor_ED = torch.nn.functional.normalize(normal(E, D, generator=generator), dim=-1)
    moved_ED = torch.nn.functional.normalize(anchor_ED + step * normal(E, D, generator=generator), dim=-1)
    gates_TE, anchor_gates_TE = (top_gates(T, E, K, generator) for _ in range(2))
    return Case(gates_TE, moved_ED, anchor_gates_TE, anchor_ED)


def looped(inputs: Case) -> tuple[float, float, float]:
    """D, its gates part and its prototypes part as plain sums over lists, with the signs of the definition."""
    new = [list(map(float, row)) for row in inputs.prototypes_ED]
    old = [list(map(float, row)) for row in inputs.anchor_prototypes_ED]
    for i, row in enumerate(old):
        if max(row, key=abs) < 0:
            old[i] = [-x for x in row]
        if sum(x * y for x, y in zip(new[i], old[i], strict=True)) < 0:
            new[i] = [-x for x in new[i]]

    def barycenter(gates: list[float], prototypes: list[list[float]]) -> list[float]:
        return [sum(g * row[d] for g, row in zip(gates, prototypes, strict=True)) for d in range(len(prototypes[0]))]

    sums = [0.0, 0.0, 0.0]
    for now, before in zip(inputs.gates_TE.tolist(), inputs.anchor_gates_TE.tolist(), strict=True):
        z, middle, start = barycenter(now, new), barycenter(now, old), barycenter(before, old)
        for index, (a, b) in enumerate(((z, start), (middle, start), (z, middle))):
            sums[index] += math.dist(a, b)
    return sums[0], sums[1], sums[2]


SIZES = {
    "T": st.integers(0, 4),
    "E": st.integers(1, 5),
    "D": st.integers(1, 6),
    "seed": st.integers(0, 10**6),
    "step": st.sampled_from([0.0, 1e-3, 0.3, 3.0]),
}


@given(**SIZES, data=st.data())
@settings(max_examples=60, deadline=None)
def test_distance_is_that_of_loops(T: int, E: int, D: int, seed: int, step: float, data: st.DataObject) -> None:
    inputs = case(T, E, data.draw(st.integers(1, E)), D, seed, step)
    got = deviation(*inputs)
    assert (got.total.item(), got.gates.item(), got.prototypes.item()) == pytest.approx(looped(inputs), abs=1e-12)
    assert got.contexts == T
    assert got.total <= got.gates + got.prototypes + 1e-12 and got.gates <= got.total + got.prototypes + 1e-12


@given(**SIZES)
@settings(max_examples=30, deadline=None)
def test_zero_right_after_a_refresh(T: int, E: int, D: int, seed: int, step: float) -> None:
    """Exactly, in float32 too, and whatever the signs."""
    inputs = case(T, E, E, D, seed, step)
    gates_TE, prototypes_ED = inputs.gates_TE.float(), inputs.prototypes_ED.float()
    for anchor_ED in (prototypes_ED, -prototypes_ED):
        got = deviation(gates_TE, prototypes_ED, gates_TE, anchor_ED)
        assert got.total == got.gates == got.prototypes == 0


@given(**SIZES, data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_flip_of_any_prototype_changes_anything(
    T: int, E: int, D: int, seed: int, step: float, data: st.DataObject
) -> None:
    """Flips of both, as issue 4 asks, and of one alone: a singular vector has no sign."""
    inputs = case(T, E, min(2, E), D, seed, step)
    signs = st.lists(st.sampled_from([-1.0, 1.0]), min_size=E, max_size=E)
    both_E1, learner_E1 = (torch.tensor(data.draw(signs), dtype=torch.float64)[:, None] for _ in range(2))
    flipped = inputs._replace(
        prototypes_ED=inputs.prototypes_ED * both_E1, anchor_prototypes_ED=inputs.anchor_prototypes_ED * both_E1
    )
    for other in (flipped, inputs._replace(prototypes_ED=inputs.prototypes_ED * learner_E1)):
        assert all(torch.equal(a, b) for a, b in zip(deviation(*inputs), deviation(*other), strict=True))


def test_without_signs_of_its_own_the_distance_would_depend_on_flips_of_both() -> None:
    """Why `oriented` exists: two experts of one direction, gates moving between them. Only flips of all are harmless."""
    prototypes_ED = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    gates, anchor_gates = torch.tensor([[0.3, 0.7]]), torch.tensor([[0.7, 0.3]])

    def plain(signs: tuple[float, float]) -> float:
        flipped_ED = prototypes_ED * torch.tensor(signs)[:, None]
        return (barycenters(gates, flipped_ED) - barycenters(anchor_gates, flipped_ED)).norm().item()

    assert plain((1, 1)) == plain((-1, -1)) == pytest.approx(0)
    assert plain((1, -1)) == plain((-1, 1)) == pytest.approx(0.8)
    for signs in itertools.product((1.0, -1.0), repeat=2):
        flipped_ED = prototypes_ED * torch.tensor(signs)[:, None]
        assert deviation(gates, flipped_ED, anchor_gates, flipped_ED).total.item() == pytest.approx(0)


def test_orientation_of_vectors_without_a_clear_sign() -> None:
    """Ties among components, a right angle between learner and anchor, and zero vectors: flips still change nothing."""
    anchor_ED = torch.tensor([[0.6, -0.6, 0.1], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    prototypes_ED = torch.tensor([[0.6, -0.5, 0.1], [0.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    expected = oriented(prototypes_ED, anchor_ED)
    for first, second in itertools.product((1, -1), repeat=2):
        for got, want in zip(oriented(first * prototypes_ED, second * anchor_ED), expected, strict=True):
            assert torch.equal(got, want) and got.isfinite().all()
    assert expected[1][0, 0] > 0 and expected[0][1, 1] == 1


@given(**SIZES, data=st.data())
@settings(max_examples=40, deadline=None)
def test_names_of_experts_do_not_matter(T: int, E: int, D: int, seed: int, step: float, data: st.DataObject) -> None:
    inputs = case(T, E, min(2, E), D, seed, step)
    order = data.draw(st.permutations(range(E)))
    permuted = Case(
        inputs.gates_TE[:, order],
        inputs.prototypes_ED[order],
        inputs.anchor_gates_TE[:, order],
        inputs.anchor_prototypes_ED[order],
    )
    for one, other in zip(deviation(*inputs), deviation(*permuted), strict=True):
        assert one.item() == pytest.approx(other.item(), abs=1e-12)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_distance_grows_with_the_step(seed: int) -> None:
    """In proportion where gates move on a line; steadily where prototypes turn, towards a fixed direction each."""
    inputs = case(seed=seed)
    whole = deviation(inputs.gates_TE, inputs.anchor_prototypes_ED, *inputs[2:]).total.item()
    for size in (0.1, 0.5, 0.9):
        between_TE = torch.lerp(inputs.anchor_gates_TE, inputs.gates_TE, size)
        part = deviation(between_TE, inputs.anchor_prototypes_ED, *inputs[2:])
        assert part.total.item() == pytest.approx(size * whole) and part.prototypes == 0

    anchor_ED = inputs.anchor_prototypes_ED
    turned_ED = torch.nn.functional.normalize(
        inputs.prototypes_ED - (inputs.prototypes_ED * anchor_ED).sum(-1, keepdim=True) * anchor_ED, dim=-1
    )
    last = 0.0
    for angle in (1e-4, 1e-3, 1e-2, 5e-2):
        moved_ED = math.cos(angle) * anchor_ED + math.sin(angle) * turned_ED
        now = deviation(inputs.anchor_gates_TE, moved_ED, inputs.anchor_gates_TE, anchor_ED)
        assert now.total.item() > 2 * last and now.gates == 0
        last = now.total.item()


def test_one_expert_that_turns() -> None:
    """The chord of the angle, and the line's: at 150 degrees it is as near as at 30."""
    anchor_ED, gates_TE = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for degrees, equivalent in ((0, 0), (30, 30), (90, 90), (150, 30), (180, 0)):
        angle = math.radians(degrees)
        moved_ED = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
        expected = 2 * math.sin(math.radians(equivalent) / 2)
        assert deviation(gates_TE, moved_ED, gates_TE, anchor_ED).total.item() == pytest.approx(expected, abs=1e-12)


def test_layers_are_batched_and_contexts_can_be_left_out() -> None:
    cases = [case(seed=seed) for seed in range(3)]
    together = Case(*(torch.stack(parts) for parts in zip(*cases, strict=True)))
    valid_LT = torch.tensor([[True] * 5, [True, False, True, False, True], [False] * 5])
    together.gates_TE[~valid_LT] = torch.nan
    got = deviation(*together, valid_LT)
    assert got.contexts.tolist() == [5, 3, 0]
    for layer, inputs in enumerate(cases):
        rows = valid_LT[layer]
        alone = deviation(
            inputs.gates_TE[rows], inputs.prototypes_ED, inputs.anchor_gates_TE[rows], inputs.anchor_prototypes_ED
        )
        for one, other in zip(got, alone, strict=True):
            assert one[layer].item() == pytest.approx(other.item(), abs=1e-12) and one.dtype is torch.float64


def test_small_moves_keep_their_digits_in_float32() -> None:
    """Barycenters of length 1 subtracted in float32 would know a move of 1e-6 to one digit."""
    inputs = case(T=64, E=8, K=3, D=32, step=1e-6)
    exact = deviation(
        inputs.anchor_gates_TE, inputs.prototypes_ED.float().double(), inputs[2], inputs[3].float().double()
    )
    rough = deviation(*(part.float() for part in (inputs[2], inputs.prototypes_ED, inputs[2], inputs[3])))
    assert rough.total.item() == pytest.approx(exact.total.item(), rel=1e-5)


@given(
    distance=st.floats(0, 4) | st.sampled_from([math.nan, math.inf, 1.0]),
    attempt=st.integers(0, 3),
    backtracks=st.integers(0, 3),
)
def test_verdict(distance: float, attempt: int, backtracks: int) -> None:
    if attempt > backtracks:
        with pytest.raises(ValueError, match=rf"attempt={attempt}: with max_backtracks={backtracks} it is 0 to"):
            verdict(distance, 1.0, attempt=attempt, max_backtracks=backtracks)
        return
    got = verdict(distance, 1.0, attempt=attempt, max_backtracks=backtracks)
    if distance <= 1.0:
        assert got is Outcome.accept
    elif attempt < backtracks:
        assert got is Outcome.backtrack
    else:
        assert got is Outcome.reject
    watched = verdict(distance, 1.0, attempt=attempt, max_backtracks=backtracks, accept_all=True)
    assert watched is Outcome.accept


def test_a_step_is_decided_after_finitely_many_attempts() -> None:
    outcomes, count = [], 0
    for attempt in range(4):
        outcomes.append(verdict(5.0 * 0.5**attempt, 0.1, attempt=attempt, max_backtracks=3))
        count = consecutive_rejections(count, outcomes[-1])
    assert outcomes == [Outcome.backtrack] * 3 + [Outcome.reject] and count == 1
    assert consecutive_rejections(count, Outcome.reject) == 2
    assert consecutive_rejections(count, Outcome.backtrack) == 1
    assert consecutive_rejections(count, Outcome.accept) == 0
    assert verdict(0.5, 0.5, attempt=0, max_backtracks=3) is Outcome.accept


def test_a_trust_region_that_cannot_work_is_refused() -> None:
    for delta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"delta={delta}: .*choose a bound > 0"):
            verdict(0.1, delta, attempt=0, max_backtracks=3)

"""The geometric trust region: how far the router-weighted prototypes have moved from those of the actors (VP2O section 3.3).

A context x is a token's position. Its barycenter is the mean of the prototypes of the experts that it is routed to, weighted
with its gates. The distance compares the learner's with that of the actors' snapshot, the anchor.

Shape legend: T contexts, E experts, D hidden size.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vp2o.core.choices import Barycenter


class Distances(NamedTuple):
    """Sums over contexts, float64; with the count of several ranks and layers they add up to means."""

    total: Tensor
    """|z - z_bar|."""
    gates: Tensor
    """The part of the router: learner's gates against the actors', both on the anchor's prototypes."""
    prototypes: Tensor
    """The part of the prototypes: learner's against the anchor's, both under the actors' gates."""


def normalised_gates(gates_TE: Tensor) -> Tensor:
    """Gates that add up to 1 for each context; zeros stay where a token has no expert. Dense rows, 0 for others. [T, E]."""
    total_T1 = gates_TE.sum(-1, keepdim=True)
    return torch.where(total_T1 > 0, gates_TE / total_T1.clamp(min=torch.finfo(gates_TE.dtype).tiny), 0.0)


def barycenter_distance(
    gates_TE: Tensor, prototypes_ED: Tensor, anchor_gates_TE: Tensor, anchor_ED: Tensor, kind: Barycenter
) -> Tensor:
    """|z(x) - z_bar(x)| for each context, [T] float64.

    `vector` is the paper's, z = sum_i g_i v_i: exact to see, but its value depends on the arbitrary sign of each singular
    vector (of all at once it does not). `projective` compares sum_i g_i v_i v_i^T in the Frobenius norm, which no sign changes;
    it is computed from Gram matrices, nothing of size [D, D] is made.

    Args:
        gates_TE: the learner's gates, dense, normalised.
        prototypes_ED: the learner's prototypes, unit vectors.
        anchor_gates_TE: the actors' gates at the same contexts.
        anchor_ED: the anchor's prototypes.
    """
    if kind is Barycenter.vector:
        # in two parts, so that what has not moved gives exactly zero
        moved_TD = (gates_TE - anchor_gates_TE).double() @ anchor_ED.double()
        return (moved_TD + gates_TE.double() @ (prototypes_ED.double() - anchor_ED.double())).norm(dim=-1)
    g_TE, a_TE = gates_TE.double(), anchor_gates_TE.double()
    v_ED, u_ED = prototypes_ED.double(), anchor_ED.double()
    square_T = _quadratic(g_TE, v_ED, v_ED, g_TE) + _quadratic(a_TE, u_ED, u_ED, a_TE)
    return (square_T - 2.0 * _quadratic(g_TE, v_ED, u_ED, a_TE)).clamp(min=0.0).sqrt()


def _quadratic(left_TE: Tensor, v_ED: Tensor, u_ED: Tensor, right_TE: Tensor) -> Tensor:
    """sum_ij l_i (v_i . u_j)^2 r_j for each context."""
    return ((left_TE @ (v_ED @ u_ED.t()).square()) * right_TE).sum(-1)


def distances(
    gates_TE: Tensor, prototypes_ED: Tensor, anchor_gates_TE: Tensor, anchor_ED: Tensor, kind: Barycenter
) -> Distances:
    """Sums over contexts of the distance and of its two parts (which need not add up to it). Arguments as above."""
    return Distances(
        barycenter_distance(gates_TE, prototypes_ED, anchor_gates_TE, anchor_ED, kind).sum(),
        barycenter_distance(gates_TE, anchor_ED, anchor_gates_TE, anchor_ED, kind).sum(),
        barycenter_distance(anchor_gates_TE, prototypes_ED, anchor_gates_TE, anchor_ED, kind).sum(),
    )


class Verdict(enum.Enum):
    """What becomes of a step."""

    accept = "accept"
    backtrack = "backtrack"  # halve it and look again
    reject = "reject"  # back to where it started


def verdict(distance: float, delta: float, halvings: int, max_halvings: int) -> Verdict:
    """Accept iff D <= delta (VP2O section 3.3); else halve, as often as allowed. A distance that is no number is no accept."""
    if not math.isnan(distance) and distance <= delta:
        return Verdict.accept
    return Verdict.backtrack if halvings < max_halvings else Verdict.reject

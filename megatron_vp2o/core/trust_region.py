"""The geometric trust region: how far a step moved the experts' barycenters, and whether that was too far.

A token's barycenter is the mean of its experts' prototypes, weighted by its gates (VP2O section 3.3):

    z(x) = sum_{i in A(x)} g_i(x) v_i          D = mean over contexts x and layers of | z(x) - z_anchor(x) |_2

Signs. A prototype is a singular vector and has no sign, yet | z - z_anchor | depends on the signs. With
u_i = g_i v_i - g_anchor_i v_anchor_i it is | sum_i u_i |, and flipping the sign of expert i in both sets turns u_i into -u_i.
That changes the norm, unless all experts are flipped or u_i is orthogonal to the sum of the others. (Two experts with the same
direction, gates moving from one to the other: D = 0 if their signs agree, twice the gate's change if not.) D must not depend
on that choice. `oriented` therefore makes signs part of D's definition: an anchor prototype's largest component is positive,
and a learner's prototype points to the anchor's side. Then no flip of any prototype, in one set or in both, changes D.

Shape legend: `...` any leading dimensions (layers), T contexts, E experts, K experts of a context, D hidden size.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

import torch
from torch import Tensor


def renormalised(gates_TE: Tensor) -> Tensor:
    """Gates divided by their sum over experts; rows of zeros stay. [..., T, E].

    Example:
        >>> renormalised(torch.tensor([[3.0, 1.0], [0.0, 0.0]])).tolist()
        [[0.75, 0.25], [0.0, 0.0]]
    """
    sums_T1 = gates_TE.sum(-1, keepdim=True)
    return gates_TE / torch.where(sums_T1 > 0, sums_T1, torch.ones_like(sums_T1))


def barycenters(gates_TE: Tensor, prototypes_ED: Tensor) -> Tensor:
    """z(x) = sum_i g_i(x) v_i (VP2O section 3.3): [..., T, D].

    Args:
        gates_TE: dense gates, whose rows add up to 1.
        prototypes_ED: unit vectors.

    Example:
        >>> barycenters(torch.tensor([[0.75, 0.25]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
        [[0.75, 0.25]]
    """
    return gates_TE @ prototypes_ED


def oriented(prototypes_ED: Tensor, anchor_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of prototypes with the signs that D is defined with: see the module's text. Each [..., E, D].

    The anchor's signs come from the anchor alone, so that D is continuous between two refreshes as long as no prototype
    turns by 90 degrees.

    Example:
        >>> [part.tolist() for part in oriented(torch.tensor([[3.0, -4.0]]), torch.tensor([[-5.0, -5.0]]))]
        [[[-3.0, 4.0]], [[5.0, 5.0]]]
    """
    anchor_ED = anchor_ED * _sign(_largest_component(anchor_ED))
    cosine_E1 = (prototypes_ED * anchor_ED).sum(-1, keepdim=True)
    side_E1 = torch.where(cosine_E1 != 0, cosine_E1, _largest_component(prototypes_ED))
    return prototypes_ED * _sign(side_E1), anchor_ED


def _largest_component(vectors_ED: Tensor) -> Tensor:
    return vectors_ED.gather(-1, vectors_ED.abs().argmax(-1, keepdim=True))


def _sign(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)


class Deviation(NamedTuple):
    """Sums over contexts, float64 [...]: they add up over layers, ranks and micro-batches. Divide by `contexts` for means.

    Example:
        >>> gates_TE = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
        >>> moved = deviation(gates_TE, -torch.eye(2), gates_TE, torch.eye(2))  # prototypes have no sign: nothing moved
        >>> (moved.total.item(), moved.contexts.item())
        (0.0, 2.0)
    """

    total: Tensor
    """| z - z_anchor |, whose mean is D."""
    gates: Tensor
    """| (g - g_anchor) V_anchor |: what D would be had only the router moved."""
    prototypes: Tensor
    """| g (V - V_anchor) |: what D would be had only the prototypes moved, under today's gates."""
    contexts: Tensor
    """How many count."""


def deviation(
    gates_TE: Tensor,
    prototypes_ED: Tensor,
    anchor_gates_TE: Tensor,
    anchor_prototypes_ED: Tensor,
    valid_T: Tensor | None = None,
) -> Deviation:
    """Distances between the learner's and the anchor's barycenters (VP2O section 3.3), and what they are made of.

    The path from anchor to learner has two legs, first the gates, then the prototypes:

        z - z_anchor = (g - g_anchor) V_anchor + g (V - V_anchor)

    Summing the legs rather than subtracting barycenters makes D exactly 0 where nothing moved, and keeps its digits where
    little did. Of the three, none is larger than the sum of the other two; they do not add up.

    Args:
        gates_TE: the learner's gates, dense, rows adding up to 1.
        prototypes_ED: the learner's prototypes, unit vectors of any sign.
        anchor_gates_TE: the actor's, from its logged top-k gates.
        anchor_prototypes_ED: those of the anchor snapshot.
        valid_T: True for contexts that count; values elsewhere are ignored.

    Returns:
        Sums [...] over the contexts that count, and their number.

    Example:
        >>> gates_TE, anchor_gates_TE = torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.5, 0.5]])
        >>> moved = deviation(gates_TE, torch.eye(4), anchor_gates_TE, torch.eye(4))  # by (0.5, 0.5, -0.5, -0.5)
        >>> moved.total.item(), moved.gates.item(), moved.prototypes.item()
        (1.0, 1.0, 0.0)
    """
    prototypes_ED, anchor_prototypes_ED = oriented(prototypes_ED, anchor_prototypes_ED)
    router_TD = barycenters(gates_TE - anchor_gates_TE, anchor_prototypes_ED)
    prototype_TD = barycenters(gates_TE, prototypes_ED - anchor_prototypes_ED)
    if valid_T is None:
        valid_T = torch.ones(gates_TE.shape[:-1], dtype=torch.bool, device=gates_TE.device)

    def summed(difference_TD: Tensor) -> Tensor:
        return torch.where(valid_T, difference_TD.norm(dim=-1), 0.0).sum(-1, dtype=torch.float64)

    return Deviation(
        summed(router_TD + prototype_TD), summed(router_TD), summed(prototype_TD), valid_T.sum(-1, dtype=torch.float64)
    )


class Outcome(enum.Enum):
    """What becomes of a step."""

    accept = "accept"
    backtrack = "backtrack"  # restore, and try a smaller one
    reject = "reject"  # restore, keep the old state, refresh the actors


def verdict(
    distance: float,
    delta: float,
    *,
    attempt: int,
    max_backtracks: int,
    drift: float = 0.0,
    max_drift: float = math.inf,
    accept_all: bool = False,
) -> Outcome:
    """Accept iff D <= delta and the policy's drift <= max_drift, else try again with half the step, at most `max_backtracks` times.

    A distance or drift that is no number is never within the bound. Every rank that is given the same numbers says the same.

    Args:
        distance: D after this attempt.
        delta: bound, > 0.
        drift: what the policy itself moved by at the step's own tokens, in nats; this project's, not the paper's.
        max_drift: its bound, > 0; infinite where there is none, and then any drift is within it.
        attempt: how many attempts at this step came before.
        max_backtracks: how many smaller steps may be tried; 0 rejects at once.
        accept_all: observe only (`monitor`): the outcome is always accept.

    Raises:
        ValueError: for a delta or max_drift that is not positive, or an attempt outside 0..max_backtracks.

    Example:
        >>> [verdict(0.3, delta=0.1, attempt=attempt, max_backtracks=2).name for attempt in (0, 1, 2)]
        ['backtrack', 'backtrack', 'reject']
        >>> verdict(0.1, delta=0.1, attempt=0, max_backtracks=2).name
        'accept'
    """
    if not delta > 0:
        raise ValueError(f"delta={delta}: no step can stay within it; choose a bound > 0")
    if not 0 <= attempt <= max_backtracks:
        raise ValueError(f"attempt={attempt}: with max_backtracks={max_backtracks} it is 0 to {max_backtracks}")
    if not max_drift > 0:
        raise ValueError(f"max_drift={max_drift}: no step can stay within it; choose a bound > 0")
    within = distance <= delta and (drift <= max_drift or max_drift == math.inf)
    if accept_all or within:
        return Outcome.accept
    return Outcome.backtrack if attempt < max_backtracks else Outcome.reject


def consecutive_rejections(before: int, outcome: Outcome) -> int:
    """Steps rejected in a row, after one more outcome. A run whose count reaches its maximum must stop.

    A backtrack decides nothing: the step is still being tried.

    Example:
        >>> consecutive_rejections(2, Outcome.reject), consecutive_rejections(2, Outcome.accept)
        (3, 0)
    """
    if outcome is Outcome.accept:
        return 0
    return before + 1 if outcome is Outcome.reject else before

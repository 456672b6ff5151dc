"""Prototypes: the principal output direction of each expert, by power iteration, and the gradient through it.

An expert's output projection is W [F, D], y = h W. torch stores `weight` = W^T, [D, F], and that is what these functions
take. The prototype v [D] is the principal eigenvector of M = W^T W, a direction of the output space, comparable between
experts. M is never formed.

Under expert tensor parallelism a rank holds some of the rows of W (F is cut): W v is local, W^T (W v) a partial sum.
`reduce` adds those up; the functions take all layers at once so that one collective serves them all.

Shape legend: L layers, E experts (local ones, where sharded), D hidden size, F expert intermediate size (local shard).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Adds a tensor up over the ranks that share an expert; returns the sum."""

_TINY = 1e-30


def local_sum(partial: Tensor) -> Tensor:
    """`Reduce` where nothing is sharded.

    Example:
        >>> local_sum(torch.tensor([1.0, 2.0])).tolist()
        [1.0, 2.0]
    """
    return partial


def output_rows(weights: Sequence[Tensor], vectors_LED: Tensor) -> list[Tensor]:
    """W v for each layer's experts: from L of [E, D, F] and [L, E, D] to L of [E, F].

    Example:
        >>> weight_EDF = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
        >>> [rows_EF.tolist() for rows_EF in output_rows([weight_EDF], torch.tensor([[[1.0, 0.0]]]))]
        [[[3.0, 0.0, 0.0]]]
    """
    return [
        torch.bmm(vectors_ED[:, None], weight_EDF)[:, 0]
        for weight_EDF, vectors_ED in zip(weights, vectors_LED, strict=True)
    ]


def _transposed_product(weights: Sequence[Tensor], rows: Sequence[Tensor], reduce: Reduce) -> Tensor:
    """W^T h, summed over shards: [L, E, D]."""
    parts = [torch.bmm(weight_EDF, h_EF[..., None])[..., 0] for weight_EDF, h_EF in zip(weights, rows, strict=True)]
    return reduce(torch.stack(parts))


def gram_product(weights: Sequence[Tensor], vectors_LED: Tensor, reduce: Reduce = local_sum) -> Tensor:
    """M v = W^T (W v): [L, E, D].

    Example:
        >>> weight_EDF = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
        >>> gram_product([weight_EDF], torch.tensor([[[1.0, 0.0]]])).tolist()
        [[[9.0, 0.0]]]
    """
    return _transposed_product(weights, output_rows(weights, vectors_LED), reduce)


def initial_prototypes(layers: Sequence[int], experts: Sequence[int], hidden: int, seed: int) -> Tensor:
    """Random unit vectors [L, E, D] that depend on the layer's and the expert's global number only, not on the layout.

    Example:
        >>> here_LED, there_LED = initial_prototypes([0, 1], [2, 3], 4, seed=0), initial_prototypes([1], [3], 4, seed=0)
        >>> torch.equal(here_LED[1, 1], there_LED[0, 0])
        True
    """
    start_LED = torch.empty(len(layers), len(experts), hidden)
    for row_ED, layer in zip(start_LED, layers, strict=True):
        for row_D, expert in zip(row_ED, experts, strict=True):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) * 1_000_003 + expert)
            row_D.copy_(torch.randn(hidden, generator=generator))
    return start_LED / start_LED.norm(dim=-1, keepdim=True)


def _made_once(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same weights. Those of a single layer are held: a sequence that makes them when asked would make them at every use."""
    return [weights[0]] if len(weights) == 1 else weights


def power_iteration(
    weights: Sequence[Tensor], prototypes_LED: Tensor, steps: int, reduce: Reduce = local_sum
) -> tuple[Tensor, Tensor]:
    """n steps of v <- normalise(M v), then the sign of the start (VP2O section 3.2).

    A singular vector has no sign; keeping it makes barycenters of prototypes continuous in time. An expert whose W is
    zero keeps its prototype.

    Args:
        weights: L of [E, D, F], in the precision to compute in.
        prototypes_LED: unit vectors to start from.
        steps: n >= 1.
        reduce: adds partial sums over the expert-tensor-parallel ranks, [L, E, D] each step.

    Returns:
        (prototypes [L, E, D], relative residual |M v - (v.M v) v| / (v.M v) of those before the last step [L, E]).

    Example:
        >>> weight_EDF = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])  # the principal direction is the first axis
        >>> prototypes_LED, residual_LE = power_iteration([weight_EDF], torch.tensor([[[-0.6, 0.8]]]), steps=20)
        >>> prototypes_LED.round(decimals=3).tolist(), residual_LE.round(decimals=3).tolist()
        ([[[-1.0, 0.0]]], [[0.0]])
    """
    if reduce is local_sum and len(weights) > 1:  # layer by layer, so that each layer's weights are made once
        parts = [
            power_iteration([weight_EDF], rows_ED[None], steps)
            for weight_EDF, rows_ED in zip(weights, prototypes_LED, strict=True)
        ]
        return torch.cat([vectors for vectors, _ in parts]), torch.cat([residuals for _, residuals in parts])
    weights, start_LED = _made_once(weights), prototypes_LED
    image_LED = start_LED
    for _ in range(steps):
        image_LED = gram_product(weights, prototypes_LED, reduce)
        norm_LE1 = image_LED.norm(dim=-1, keepdim=True)
        last_LED, prototypes_LED = prototypes_LED, torch.where(norm_LE1 > _TINY, image_LED / norm_LE1, prototypes_LED)
    rayleigh_LE1 = (last_LED * image_LED).sum(-1, keepdim=True)
    residual_LE1 = (image_LED - rayleigh_LE1 * last_LED).norm(dim=-1, keepdim=True) / rayleigh_LE1.clamp(min=_TINY)
    flipped_LE1 = (prototypes_LED * start_LED).sum(-1, keepdim=True) < 0
    return torch.where(flipped_LE1, -prototypes_LED, prototypes_LED), residual_LE1[..., 0]


class Converged(NamedTuple):
    """What `converged_prototypes` found.

    Example:
        >>> found = converged_prototypes([torch.eye(2)[None]], torch.tensor([[[1.0, 0.0]]]), angle=1e-6, most=1)
        >>> found.residual_LE.tolist(), found.angle_LE.tolist()  # every vector is an eigenvector of the identity
        ([[0.0]], [[0.0]])
    """

    prototypes_LED: Tensor
    residual_LE: Tensor
    """As `power_iteration` has it: the angle by which one more of its steps would turn the prototype."""
    angle_LE: Tensor
    """By how much the last iteration turned the prototype, radians."""


def converged_prototypes(
    weights: Sequence[Tensor], prototypes_LED: Tensor, *, angle: float, most: int, reduce: Reduce = local_sum
) -> Converged:
    """The principal eigenvector of M, until its direction has come to rest, with the sign of the start.

    Power iteration needs some 1/gap steps, and fresh weights have hardly a gap between their singular values: its steps become
    small long before it arrives, and it then creeps on for thousands of them. Here each iteration takes the best vector in
    the span of v, its residual and the last change (locally optimal conjugate gradients: Knyazev, SIAM J. Sci. Comput. 23,
    2001), which needs the square root of that number. It reads the weights once for all three.

    Args:
        weights: L of [E, D, F], in the precision to compute in.
        prototypes_LED: unit vectors to start from.
        angle: an expert has arrived when an iteration turns it by less than this, radians, after which it stays as it is: its
            result does not depend on the others'.
        most: iterations, if it does not arrive before; >= 1.
        reduce: adds partial sums over the expert-tensor-parallel ranks, [L, E, 3, D] each iteration.

    Example:
        >>> weight_EDF = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])  # the principal direction is the first axis
        >>> found = converged_prototypes([weight_EDF], torch.tensor([[[-0.6, 0.8]]]), angle=1e-6, most=10)
        >>> found.prototypes_LED.round(decimals=3).tolist()
        [[[-1.0, 0.0]]]
    """
    weights = _made_once(weights)
    start_LED, change_LED = prototypes_LED, torch.zeros_like(prototypes_LED)
    value_LED = gram_product(weights, prototypes_LED, reduce)
    angle_LE = residual_LE = torch.full_like(prototypes_LED[..., 0], torch.inf)
    moving_LE = torch.ones_like(angle_LE, dtype=torch.bool)
    for iteration in range(most):
        basis_LE3D = _search_space(prototypes_LED, value_LED, change_LED)
        images_LE3D = _block_product(weights, basis_LE3D, reduce)
        value_LED = images_LE3D[:, :, 0]
        residual_LE = torch.where(moving_LE, _residual(prototypes_LED, value_LED), residual_LE)
        inner_LE33 = (basis_LE3D @ images_LE3D.transpose(-1, -2)).double()
        weights_LE3 = principal_vectors((inner_LE33 + inner_LE33.transpose(-1, -2)) / 2)
        weights_LE3 = (weights_LE3 * torch.where(weights_LE3[..., :1] < 0, -1.0, 1.0)).to(basis_LE3D.dtype)
        change_LED = (weights_LE3[..., 1:, None] * basis_LE3D[:, :, 1:]).sum(2)
        turned_LED = weights_LE3[..., :1] * prototypes_LED + change_LED
        image_LED = (weights_LE3[..., None] * images_LE3D).sum(2)
        angle_LE = torch.where(moving_LE, torch.atan2(change_LED.norm(dim=-1), weights_LE3[..., 0]), angle_LE)
        turns_LE1 = (moving_LE & (image_LED.norm(dim=-1) > _TINY))[..., None]
        prototypes_LED = torch.where(turns_LE1, turned_LED / turned_LED.norm(dim=-1, keepdim=True), prototypes_LED)
        value_LED = torch.where(turns_LE1, image_LED, value_LED)
        moving_LE = moving_LE & (angle_LE >= angle)
        if iteration % 8 == 7 and not bool(moving_LE.any()):  # asking stalls a GPU's queue
            break
    flipped_LE1 = (prototypes_LED * start_LED).sum(-1, keepdim=True) < 0
    return Converged(torch.where(flipped_LE1, -prototypes_LED, prototypes_LED), residual_LE, angle_LE)


def principal_vectors(matrices_X33: Tensor) -> Tensor:
    """Eigenvectors of the largest eigenvalues of small symmetric matrices without negative eigenvalues but for rounding, of any
    sign: [..., 3] float64. Zero matrices have any unit vector.

    torch's routine makes the host wait for a GPU, to ask whether it succeeded. Elsewhere than on a CPU the matrices are squared
    instead until they have rank one: 32 times, so that a gap of 1e-8 of the eigenvalue is enough.

    Example:
        >>> principal_vectors(torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))).abs().tolist()
        [0.0, 1.0, 0.0]
    """
    if matrices_X33.device.type == "cpu":
        return torch.linalg.eigh(matrices_X33).eigenvectors[..., -1]
    return principal_vectors_by_squaring(matrices_X33)


def principal_vectors_by_squaring(matrices_X33: Tensor, squarings: int = 32) -> Tensor:
    """`principal_vectors` on any device, without waiting for it.

    Example:
        >>> principal_vectors_by_squaring(torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))).tolist()
        [0.0, 1.0, 0.0]
    """
    powers_X33 = matrices_X33
    for _ in range(squarings + 1):
        trace_X11 = powers_X33.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        powers_X33 = powers_X33 / torch.where(trace_X11 > _TINY, trace_X11, 1.0)
        powers_X33 = powers_X33 @ powers_X33
    # v v^T by now: the column of v's largest component has the most digits
    diagonal_X3 = powers_X33.diagonal(dim1=-2, dim2=-1)
    column_X1 = diagonal_X3.argmax(-1, keepdim=True)
    vector_X3 = powers_X33.gather(-1, column_X1[..., None].expand(*powers_X33.shape[:-1], 1))[..., 0]
    length_X1 = vector_X3.norm(dim=-1, keepdim=True)
    first_X3 = torch.zeros_like(vector_X3).scatter(-1, column_X1, 1.0)
    return torch.where(length_X1 > 0, vector_X3 / length_X1, first_X3)


def _search_space(vectors_LED: Tensor, images_LED: Tensor, changes_LED: Tensor) -> Tensor:
    """An orthonormal basis [L, E, 3, D] of v, its residual and the last change; zero where one adds nothing."""
    basis = [vectors_LED]
    for candidate_LED in (images_LED, changes_LED):
        length_LE1 = candidate_LED.norm(dim=-1, keepdim=True)
        for _ in range(2):  # once leaves the rounding of what it takes away
            for vector_LED in basis:
                candidate_LED = candidate_LED - (candidate_LED * vector_LED).sum(-1, keepdim=True) * vector_LED
        left_LE1 = candidate_LED.norm(dim=-1, keepdim=True)
        new_LE1 = left_LE1 > 1e-6 * length_LE1
        basis.append(torch.where(new_LE1, candidate_LED / left_LE1, 0.0))
    return torch.stack(basis, dim=2)


def _block_product(weights: Sequence[Tensor], blocks_LE3D: Tensor, reduce: Reduce) -> Tensor:
    """M u for three vectors an expert, summed over shards: [L, E, 3, D]."""
    parts = [
        torch.bmm(torch.bmm(block_E3D, weight_EDF), weight_EDF.transpose(1, 2))
        for weight_EDF, block_E3D in zip(weights, blocks_LE3D, strict=True)
    ]
    return reduce(torch.stack(parts))


def _residual(vectors_LED: Tensor, images_LED: Tensor) -> Tensor:
    rayleigh_LE1 = (vectors_LED * images_LED).sum(-1, keepdim=True)
    return (images_LED - rayleigh_LE1 * vectors_LED).norm(dim=-1) / rayleigh_LE1[..., 0].clamp(min=_TINY)


class RankTwo(NamedTuple):
    """A gradient with respect to the stored weights, `left_a right_a^T + left_b right_b^T`, [D, F] an expert.

    Example:
        >>> x_LED, nothing_LED = torch.tensor([[[3.0, 4.0]]]), torch.zeros(1, 1, 2)
        >>> RankTwo(x_LED, [torch.tensor([[2.0]])], nothing_LED, [torch.zeros(1, 1)]).norms().tolist()
        [[10.0]]
    """

    left_a_LED: Tensor  # s
    right_a: list[Tensor]  # W v, L of [E, F]
    left_b_LED: Tensor  # v
    right_b: list[Tensor]  # W s, L of [E, F]

    def norms(self, reduce: Reduce = local_sum) -> Tensor:
        """Frobenius norm an expert, [L, E], without forming the matrix."""
        inner = [
            torch.stack([(x * y).sum(-1) for x, y in ((a, a), (b, b), (a, b))])
            for a, b in zip(self.right_a, self.right_b, strict=True)
        ]
        aa_LE, bb_LE, ab_LE = reduce(torch.stack(inner, dim=1)).unbind(0)
        s_LED, v_LED = self.left_a_LED, self.left_b_LED
        square_LE = (
            aa_LE * s_LED.square().sum(-1) + bb_LE * v_LED.square().sum(-1) + 2.0 * ab_LE * (s_LED * v_LED).sum(-1)
        )
        return square_LE.clamp(min=0.0).sqrt()


def prototype_gradient(
    weights: Sequence[Tensor], prototypes_LED: Tensor, pull_LED: Tensor, steps: int, reduce: Reduce = local_sum
) -> RankTwo:
    """dF/dW from a = dF/dv, through n unrolled power steps at a converged v (VP2O Eq. 10; docs/method.md).

        a_perp = a - (a.v) v,  lambda = |W v|^2,  s = (1/lambda) sum_{t<n} (M/lambda)^t a_perp
        dF/dW = (W v) s^T + (W s) v^T     (here its transpose, for the stored weight)

    n terms, not the exact resolvent: fresh weights have hardly a spectral gap, and the inverse blows up. It is rank two;
    nothing of size [D, F] is made. Zero for an expert whose W is zero.

    Args:
        weights: L of [E, D, F].
        prototypes_LED: v, unit vectors.
        pull_LED: a.
        steps: n >= 1.
        reduce: adds partial sums over the expert-tensor-parallel ranks.

    Example:
        >>> weight_EDF, v_LED = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
        >>> gradient = prototype_gradient([weight_EDF], v_LED, pull_LED=torch.ones(1, 1, 2), steps=1)
        >>> gradient.left_a_LED.tolist(), gradient.right_b[0].tolist()  # s = a_perp / 4 and W s
        ([[[0.0, 0.25]]], [[0.0, 0.25]])
    """
    if reduce is local_sum and len(weights) > 1:  # layer by layer, so that each layer's weights are made once
        parts = [
            prototype_gradient([weight_EDF], rows_ED[None], slope_ED[None], steps)
            for weight_EDF, rows_ED, slope_ED in zip(weights, prototypes_LED, pull_LED, strict=True)
        ]
        return RankTwo(
            torch.cat([part.left_a_LED for part in parts]),
            [right for part in parts for right in part.right_a],
            torch.cat([part.left_b_LED for part in parts]),
            [right for part in parts for right in part.right_b],
        )
    weights, v_LED = _made_once(weights), prototypes_LED
    wv = output_rows(weights, v_LED)
    lambda_LE1 = reduce(torch.stack([h_EF.square().sum(-1) for h_EF in wv]))[..., None]
    inverse_LE1 = torch.where(lambda_LE1 > _TINY, 1.0 / lambda_LE1.clamp(min=_TINY), 0.0)
    term_LED = (pull_LED - (pull_LED * v_LED).sum(-1, keepdim=True) * v_LED) * inverse_LE1
    s_LED = term_LED
    for _ in range(steps - 1):
        term_LED = gram_product(weights, term_LED, reduce) * inverse_LE1
        s_LED = s_LED + term_LED
    return RankTwo(s_LED, wv, v_LED, output_rows(weights, s_LED))

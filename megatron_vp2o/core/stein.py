"""The Stein field over experts, as weights on their gradients and on the kernel's.

In the loss-gradient sign (what an optimizer descends), for an active expert i (VP2O Eqs. 9 and 10):

    g~_i = sum_j w+_ij g_j  +  eta * sum_j w-_ij dK_ij/dW_i        (the second term on the output projection only)

Shape legend: E experts, `...` any leading dimensions (layers).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vp2o.core.choices import Normalisation


def attraction_weights(kernel_EE: Tensor, mask_EE: Tensor, normalisation: Normalisation = Normalisation.row) -> Tensor:
    """w+_ij = K_ij A+_ij / sum_l K_il A+_il (VP2O Eq. 9); a row without neighbours is zero. [..., E, E].

    Under `svgd` the divisor is the number of active experts (rows of A+ that are not empty).

    Example:
        >>> attraction_weights(torch.ones(2, 2), torch.tensor([[True, True], [False, True]])).tolist()
        [[0.5, 0.5], [0.0, 1.0]]
    """
    weights_EE = kernel_EE * mask_EE
    if normalisation is Normalisation.svgd:
        return weights_EE / _active(mask_EE)
    return weights_EE / _row_sums(weights_EE)


def repulsion_weights(
    kernel_EE: Tensor,
    mask_EE: Tensor,
    attraction_EE: Tensor,
    normalisation: Normalisation = Normalisation.row,
) -> Tensor:
    """w-_ij = K_ij A-_ij / sum_l K_il A-_il (VP2O Eq. 10); a row with nobody to flee from is zero. [..., E, E].

    Under `svgd`, A-_ij over the number of active experts (rows of A+, `attraction_EE`, that are not empty).

    Example:
        >>> kernel_EE = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]])
        >>> others_EE = ~torch.eye(3, dtype=torch.bool)
        >>> repulsion_weights(kernel_EE, others_EE, ~others_EE).tolist()
        [[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]]
    """
    if normalisation is Normalisation.svgd:
        return mask_EE.to(kernel_EE.dtype) / _active(attraction_EE)
    weights_EE = kernel_EE * mask_EE
    return weights_EE / _row_sums(weights_EE)


def mix(weights_EE: Tensor, gradients_EP: Tensor, out: Tensor | None = None) -> Tensor:
    """The attraction: rows w+ G. Plain matrix product, any slice of an expert's P parameters at a time. [..., E, P].

    Example:
        >>> mix(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([[2.0], [4.0]])).tolist()
        [[3.0], [4.0]]
    """
    return torch.matmul(weights_EE, gradients_EP, out=out)


def _row_sums(weights_EE: Tensor) -> Tensor:
    sums_E1 = weights_EE.sum(-1, keepdim=True)
    return torch.where(sums_E1 > 0, sums_E1, torch.ones_like(sums_E1))


def _active(mask_EE: Tensor) -> Tensor:
    return mask_EE.any(-1).sum(-1).clamp(min=1)[..., None, None]

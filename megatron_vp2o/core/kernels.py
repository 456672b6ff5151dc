"""Kernels between expert prototypes, and how they change with one.

Shape legend: E experts, D hidden size, `...` any leading dimensions (layers).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_vp2o.core.choices import Kernel, TemperatureScaling


def temperature(base: float, experts: int, scaling: TemperatureScaling) -> float:
    """tau from tau_0 and E (VP2O section 3.2). One expert has no neighbour: tau_0 itself.

    Example:
        >>> temperature(1.0, 4, TemperatureScaling.sqrt)
        0.5
    """
    if scaling is TemperatureScaling.log and experts > 1:
        return base / math.log(experts)
    if scaling is TemperatureScaling.sqrt:
        return base / math.sqrt(experts)
    return base


def similarity(prototypes_ED: Tensor, kernel: Kernel) -> Tensor:
    """c_ij of unit prototypes: [..., E, E].

    Example:
        >>> prototypes_ED = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> [similarity(prototypes_ED, kernel)[0].tolist() for kernel in (Kernel.cosine, Kernel.projective)]
        [[1.0, -1.0], [1.0, 1.0]]
    """
    gram_EE = prototypes_ED @ prototypes_ED.transpose(-1, -2)
    return gram_EE.square() if kernel is Kernel.projective else gram_EE


def kernel_matrix(prototypes_ED: Tensor, *, tau: float, kernel: Kernel) -> Tensor:
    """K_ij = exp((c_ij - 1) / tau), with K_ii = 1 (VP2O Eq. 8). [..., E, E].

    Both kernels are positive definite: the exponential of a polynomial with non-negative coefficients in v_i . v_j.

    Args:
        prototypes_ED: unit vectors, [..., E, D].
        tau: temperature, > 0.

    Example:
        >>> kernel_matrix(torch.eye(2), tau=0.5, kernel=Kernel.projective).log().round(decimals=3).tolist()
        [[0.0, -2.0], [-2.0, 0.0]]
    """
    kernel_EE = torch.exp((similarity(prototypes_ED, kernel) - 1.0) / tau)
    return kernel_EE.diagonal_scatter(torch.ones_like(kernel_EE[..., 0]), dim1=-2, dim2=-1)


def kernel_pull(prototypes_ED: Tensor, weights_EE: Tensor, *, tau: float, kernel: Kernel) -> Tensor:
    """a_i = sum_j w_ij dK_ij/dv_i with the weights held constant and v_j fixed (VP2O Eq. 10). [..., E, D].

    Args:
        prototypes_ED: unit vectors, [..., E, D].
        weights_EE: w-, [..., E, E]; its diagonal is zero.
        tau: temperature.

    Example:
        >>> prototypes_ED, weights_EE = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> kernel_pull(prototypes_ED, weights_EE, tau=2.0, kernel=Kernel.cosine).tolist()  # K = 1, so v_2 / tau
        [[0.5, 0.0], [0.0, 0.0]]
    """
    pull_EE = weights_EE * kernel_matrix(prototypes_ED, tau=tau, kernel=kernel) / tau
    if kernel is Kernel.projective:
        pull_EE = 2.0 * pull_EE * (prototypes_ED @ prototypes_ED.transpose(-1, -2))
    return pull_EE @ prototypes_ED

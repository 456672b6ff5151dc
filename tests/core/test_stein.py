"""The field against SVGD as Pyro computes it, and against loops."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVGD
from pyro.infer.svgd import SteinKernel
from pyro.optim import PyroOptim
from torch import Tensor

from megatron_vp2o.core.choices import Normalisation
from megatron_vp2o.core.stein import attraction_weights, mix, repulsion_weights

PARTICLES, SIZE = 6, 4
BANDWIDTH = 2.5
MEAN = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
SCALE = torch.tensor([0.7, 1.3, 1.0, 0.4], dtype=torch.float64)


class OneKernel(SteinKernel):  # type: ignore[misc]
    """exp(-|x - y|^2 / h), the same h in every direction."""

    def log_kernel_and_grad(self, particles: Tensor) -> tuple[Tensor, Tensor]:
        difference = particles[None] - particles[:, None]
        return -difference.square() / BANDWIDTH, 2.0 * difference / BANDWIDTH


def svgd_direction() -> tuple[Tensor, Tensor]:
    """Particles, and the direction in which Pyro's SVGD moves them: one plain gradient step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)

    def model() -> None:
        pyro.sample("x", dist.Normal(MEAN, SCALE).to_event(1))

    rate = 1e-2
    svgd = SVGD(
        model,
        OneKernel(),
        PyroOptim(torch.optim.SGD, {"lr": rate}),
        PARTICLES,
        max_plate_nesting=0,
        mode="multivariate",
    )
    svgd.step()  # makes the particles, and moves them once
    before = svgd.get_named_particles()["x"].detach().clone().reshape(PARTICLES, SIZE)
    svgd.step()
    after = svgd.get_named_particles()["x"].detach().reshape(PARTICLES, SIZE)
    return before, (after - before) / rate


def test_with_full_masks_and_one_kernel_the_field_is_svgd() -> None:
    x, direction = svgd_direction()
    leaf = x.clone().requires_grad_()
    kernel_EE = torch.exp(-(leaf[:, None] - x[None]).square().sum(-1) / BANDWIDTH)
    full = torch.ones(PARTICLES, PARTICLES, dtype=torch.bool)
    plus = attraction_weights(kernel_EE.detach(), full, Normalisation.svgd)
    minus = repulsion_weights(kernel_EE.detach(), full, full, Normalisation.svgd)
    (minus * kernel_EE).sum().backward()
    loss_gradient = (x - MEAN) / SCALE.square()  # of -log p
    assert leaf.grad is not None
    field = mix(plus, loss_gradient) + leaf.grad
    assert direction.abs().min() > 1e-4
    assert torch.allclose(-field, direction, rtol=1e-10)


@pytest.mark.parametrize("normalisation", Normalisation)
def test_weights_are_those_of_a_loop(normalisation: Normalisation) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.rand(5, 5, generator=generator, dtype=torch.float64)
    near = torch.rand(5, 5, generator=generator) < 0.5
    near.fill_diagonal_(True)
    near[3] = False  # inactive
    near[:, 3] = False
    far = ~near & ~torch.eye(5).bool()
    far[3] = False
    far[:, 3] = False
    far[1] = False  # everybody is a neighbour
    plus, minus = attraction_weights(kernel, near, normalisation), repulsion_weights(kernel, far, near, normalisation)
    for i in range(5):
        for j in range(5):
            row = sum(kernel[i, k].item() for k in range(5) if near[i, k])
            other = sum(kernel[i, k].item() for k in range(5) if far[i, k])
            if normalisation is Normalisation.svgd:
                expected, away = kernel[i, j].item() / 4, 1 / 4
            else:
                expected, away = kernel[i, j].item() / (row or 1), kernel[i, j].item() / (other or 1)
            assert plus[i, j].item() == pytest.approx(expected if near[i, j] else 0.0)
            assert minus[i, j].item() == pytest.approx(away if far[i, j] else 0.0)
    if normalisation is Normalisation.row:
        assert plus.sum(1).tolist() == pytest.approx([1, 1, 1, 0, 1])
        assert minus[1].sum() == 0


def test_layers_are_batched() -> None:
    kernel, near = torch.rand(3, 5, 5), torch.rand(3, 5, 5) < 0.5
    together = attraction_weights(kernel, near)
    assert torch.equal(together, torch.stack([attraction_weights(k, n) for k, n in zip(kernel, near, strict=True)]))

"""Power iteration against the singular value decomposition, and its gradient against autograd through the loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_vp2o.core.choices import Kernel, TemperatureScaling
from megatron_vp2o.core.kernels import kernel_matrix, kernel_pull, temperature
from megatron_vp2o.core.prototypes import (
    gram_product,
    initial_prototypes,
    power_iteration,
    prototype_gradient,
)

LAYERS, EXPERTS, HIDDEN, WIDTH = 2, 5, 12, 7


def stored_weights(seed: int = 0, gap: float = 3.0) -> list[Tensor]:
    """[E, D, F] a layer, with a clear largest singular value, so that iterations converge to machine precision."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for _ in range(LAYERS):
        raw = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator, dtype=torch.float64)
        u, s, vh = torch.linalg.svd(raw, full_matrices=False)
        s[:, 0] = s[:, 1] * gap
        weights.append(u @ torch.diag_embed(s) @ vh)
    return weights


def start(seed: int = 1) -> Tensor:
    raw = torch.randn(LAYERS, EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return raw / raw.norm(dim=-1, keepdim=True)


def unrolled(weight_DF: Tensor, v_D: Tensor, steps: int) -> Tensor:
    """n power steps that autograd can go through, for one expert."""
    for _ in range(steps):
        v_D = weight_DF @ (weight_DF.t() @ v_D)
        v_D = v_D / v_D.norm()
    return v_D


def test_prototypes_are_the_leading_left_singular_vectors_of_the_stored_weight() -> None:
    weights = stored_weights()
    found_LED, residual_LE = power_iteration(weights, start(), 60)
    for layer, weight_EDF in enumerate(weights):
        u = torch.linalg.svd(weight_EDF).U[:, :, 0]
        assert ((found_LED[layer] * u).sum(-1).abs() - 1).abs().max() < 1e-12
    assert residual_LE.max() < 1e-12


def test_residual_is_that_of_the_definition() -> None:
    weights, v = stored_weights(gap=1.2), start()
    _, residual_LE = power_iteration(weights, v, 1)
    for layer in range(LAYERS):
        for e in range(EXPERTS):
            m = weights[layer][e] @ weights[layer][e].t()
            rayleigh = v[layer, e] @ m @ v[layer, e]
            expected = (m @ v[layer, e] - rayleigh * v[layer, e]).norm() / rayleigh
            assert residual_LE[layer, e].item() == pytest.approx(expected.item(), rel=1e-12)


def test_signs_continue() -> None:
    weights = stored_weights()
    v, _ = power_iteration(weights, start(), 60)
    flipped = v * torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0], dtype=v.dtype)[None, :, None]
    again, _ = power_iteration(weights, flipped, 2)
    assert (again - flipped).abs().max() < 1e-12


def test_a_zero_projection_keeps_its_prototype_and_has_no_gradient() -> None:
    weights = stored_weights()
    weights[0][2] = 0
    v = start()
    found, residual = power_iteration(weights, v, 3)
    assert torch.equal(found[0, 2], v[0, 2]) and residual[0, 2] == 0
    gradient = prototype_gradient(weights, found, start(5), 3)
    assert torch.isfinite(gradient.left_a_LED).all() and not gradient.left_a_LED[0, 2].any()
    assert gradient.norms()[0, 2] == 0


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_rank_two_gradient_is_autograd_through_the_power_steps(steps: int) -> None:
    weights = stored_weights(gap=2.0)
    v, _ = power_iteration(weights, start(), 200)
    pull = start(9) * 3.0
    gradient = prototype_gradient(weights, v, pull, steps)
    norms = gradient.norms()
    for layer in range(LAYERS):
        for e in range(EXPERTS):
            leaf = weights[layer][e].clone().requires_grad_()
            (unrolled(leaf, v[layer, e], steps) @ pull[layer, e]).backward()
            assert leaf.grad is not None
            ours = torch.outer(gradient.left_a_LED[layer, e], gradient.right_a[layer][e]) + torch.outer(
                gradient.left_b_LED[layer, e], gradient.right_b[layer][e]
            )
            assert (ours - leaf.grad).norm() / leaf.grad.norm() < 1e-10
            assert norms[layer, e].item() == pytest.approx(leaf.grad.norm().item(), rel=1e-9)


def test_shards_of_the_width_add_up() -> None:
    """What `reduce` does under expert tensor parallelism: partial sums of two shards, added by hand."""
    weights, v = stored_weights(), start()
    whole, _ = power_iteration(weights, v, 3)
    halves = [[w[:, :, :3].contiguous() for w in weights], [w[:, :, 3:].contiguous() for w in weights]]
    current = v
    for _ in range(3):
        image = gram_product(halves[0], current) + gram_product(halves[1], current)
        current = image / image.norm(dim=-1, keepdim=True)
    sign = torch.where((current * v).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    assert (sign * current - whole).abs().max() < 1e-12


def test_start_depends_on_global_numbers_only() -> None:
    whole = initial_prototypes([1, 2], range(8), 6, seed=3)
    part = initial_prototypes([2], range(4, 8), 6, seed=3)
    assert torch.equal(part[0], whole[1, 4:]) and not torch.equal(whole[0, 0], whole[1, 0])
    assert torch.allclose(whole.norm(dim=-1), torch.ones(2, 8))


@pytest.mark.parametrize("kernel", Kernel)
def test_kernel_and_its_pull(kernel: Kernel) -> None:
    v = start()[0]
    tau = temperature(0.8, EXPERTS, TemperatureScaling.log)
    assert tau == pytest.approx(0.8 / torch.log(torch.tensor(5.0)).item())
    matrix = kernel_matrix(v, tau=tau, kernel=kernel)
    for i in range(EXPERTS):
        for j in range(EXPERTS):
            c = (v[i] @ v[j]) ** 2 if kernel is Kernel.projective else v[i] @ v[j]
            assert matrix[i, j].item() == pytest.approx(1.0 if i == j else torch.exp((c - 1) / tau).item())
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12
    weights = torch.rand(EXPERTS, EXPERTS, dtype=v.dtype).fill_diagonal_(0)
    pull = kernel_pull(v, weights, tau=tau, kernel=kernel)
    for i in range(EXPERTS):
        leaf = v[i].clone().requires_grad_()
        c = leaf @ v.t()
        total = (weights[i] * torch.exp(((c.square() if kernel is Kernel.projective else c) - 1) / tau)).sum()
        total.backward()
        assert leaf.grad is not None and torch.allclose(pull[i], leaf.grad)


def test_projective_kernel_does_not_see_signs() -> None:
    v = start()[0]
    flipped = v * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=v.dtype)[:, None]
    assert torch.allclose(
        kernel_matrix(v, tau=0.5, kernel=Kernel.projective), kernel_matrix(flipped, tau=0.5, kernel=Kernel.projective)
    )


@pytest.mark.parametrize(("scaling", "expected"), [("log", 2.0), ("sqrt", 2.0), ("none", 2.0)])
def test_temperature_of_one_expert(scaling: str, expected: float) -> None:
    assert temperature(2.0, 1, TemperatureScaling[scaling]) == expected

"""Power iteration against the singular value decomposition, and its gradient against autograd through the loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_vp2o.core.choices import Kernel, TemperatureScaling
from megatron_vp2o.core.kernels import kernel_matrix, kernel_pull, temperature
from megatron_vp2o.core.prototypes import (
    converged_prototypes,
    gram_product,
    initial_prototypes,
    power_iteration,
    principal_vectors_by_squaring,
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


def test_settled_prototypes_are_principal_directions():
    """Against eigh in float64, for spectra without a gap, of low rank, and of zeros; none depends on its neighbours."""
    generator = torch.Generator().manual_seed(3)
    flat = torch.randn(40, 90, generator=generator)
    low_rank = torch.randn(40, 1, generator=generator) @ torch.randn(1, 90, generator=generator)
    two_rank = low_rank + 0.5 * torch.randn(40, 1, generator=generator) @ torch.randn(1, 90, generator=generator)
    steep = flat * torch.logspace(0, -6, 40)[:, None]
    weight_EDF = torch.stack([flat, low_rank, two_rank, steep, torch.zeros_like(flat), 1e-6 * flat])
    start_LED = initial_prototypes([1], range(6), 40, seed=0)
    found = converged_prototypes([weight_EDF], start_LED, angle=1e-4, most=500)
    vectors_ED = found.prototypes_LED[0].double()
    gram_EDD = weight_EDF.double() @ weight_EDF.double().transpose(1, 2)
    top_ED = torch.linalg.eigh(gram_EDD).eigenvectors[..., -1]
    cosine_E = (vectors_ED * top_ED).sum(-1).abs()
    assert all(cosine_E[expert] > 1 - 1e-5 for expert in (0, 1, 2, 3, 5)), cosine_E
    assert torch.equal(found.prototypes_LED[0, 4], start_LED[0, 4])  # nothing to turn to
    torch.testing.assert_close(found.prototypes_LED.norm(dim=-1), torch.ones(1, 6))
    assert ((found.prototypes_LED * start_LED).sum(-1) >= 0).all()
    assert found.residual_LE[0, :4].max() < 1e-3
    alone = converged_prototypes([weight_EDF[2:3]], start_LED[:, 2:3], angle=1e-4, most=500)
    torch.testing.assert_close(alone.prototypes_LED[0, 0], found.prototypes_LED[0, 2])


@pytest.mark.parametrize("hidden,width", [(768, 2048), (256, 192)])
def test_updates_of_unmoved_weights_do_not_turn_settled_prototypes(hidden, width):
    """Fresh weights have hardly a spectral gap: 64 power steps leave prototypes that creep on, which D would call movement."""
    generator = torch.Generator().manual_seed(hidden)
    weights = [0.02 * torch.randn(3, hidden, width, generator=generator)]
    start_LED = initial_prototypes([1], range(3), hidden, seed=0)

    def creep(prototypes_LED: Tensor) -> float:
        later_LED = prototypes_LED
        for _ in range(16):
            later_LED, _ = power_iteration(weights, later_LED, 2)
        return (later_LED - prototypes_LED).norm(dim=-1).max().item()

    settled = converged_prototypes(weights, start_LED, angle=1e-5, most=256)
    assert settled.angle_LE.max() < 1e-5
    assert creep(settled.prototypes_LED) < 2e-4
    assert creep(power_iteration(weights, start_LED, 64)[0]) > 0.02  # what the test is there for


def test_squaring_finds_what_the_eigenvalue_routine_finds() -> None:
    """Gaps from none to wide, ranks from 0 to 3, any scale, any order of the axes."""
    generator = torch.Generator().manual_seed(5)
    count = 4000
    axes = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator, dtype=torch.float64))[0]
    second = 1 - 10.0 ** (-9 * torch.rand(count, generator=generator, dtype=torch.float64))
    third = second * torch.rand(count, generator=generator, dtype=torch.float64)
    values = torch.stack([torch.ones_like(second), second, third], dim=1)
    values *= torch.rand(count, 3, generator=generator).double().gt(0.1) | torch.tensor([True, False, False])
    scale = 10.0 ** (24 * torch.rand(count, generator=generator, dtype=torch.float64) - 12)
    matrices = (axes * (values * scale[:, None])[:, None]) @ axes.transpose(1, 2)
    found = principal_vectors_by_squaring(matrices)
    expected = torch.linalg.eigh(matrices).eigenvectors[..., -1]
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(count, dtype=torch.float64), rtol=0, atol=1e-12)
    # the best vector of a space is one whose Rayleigh quotient is the largest; the vector itself where there is a gap
    quotient = ((matrices @ found[..., None])[..., 0] * found).sum(-1) / scale
    torch.testing.assert_close(quotient, torch.ones(count, dtype=torch.float64), rtol=0, atol=1e-8)
    apart = 1 - values[:, 1:].amax(1) > 1e-6
    cosine = (found * expected).sum(-1).abs()[apart]
    assert apart.sum() > count // 2 and float((1 - cosine).max()) < 1e-9
    nothing = principal_vectors_by_squaring(torch.zeros(2, 3, 3, dtype=torch.float64))
    assert nothing.norm(dim=-1).tolist() == [1.0, 1.0]


class Counted(list[Tensor]):
    """Weights that say how often they were made."""

    made = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        self.made += 1
        return super().__getitem__(index)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return (self[index] for index in range(len(self)))


@pytest.mark.parametrize("layers", [1, 3])
def test_weights_are_made_once_a_layer(layers: int) -> None:
    """A sequence makes them anew whenever it is asked: one layer's cost as much as two before this was asked of it."""
    weights = Counted([torch.randn(2, 5, 4) for _ in range(layers)])
    start_LED = initial_prototypes(range(layers), range(2), 5, seed=0)
    found_LED, _ = power_iteration(weights, start_LED, steps=4)
    assert weights.made == layers
    prototype_gradient(weights, found_LED, torch.randn(layers, 2, 5), steps=3)
    assert weights.made == 2 * layers

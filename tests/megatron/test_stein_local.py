"""The Stein transform on one rank: against float64 loops, switched off, at its edges, and in a stock loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megatron.core.distributed import finalize_model_grads

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.model.moe_layer import moe_layers
from megatron_vp2o.megatron.platform import world
from megatron_vp2o.megatron.stein import gradient_hook
from megatron_vp2o.megatron.stein.gradient_hook import SteinHook, install
from megatron_vp2o.rl.objectives import next_token
from tests.megatron import stein_job
from tests.megatron.stein_job import ROWS, VOCAB, global_batch, small_config


@contextmanager
def learner(steps: int = 20, **layout: Any) -> Iterator[tuple[MegatronPolicy, SteinHook | None]]:
    """A policy on one rank, with the hook if the configuration says so."""
    config = small_config(**layout)
    groups = world.start(config.parallel, config.seed)
    try:
        policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=steps)
        stein = config.algorithm.stein
        on = stein.enabled or stein.monitor
        yield policy, SteinHook(policy.ddp, stein, groups, optimizer=policy.optimizer) if on else None
    finally:
        world.stop()


def backward(policy: MegatronPolicy, step: int = 0, rows: int = ROWS, micro: int = 3) -> dict[str, float]:
    return policy.forward_backward(global_batch(step, range(rows)), next_token, micro_batch_size=micro)


def gradients(hook: SteinHook) -> dict[tuple[int, str, int], torch.Tensor]:
    """(layer, part, expert) -> gradient, float64."""
    return {
        (index, part, e): row.of(hook.gradients.of(row.parameter)).double().clone()
        for index, weights in enumerate(hook.weights)
        for part, rows in weights.parts.items()
        for e, row in enumerate(rows)
    }


@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_the_field_is_that_of_loops_in_float64(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything from the definitions: kernel and masks by loops, repulsion by autograd through the power steps."""
    settings = {"neighbours": 2, "eta": 0.3, "tau": 0.7, "power_iterations": 3, "repulsion_scale": scale}
    monkeypatch.setattr(gradient_hook, "SETTLED_ANGLE", 1e-6)  # as near as float32 comes
    with learner(stein=settings) as (policy, hook):
        assert hook is not None
        backward(policy)
        before = gradients(hook)
        counts = [layer.statistics._totals.counts_EE.clone() for layer in hook.layers]  # type: ignore[union-attr]
        tokens = [layer.statistics._totals.sums[0].item() for layer in hook.layers]  # type: ignore[union-attr]
        assert tokens[0] == global_batch(0, range(ROWS)).length_N.sum()  # padding does not count
        metrics = hook.transform()
        after = gradients(hook)
        assert hook.state is not None and hook.state.residual_LE.max() < 1e-5
        tau = 0.7 / torch.log(torch.tensor(8.0)).item()
        ratios = []
        for index, weights in enumerate(hook.weights):
            stored = weights.output_projection().double()
            v = torch.linalg.svd(stored).U[:, :, 0]
            assert ((v * hook.state.prototypes_LED[index].double()).sum(-1).abs() - 1).abs().max() < 1e-5
            score = counts[index] / tokens[index]
            attraction_square = repulsion_square = 0.0
            for i in range(8):
                if score[i, i] == 0:
                    assert all(not after[index, part, i].any() for part in weights.parts)
                    continue
                others = [j for j in range(8) if j != i and score[j, j] > 0]
                near = sorted((j for j in others if score[i, j] > 0), key=lambda j: (-score[i, j].item(), j))[:2]
                far = [j for j in others if j not in near]

                def kernel(j: int, i: int = i, v: torch.Tensor = v) -> float:
                    return float(torch.exp(((v[i] @ v[j]) ** 2 - 1) / tau)) if i != j else 1.0

                total = sum(kernel(j) for j in [i, *near])
                expected: dict[str, Any] = {
                    part: sum(kernel(j) / total * before[index, part, j] for j in [i, *near]) for part in weights.parts
                }
                leaf = stored[i].clone().requires_grad_()
                moved = v[i]
                for _ in range(3):
                    moved = leaf @ (leaf.t() @ moved)
                    moved = moved / moved.norm()
                away = sum(kernel(j) for j in far)
                repelled: Any = sum(kernel(j) / away * torch.exp(((moved @ v[j]) ** 2 - 1) / tau) for j in far)
                repelled.backward()
                assert leaf.grad is not None
                own_square = sum(float(value.square().sum()) for value in expected.values())
                size = own_square**0.5 / leaf.grad.norm() if scale == "relative" else 1.0
                added = 0.3 * size * leaf.grad.flatten()
                attraction_square += own_square
                repulsion_square += float(added.square().sum())
                expected["linear_fc2.weight"] = expected["linear_fc2.weight"] + added
                for part, value in expected.items():
                    error = (after[index, part, i] - value).norm() / value.norm()
                    assert error < 2e-4, (index, part, i, error)  # float32 gradients, prototypes converged to 1e-5
            ratios.append((repulsion_square / attraction_square) ** 0.5)
        assert metrics["stein/repulsion_ratio"] == pytest.approx(sum(ratios) / 2, rel=1e-3)


@pytest.mark.parametrize(
    "layout",
    [
        {"stein": {"enabled": False}},
        {"stein": {"attraction": False, "eta": 0.0}},
        {"stein": {"enabled": False}, "specialization": {"orthogonality_coef": 0.0, "variance_coef": 0.0}},
    ],
)
def test_off_is_bit_identical(layout: dict[str, Any]) -> None:
    def weights(layout: dict[str, Any]) -> tuple[list[torch.Tensor], list[float]]:
        losses = []
        with learner(**layout) as (policy, hook):
            for step in range(20):
                losses.append(backward(policy, step)["loss"])
                if hook is not None:
                    hook.transform()
                policy.optimizer_step()
            return [parameter.detach().clone() for parameter in policy.model.parameters()], losses

    plain, losses = weights({"stein": {"enabled": False}})
    other, other_losses = weights(layout)
    assert losses == other_losses and losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    watched, watched_losses = weights({"stein": {"enabled": False, "monitor": True}})
    assert watched_losses == losses and all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    moved, _ = weights({"stein": {}})
    assert not all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


def test_recomputation_counts_once() -> None:
    seen = []
    for recompute in (False, True):
        with learner(model={"recompute": recompute}, specialization={"orthogonality_coef": 0.1}) as (policy, hook):
            assert hook is not None
            backward(policy)
            metrics = hook.transform()
            seen.append((metrics, gradients(hook)))
    (plain, ours), (again, theirs) = seen
    assert plain == pytest.approx(again)
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-7) for key in ours)


def test_micro_batches_do_not_matter() -> None:
    seen = []
    for micro in (2, 16):
        with learner(specialization={"orthogonality_coef": 0.1, "orthogonality": "cosine"}) as (policy, hook):
            assert hook is not None
            backward(policy, micro=micro)
            hook.transform()
            seen.append(gradients(hook))
    assert all(torch.allclose(seen[0][key], seen[1][key], atol=1e-6) for key in seen[0])


def test_scoring_and_evaluation_count_nothing() -> None:
    with learner() as (policy, hook):
        assert hook is not None
        policy.log_probs(global_batch(0, range(ROWS)), 4)
        assert all(layer.statistics is not None and layer.statistics._totals is None for layer in hook.layers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step_and_poisons_nothing(value: float) -> None:
    with learner() as (policy, hook):
        assert hook is not None
        backward(policy)
        hook.transform()
        assert not policy.optimizer_step().skipped
        before = [parameter.detach().clone() for parameter in policy.model.parameters()]
        backward(policy, 1)
        hook.gradients.of(hook.weights[0].parts["linear_fc1.weight"][3].parameter)[0, 0] = value
        hook.transform()
        assert policy.optimizer_step().skipped
        assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
        assert hook.state is not None and hook.state.coactivation_LEE is not None
        assert torch.isfinite(hook.state.coactivation_LEE).all() and torch.isfinite(hook.state.prototypes_LED).all()
        backward(policy, 2)
        assert all(value == value for value in hook.transform().values())
        assert not policy.optimizer_step().skipped


EDGES: dict[str, dict[str, Any]] = {
    "every expert for every token": {"model": {"moe_router_topk": 8}},
    "one expert a token": {"model": {"moe_router_topk": 1, "moe_router_pre_softmax": True}},
    "one expert": {"model": {"num_moe_experts": 1, "moe_router_topk": 1, "moe_router_pre_softmax": True}},
    "a shared expert": {"model": {"moe_shared_expert_intermediate_size": 16}},
    "a threshold": {"stein": {"neighbours": None, "coactivation_threshold": 0.2}},
    "bfloat16": {"model_precision": "bf16"},
}


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge: str) -> None:
    layout = dict(EDGES[edge])
    if layout.pop("model_precision", None):
        from megatron_vp2o.config.schema import Precision

        layout["model"] = {"precision": Precision.bf16}
    with learner(**layout) as (policy, hook):
        assert hook is not None
        for step in range(3):
            backward(policy, step)
            metrics = hook.transform()
            assert all(value == value for value in metrics.values()), metrics
            assert not policy.optimizer_step().skipped


def test_a_batch_without_tokens_for_most_experts_and_a_zero_projection() -> None:
    with learner() as (policy, hook):
        assert hook is not None
        with torch.no_grad():
            hook.weights[0].parts["linear_fc2.weight"][0].parameter.zero_()
        for rows, step in ((1, 0), (16, 1), (2, 2)):  # batch sizes change
            backward(policy, step, rows)
            metrics = hook.transform()
            assert all(value == value for value in metrics.values())
            assert not policy.optimizer_step().skipped


def test_install_in_a_stock_loop_and_remove() -> None:
    """Behind finalize_model_grads, as the explicit call does it; removed, the loop is what it was."""
    with learner(stein={"enabled": False}) as (policy, _):
        settings = small_config().algorithm.stein
        installed = install(policy.ddp, policy.optimizer, settings)
        with pytest.raises(ConfigError, match="installed in this model already"):
            install(policy.ddp, policy.optimizer, settings)
        backward(policy)
        ours = gradients(installed.hook)
        assert installed.metrics["stein/self_weight"] < 1
        installed.remove()
        assert policy.model.config.finalize_model_grads_func is finalize_model_grads
        assert all(layer.statistics is None for layer in moe_layers(policy.ddp))
        backward(policy)
        plain = gradients(installed.hook)
    with learner() as (policy, hook):
        assert hook is not None
        backward(policy)
        assert all(torch.equal(value, plain[key]) for key, value in gradients(hook).items())
        hook.transform()
        assert all(torch.equal(value, ours[key]) for key, value in gradients(hook).items())


def test_specialisation_lowers_what_it_penalises() -> None:
    def last(**specialization: Any) -> dict[str, float]:
        with learner(specialization=specialization, stein={"attraction": False, "eta": 0.0}) as (policy, hook):
            assert hook is not None
            for _ in range(15):
                backward(policy)
                metrics = hook.transform()
                policy.optimizer_step()
            return metrics

    plain = last()
    assert (
        last(orthogonality_coef=1.0, orthogonality="cosine")["moe/output_overlap"] < 0.7 * plain["moe/output_overlap"]
    )
    spread = last(variance_coef=10.0)
    assert spread["moe/variance_loss"] < 0 and spread["moe/router_entropy"] < plain["moe/router_entropy"]


def test_the_job_is_deterministic() -> None:
    first, second = (stein_job.run([{}], 2)[0] for _ in range(2))
    assert first == second


def test_a_repulsion_that_drowns_the_gradients_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    for scale, eta, told in (("absolute", 1e4, 1), ("absolute", 1e-6, 0), ("relative", 50.0, 0)):
        caplog.clear()
        with learner(stein={"repulsion_scale": scale, "eta": eta, "neighbours": 1}) as (policy, hook):
            assert hook is not None
            for _ in range(2):
                backward(policy)
                ratio = hook.transform()["stein/repulsion_ratio"]
            messages = [record.message for record in caplog.records if "repulsion between experts" in record.message]
            assert len(messages) == told, (scale, eta, ratio)
            assert not told or ("repulsion_scale=relative" in messages[0] and "eta=10000" in messages[0])

"""The Stein transform on one rank: against float64 loops, switched off, at its edges, and in a stock loop."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megatron.core.distributed import finalize_model_grads

from megatron_vp2o.config.schema import SteinConfig
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.model.moe_layer import moe_layers
from megatron_vp2o.megatron.platform import world
from megatron_vp2o.megatron.stein import prototypes
from megatron_vp2o.megatron.stein.install import install
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes
from megatron_vp2o.megatron.stein.transform import SteinTransform
from megatron_vp2o.rl.objectives import next_token
from tests.megatron import stein_job
from tests.megatron.stein_job import ROWS, VOCAB, global_batch, small_config


@contextmanager
def learner(steps: int = 20, **layout: Any) -> Iterator[tuple[MegatronPolicy, SteinTransform | None]]:
    """A policy on one rank, with the transform if the configuration says so. One thread, as ranks have: bits are compared."""
    torch.set_num_threads(1)
    config = small_config(**layout)
    groups = world.start(config.parallel, config.seed)
    try:
        policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=steps)
        stein = config.algorithm.stein
        on = stein.enabled or stein.monitor
        yield (
            policy,
            SteinTransform(ExpertPrototypes(policy.ddp, stein, groups), optimizer=policy.optimizer) if on else None,
        )
    finally:
        world.stop()


def backward(policy: MegatronPolicy, step: int = 0, rows: int = ROWS, micro: int = 3) -> dict[str, float]:
    return policy.forward_backward(global_batch(step, range(rows)), next_token, micro_batch_size=micro)


def gradients(transform: SteinTransform) -> dict[tuple[int, str, int], torch.Tensor]:
    """(layer, part, expert) -> gradient, float64."""
    return {
        (index, part, e): row.of(transform.gradients.of(row.parameter)).double().clone()
        for index, weights in enumerate(transform.prototypes.weights)
        for part, rows in weights.parts.items()
        for e, row in enumerate(rows)
    }


def assert_same(
    found: dict[tuple[int, str, int], torch.Tensor], expected: dict[tuple[int, str, int], torch.Tensor]
) -> None:
    """To the bit; a failure says where and by how much."""
    assert found.keys() == expected.keys()
    assert {key: float((v - expected[key]).abs().max()) for key, v in found.items() if not v.equal(expected[key])} == {}


@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_the_field_is_that_of_loops_in_float64(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything from the definitions: kernel and masks by loops, repulsion by autograd through the power steps."""
    settings = {"neighbours": 2, "eta": 0.3, "tau": 0.7, "power_iterations": 3, "repulsion_scale": scale}
    monkeypatch.setattr(prototypes, "SETTLED_ANGLE", 1e-6)  # as near as float32 comes
    with learner(stein=settings) as (policy, transform):
        assert transform is not None
        backward(policy)
        before = gradients(transform)
        counts = [layer.statistics._totals.counts_EE.clone() for layer in transform.prototypes.layers]  # type: ignore[union-attr]
        tokens = [layer.statistics._totals.sums[0].item() for layer in transform.prototypes.layers]  # type: ignore[union-attr]
        assert tokens[0] == global_batch(0, range(ROWS)).length_N.sum()  # padding does not count
        metrics = transform.apply()
        after = gradients(transform)
        assert transform.prototypes.state is not None and transform.prototypes.state.residual_LE.max() < 1e-5
        tau = 0.7 / torch.log(torch.tensor(8.0)).item()
        ratios = []
        for index, weights in enumerate(transform.prototypes.weights):
            stored = weights.output_projection().double()
            v = torch.linalg.svd(stored).U[:, :, 0]
            assert ((v * transform.prototypes.values_LED[index].double()).sum(-1).abs() - 1).abs().max() < 1e-5
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
        with learner(**layout) as (policy, transform):
            for step in range(20):
                losses.append(backward(policy, step)["loss"])
                if transform is not None:
                    transform.apply()
                policy.optimizer_step(1)
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
        with learner(model={"recompute": recompute}, specialization={"orthogonality_coef": 0.1}) as (policy, transform):
            assert transform is not None
            backward(policy)
            metrics = transform.apply()
            seen.append((metrics, gradients(transform)))
    (plain, ours), (again, theirs) = seen
    assert plain == pytest.approx(again)
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-7) for key in ours)


def test_micro_batches_do_not_matter() -> None:
    seen = []
    for micro in (2, 16):
        with learner(specialization={"orthogonality_coef": 0.1, "orthogonality": "cosine"}) as (policy, transform):
            assert transform is not None
            backward(policy, micro=micro)
            transform.apply()
            seen.append(gradients(transform))
    assert all(torch.allclose(seen[0][key], seen[1][key], atol=1e-6) for key in seen[0])


def test_scoring_and_evaluation_count_nothing() -> None:
    with learner() as (policy, transform):
        assert transform is not None
        policy.log_probs(global_batch(0, range(ROWS)), 4)
        assert all(
            layer.statistics is not None and layer.statistics._totals is None for layer in transform.prototypes.layers
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step_and_poisons_nothing(value: float) -> None:
    with learner() as (policy, transform):
        assert transform is not None
        backward(policy)
        transform.apply()
        assert not policy.optimizer_step(1).skipped
        before = [parameter.detach().clone() for parameter in policy.model.parameters()]
        backward(policy, 1)
        transform.gradients.of(transform.prototypes.weights[0].parts["linear_fc1.weight"][3].parameter)[0, 0] = value
        transform.apply()
        assert policy.optimizer_step(1).skipped
        assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
        assert transform.prototypes.state is not None and transform.coactivation_LEE is not None
        assert (
            torch.isfinite(transform.coactivation_LEE).all() and torch.isfinite(transform.prototypes.values_LED).all()
        )
        backward(policy, 2)
        assert all(value == value for value in transform.apply().values())
        assert not policy.optimizer_step(1).skipped


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
    with learner(**layout) as (policy, transform):
        assert transform is not None
        for step in range(3):
            backward(policy, step)
            metrics = transform.apply()
            assert all(value == value for value in metrics.values()), metrics
            assert not policy.optimizer_step(1).skipped


def test_a_batch_without_tokens_for_most_experts_and_a_zero_projection() -> None:
    with learner() as (policy, transform):
        assert transform is not None
        with torch.no_grad():
            transform.prototypes.weights[0].parts["linear_fc2.weight"][0].parameter.zero_()
        for rows, step in ((1, 0), (16, 1), (2, 2)):  # batch sizes change
            backward(policy, step, rows)
            metrics = transform.apply()
            assert all(value == value for value in metrics.values())
            assert not policy.optimizer_step(1).skipped


def test_install_in_a_stock_loop_and_remove() -> None:
    """Behind finalize_model_grads, as the explicit call does it; removed, the loop is what it was."""
    with learner(stein={"enabled": False}) as (policy, _):
        settings = small_config().algorithm.stein
        installed = install(policy.ddp, policy.optimizer, settings)
        with pytest.raises(ConfigError, match="installed in this model already"):
            install(policy.ddp, policy.optimizer, settings)
        backward(policy)
        ours = gradients(installed.transform)
        assert installed.metrics["stein/self_weight"] < 1
        installed.remove()
        assert policy.model.config.finalize_model_grads_func is finalize_model_grads
        assert all(layer.statistics is None for layer in moe_layers(policy.ddp))
        backward(policy)
        plain = gradients(installed.transform)
    with learner() as (policy, transform):
        assert transform is not None
        backward(policy)
        assert_same(gradients(transform), plain)
        transform.apply()
        assert_same(gradients(transform), ours)


def test_a_loop_that_overwrites_the_function_gets_it_back() -> None:
    """As slime's loop does for every rollout; without `ensure` no step would be transformed, and nothing would say so."""
    with learner(stein={"enabled": False}) as (policy, _):
        settings = small_config().algorithm.stein
        installed = install(policy.ddp, policy.optimizer, settings)
        config = policy.model.config
        for step in range(3):
            config.finalize_model_grads_func = finalize_model_grads
            assert not installed.present and installed.ensure() and not installed.ensure()
            backward(policy, step)
            assert not policy.optimizer_step(1).skipped
            assert installed.transform.steps == step + 1  # one state from rollout to rollout
        average_LEE = installed.transform.coactivation_LEE
        ours = config.finalize_model_grads_func

        @functools.wraps(ours)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs)

        for outer in (wrapped, functools.partial(ours)):
            config.finalize_model_grads_func = outer
            assert installed.present and not installed.ensure(), "it would run twice a step"
            with pytest.raises(ConfigError, match="wrapped since install"):
                installed.remove()
        config.finalize_model_grads_func = ours
        installed.remove()
        assert config.finalize_model_grads_func is finalize_model_grads
        assert installed.ensure() and installed.transform.coactivation_LEE is average_LEE
        installed.remove()
        config.finalize_model_grads_func = None
        with pytest.raises(ConfigError, match="finalize_model_grads_func is None"):
            installed.ensure()


def test_a_monitor_in_a_stock_loop_changes_nothing() -> None:
    with learner(stein={"enabled": False}) as (policy, _):
        backward(policy)
        installed = install(policy.ddp, policy.optimizer, SteinConfig(monitor=True, neighbours=2))
        backward(policy)
        seen = gradients(installed.transform)
        assert 0 < installed.metrics["stein/self_weight"] < 1 and installed.metrics["moe/router_entropy"] > 0
        installed.remove()
        backward(policy)
        assert_same(gradients(installed.transform), seen)


def test_plain_state_goes_on_as_if_nothing_had_happened() -> None:
    """`state_dict` for loops with checkpoints of their own: the next step's gradients are those of the run that went on."""
    with learner(stein={"neighbours": 2, "prototype_interval": 2, "coactivation_ema": 0.9}) as (policy, transform):
        assert transform is not None
        for step in range(3):
            backward(policy, step)
            transform.apply()
            policy.optimizer_step(1)
        state = copy.deepcopy(transform.state_dict())
        backward(policy, 3)
        transform.apply()
        expected = gradients(transform)

        def again(state: dict[str, Any] | None) -> dict[tuple[int, str, int], torch.Tensor]:
            other = SteinTransform(ExpertPrototypes(policy.ddp, transform.settings, policy.groups))
            if state is not None:
                other.load_state_dict(state)
            backward(policy, 3)
            other.apply()
            return gradients(other)

        resumed, fresh = again(state), again(None)
        assert all(torch.equal(value, resumed[key]) for key, value in expected.items())
        assert any(not torch.equal(value, fresh[key]) for key, value in expected.items()), "the state has no effect"
        smaller = {**state, "layers": {n: {k: v[:4] for k, v in t.items()} for n, t in state["layers"].items()}}
        others = {**state, "layers": {n + 7: t for n, t in state["layers"].items()}}
        for wrong, words in ((smaller, "shape"), (others, "pipeline stage has")):
            with pytest.raises(ConfigError, match=words):
                transform.load_state_dict(wrong)


def test_specialisation_lowers_what_it_penalises() -> None:
    def last(**specialization: Any) -> dict[str, float]:
        with learner(specialization=specialization, stein={"attraction": False, "eta": 0.0}) as (policy, transform):
            assert transform is not None
            for _ in range(15):
                backward(policy)
                metrics = transform.apply()
                policy.optimizer_step(1)
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
        with learner(stein={"repulsion_scale": scale, "eta": eta, "neighbours": 1}) as (policy, transform):
            assert transform is not None
            for _ in range(2):
                backward(policy)
                ratio = transform.apply()["stein/repulsion_ratio"]
            messages = [record.message for record in caplog.records if "repulsion between experts" in record.message]
            assert len(messages) == told, (scale, eta, ratio)
            assert not told or ("repulsion_scale=relative" in messages[0] and "eta=10000" in messages[0])

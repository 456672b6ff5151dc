"""The orthogonality loss relative to its first value: when that is found, what is applied then, and what becomes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vp2o.core.choices import Orthogonality
from megatron_vp2o.core.specialization import orthogonality_loss
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.plugins.hook import plug_in
from megatron_vp2o.plugins.settings import read_settings
from tests.megatron.stein_job import ROWS, global_batch
from tests.megatron.test_stein_local import backward, learner

MONITOR = {"enabled": False, "monitor": True}
RELATIVE = {"orthogonality_coef": 0.3, "orthogonality_scale": "relative"}


def gradients(policy: MegatronPolicy) -> list[torch.Tensor]:
    return [parameter.main_grad.clone() for parameter in policy.model.parameters()]


def two_passes(specialization: dict[str, Any]) -> tuple[list[list[torch.Tensor]], float | None]:
    """Gradients of the same batch at the same weights, twice; and the first value."""
    with learner(stein=MONITOR, specialization=specialization) as (policy, _):
        found = []
        for _ in range(2):
            backward(policy)
            found.append(gradients(policy))
        return found, None if policy.orthogonality is None else policy.orthogonality.first


@pytest.mark.parametrize("kind", ["projection", "cosine"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_first_pass_measures_and_the_second_applies_the_weight(kind: str, fraction: float) -> None:
    chosen = {"orthogonality": kind, "orthogonality_token_fraction": fraction}
    (without, _), _ = two_passes({})
    (first_pass, second_pass), first = two_passes({**RELATIVE, **chosen})
    assert first is not None and first > 0
    (absolute, _), nothing = two_passes({"orthogonality_coef": 0.3 / first, **chosen})
    assert nothing is None
    assert all(torch.equal(a, b) for a, b in zip(first_pass, without, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(second_pass, without, strict=True))
    # the weight has passed through float32 in both
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(second_pass, absolute, strict=True))


def test_the_first_value_is_the_mean_over_tokens_and_layers() -> None:
    """Against the loss of the experts' outputs, one by one: each expert of each layer on the layer's own input."""
    with learner(stein=MONITOR, specialization=RELATIVE) as (policy, _):
        inputs: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().clone()))
            for layer in policy._layers
        ]
        batch = global_batch(0, range(ROWS))
        backward(policy, micro=ROWS)
        for hook in hooks:
            hook.remove()
        # micro-batches hold their longest row first
        length_N = batch.length_N.sort(descending=True).values
        valid_T = (torch.arange(batch.tokens_NS.shape[1])[:, None] < length_N).flatten()
        means = []
        for layer, given in zip(policy._layers, inputs, strict=True):
            rows_TD = given.flatten(0, 1)
            with torch.no_grad():
                map_TE = layer.router(given)[1]
                outputs_TED = torch.stack(
                    [
                        layer.experts(rows_TD, torch.tensor([len(rows_TD) if e == own else 0 for e in range(8)]), ones)[
                            0
                        ]
                        for own, ones in ((e, torch.ones(len(rows_TD))) for e in range(8))
                    ],
                    dim=1,
                )
            chosen_TK = map_TE.nonzero()[:, 1].view(len(rows_TD), -1)
            outputs_TKD = outputs_TED.gather(1, chosen_TK[..., None].expand(-1, -1, rows_TD.shape[1]))
            total, tokens = orthogonality_loss(outputs_TKD, kind=Orthogonality.projection, valid_T=valid_T)
            means.append(float(total / tokens))
        assert policy.orthogonality is not None
        assert policy.orthogonality.first == pytest.approx(sum(means) / len(means), rel=1e-4)


def test_it_is_the_metric_of_the_first_step_and_stays() -> None:
    with learner(stein=MONITOR, specialization=RELATIVE) as (policy, transform):
        assert policy.orthogonality is not None and transform is not None
        assert policy.orthogonality.value is None
        metrics = []
        for step in range(3):
            backward(policy, step)
            metrics.append(transform.apply()["moe/orthogonality_loss"])
            assert not policy.optimizer_step(1).skipped
            assert policy.orthogonality.first == pytest.approx(metrics[0], rel=1e-6)
            assert policy.orthogonality.value == pytest.approx(0.3 / metrics[0], rel=1e-6)
        assert metrics[1] != metrics[0]


def test_a_step_that_says_nothing_leaves_it_open() -> None:
    """No token; or one expert a token, so that there is no pair."""
    with learner(specialization=RELATIVE) as (policy, _):
        assert policy.orthogonality is not None
        backward(policy, rows=0)
        assert policy.orthogonality.value is None
        backward(policy)
        assert policy.orthogonality.value is not None
    alone = {"moe_router_topk": 1, "moe_router_pre_softmax": True}
    with learner(model=alone, stein=MONITOR, specialization=RELATIVE) as (policy, _):
        assert policy.orthogonality is not None
        for step in range(2):
            backward(policy, step)
            assert policy.orthogonality.value is None
        measured = gradients(policy)
    with learner(model=alone, stein=MONITOR) as (policy, _):
        backward(policy, 1)
        assert all(torch.equal(a, b) for a, b in zip(measured, gradients(policy), strict=True))


def test_scoring_measures_nothing_and_what_is_taken_back_is_forgotten() -> None:
    with learner(specialization=RELATIVE) as (policy, _):
        assert policy.orthogonality is not None
        policy.log_probs(global_batch(0, range(ROWS)), 4)
        policy.orthogonality.settle()
        assert policy.orthogonality.first is None
        saved = policy.save_state()
        backward(policy)
        first = policy.orthogonality.first
        assert first is not None
        policy.restore_state(saved)
        assert policy.orthogonality.first is None
        backward(policy)
        assert policy.orthogonality.first == first


def test_a_plug_in_measures_it_in_the_hosts_first_step_and_keeps_it() -> None:
    settings = read_settings({"stein": {"monitor": True}, "specialization": RELATIVE}, "vp2o")
    (without, _), _ = two_passes({})
    _, first = two_passes(RELATIVE)
    with learner(stein={"enabled": False}) as (policy, _):
        plugged = plug_in(policy.ddp, policy.optimizer, settings, "a host")
        assert plugged is not None and plugged.installed is not None
        backward(policy)
        assert all(torch.equal(a, b) for a, b in zip(gradients(policy), without, strict=True))
        state = plugged.installed.state_dict()
        assert state["orthogonality_first"] == pytest.approx(first, rel=1e-6)
        backward(policy)
        applied = gradients(policy)
        assert not all(torch.equal(a, b) for a, b in zip(applied, without, strict=True))
    with learner(stein={"enabled": False}) as (policy, _):
        plugged = plug_in(policy.ddp, policy.optimizer, settings, "a host")
        assert plugged is not None and plugged.installed is not None
        plugged.installed.load_state_dict(state)
        backward(policy)  # the loss from the first step on
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(gradients(policy), applied, strict=True))

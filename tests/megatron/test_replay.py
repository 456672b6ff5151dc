"""Router replay in one process: against routers written down here, and what went through the real ones.

Other layouts: test_uneven_ranks.py. Whole runs: tests/test_settings.py, test_resume.py, rollout/test_store.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron.core.transformer.moe.router_replay import RouterReplay  # noqa: E402

from megatron_vp2o.config.model import RouterScore  # noqa: E402
from megatron_vp2o.config.schema import ModelConfig, Precision, TrainConfig  # noqa: E402
from megatron_vp2o.errors import RolloutError  # noqa: E402
from megatron_vp2o.megatron.actor.generation import MegatronEngine  # noqa: E402
from megatron_vp2o.megatron.control import trust_region  # noqa: E402
from megatron_vp2o.megatron.control.contexts import ContextSampler  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.model.moe_layer import moe_layers  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.rl.objectives import next_token  # noqa: E402
from megatron_vp2o.rl.types import Rollouts, SamplingParams, TrainBatch  # noqa: E402
from tests.megatron.replay_watch import ReplayWatch  # noqa: E402

pytestmark = pytest.mark.smoke
VOCAB, EXPERTS, TOPK, NONE = 24, 8, 3, 255
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [5, 6, 7, 8]]


@contextmanager
def parts(**model: Any) -> Iterator[tuple[MegatronPolicy, MegatronEngine]]:
    """A learner, and an engine that records routes with the learner's weights."""
    torch.set_num_threads(1)
    settings = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK,
        "moe_ffn_hidden_size": 16,
        "init_method_std": 0.2,
    }
    config = TrainConfig(model=ModelConfig(**{**settings, **model}))
    groups = world.start(config.parallel, config.seed)
    try:
        policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=10)
        engine = MegatronEngine(config, policy, eos_ids=[1], pad_id=0)
        engine.refresh(0)
        engine.record_routes()
        yield policy, engine
    finally:
        world.stop()


def generate(engine: MegatronEngine, seed: int = 5, size: int = 4) -> Rollouts:
    rollouts = engine.generate(PROMPTS, range(4), SamplingParams(1.0, 1.0, 12, seed=seed), group_size=size)
    assert rollouts.routes_NSLK is not None
    return rollouts


def batch_of(rollouts: Rollouts, routes: bool = True) -> TrainBatch:
    return TrainBatch(
        rollouts.tokens_NS,
        rollouts.total_len_N,
        rollouts.response_mask_NS(),
        routes_NSLK=rollouts.routes_NSLK if routes else None,
    )


@torch.no_grad()
def disturb(policy: MegatronPolicy, by: float = 0.3) -> None:
    """Other routers, which choose other experts."""
    generator = torch.Generator().manual_seed(1)
    for layer in moe_layers(policy.ddp):
        weight = layer.router.weight
        weight += by * torch.randn(weight.shape, generator=generator).to(weight)


def reference(logits_TE: Tensor, routes: list[list[int]], score: RouterScore, pre: bool, bias: Tensor | None) -> Tensor:
    """Dense gates, token by token: of the replayed experts, or of the likeliest ones where there is no route."""
    rows = []
    for logits_E, route in zip(logits_TE, routes, strict=True):
        scores_E = logits_E.sigmoid() if score is RouterScore.sigmoid else logits_E.softmax(0)
        ranked_E = scores_E.detach() if bias is None else scores_E.detach() + bias
        chosen = route if route[0] != NONE else sorted(range(EXPERTS), key=lambda e: -ranked_E[e].item())[:TOPK]
        row = torch.zeros(EXPERTS, dtype=logits_E.dtype)
        if score is RouterScore.sigmoid or not pre:
            total = sum(scores_E[e] for e in chosen)
            row = row.index_put((torch.tensor(chosen),), torch.stack([scores_E[e] / total for e in chosen]))
        else:
            row = row.index_put((torch.tensor(chosen),), scores_E[torch.tensor(chosen)])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("score", "pre", "biased"),
    [("softmax", False, False), ("softmax", True, False), ("sigmoid", False, False), ("sigmoid", False, True)],
)
def test_gates_and_their_gradients_are_those_of_the_replayed_experts(score: str, pre: bool, biased: bool) -> None:
    kind = RouterScore(score)
    with parts(
        moe_router_score_function=kind,
        moe_router_pre_softmax=pre,
        moe_router_enable_expert_bias=biased,
        moe_aux_loss_coeff=0.0,
    ) as (policy, engine):
        router: Any = moe_layers(policy.ddp)[1].router
        if biased:
            router.expert_bias.copy_(torch.linspace(-0.5, 0.5, EXPERTS))
        random = Random(score)
        routes = [[NONE] * TOPK if random.random() < 0.3 else random.sample(range(EXPERTS), TOPK) for _ in range(5 * 4)]
        batch = batch_of(generate(engine)).rows(torch.arange(4))
        batch.tokens_NS = batch.tokens_NS[:, :5]
        packed = torch.tensor(routes, dtype=torch.uint8).view(5, 4, 1, TOPK).transpose(0, 1)
        batch.routes_NSLK = torch.cat([torch.full_like(packed, NONE), packed], dim=2)
        replay = policy._replay_of(batch)
        assert replay is not None
        replay.before_forward(batch)
        logits_SNE = torch.randn(5, 4, EXPERTS, generator=torch.Generator().manual_seed(3), requires_grad=True)
        probs_TE, map_TE = router.routing(logits_SNE)
        weights_TE = torch.randn(20, EXPERTS, generator=torch.Generator().manual_seed(4))
        (found,) = torch.autograd.grad((probs_TE * weights_TE).sum(), logits_SNE)
        again = logits_SNE.detach().double().requires_grad_()
        bias = router.expert_bias.double() if biased else None
        expected_TE = reference(again.flatten(0, 1), routes, kind, pre, bias)
        (wanted,) = torch.autograd.grad((expected_TE * weights_TE).sum(), again)
        torch.testing.assert_close(probs_TE.double(), expected_TE, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
        assert torch.equal(map_TE, expected_TE > 0) and found.abs().max() > 1e-3
        for route, row in zip(routes, map_TE, strict=True):
            assert route[0] == NONE or row.nonzero().flatten().tolist() == sorted(route)


@pytest.mark.parametrize(("limit", "size", "seed"), [(1024, 4, 5), (3, 4, 6), (16, 9, 7)])
def test_an_engine_says_where_each_token_went(limit: int, size: int, seed: int) -> None:
    """Against Megatron's own forward pass over each sequence alone, without cache or padding."""
    with parts() as (policy, engine):
        engine.max_batch_size = limit
        rollouts = generate(engine, seed, size)
        maps: list[Tensor] = []
        layers = moe_layers(policy.ddp)
        hooks = [layer.router.register_forward_hook(lambda _, __, out: maps.append(out[1])) for layer in layers]
        policy.model.eval()
        routes_NSLK = rollouts.routes_NSLK
        assert routes_NSLK is not None and routes_NSLK.dtype == torch.uint8
        assert routes_NSLK.shape == (*rollouts.tokens_NS.shape, 2, TOPK)
        for n, total in enumerate(rollouts.total_len_N.tolist()):
            maps.clear()
            with torch.no_grad():
                policy.model(rollouts.tokens_NS[n, :total][None], torch.arange(total)[None], None)
            assert (routes_NSLK[n, total - 1 :] == NONE).all()
            for layer in range(2):
                for s in range(total - 1):
                    assert sorted(routes_NSLK[n, s, layer].tolist()) == maps[layer][s].nonzero().flatten().tolist()
        for hook in hooks:
            hook.remove()
        policy.model.train()
        # The trainer's own, of a teacher-forced pass: the same in float32.
        logprobs_NS, own_NSLK = engine.log_probs_and_routes(rollouts, 1.0)
        assert torch.equal(own_NSLK.sort(dim=-1).values, routes_NSLK.sort(dim=-1).values)
        torch.testing.assert_close(logprobs_NS, rollouts.model_logprobs_NS, atol=1e-5, rtol=0)
        with engine.at_learner_weights():
            plain = engine.generate(PROMPTS, range(4), SamplingParams(1.0, 1.0, 12, seed=seed), group_size=size)
        assert plain.routes_NSLK is None and torch.equal(plain.tokens_NS, rollouts.tokens_NS)
        assert len(engine.generate([], [], SamplingParams(1.0, 1.0, 4, seed=0)).routes_NSLK) == 0  # type: ignore[arg-type]


def gradients(policy: MegatronPolicy) -> list[Tensor]:
    return [parameter.main_grad.clone() for parameter in policy.model.parameters()]


def test_the_trainer_goes_where_the_engine_went() -> None:
    """Every token with a route, in every layer, pass and micro-batch, with routers that would have chosen others."""
    found = []
    for recompute in (False, True):
        with parts(recompute=recompute) as (policy, engine):
            rollouts = generate(engine)
            disturb(policy)
            layers = moe_layers(policy.ddp)
            layers[0].observe()
            watch = ReplayWatch(policy)
            metrics = policy.forward_backward(batch_of(rollouts), next_token, 3)
            watch.stop()
            tokens = int(rollouts.total_len_N.sum())
            passes = 2 * (1 + recompute)
            assert watch.wrong == 0 and watch.compared == passes * (tokens - 16) and watch.free == passes * 16
            assert metrics["replay/tokens"] == pytest.approx((tokens - 16) / tokens)
            assert 0 < metrics["replay/agreement_layer_min"] <= metrics["replay/agreement"] < 0.9
            assert layers[0].statistics is not None
            assert torch.equal(layers[0].statistics.take(policy.groups.device).counts_EE, watch.counts_EE)
            replayed = gradients(policy)
            assert all(float(layer.router.weight.main_grad.abs().max()) > 1e-4 for layer in layers)
            free = policy.forward_backward(batch_of(rollouts, routes=False), next_token, 3)
            assert "replay/tokens" not in free and free["loss"] != metrics["loss"]
            found.append((metrics["loss"], replayed, free["loss"], gradients(policy)))
    (loss, grads, free_loss, free_grads), (other, others, free_other, free_others) = found
    assert loss == other and free_loss == free_other
    assert all(torch.equal(a, b) for a, b in zip(grads + free_grads, others + free_others, strict=True))


def test_without_routes_nothing_is_changed() -> None:
    """And Megatron's own list of instances, by which others switch all routers of a process, does not have ours."""
    with parts() as (policy, engine):
        rollouts = generate(engine)
        policy.forward_backward(batch_of(rollouts, routes=False), next_token, 5)
        assert all(layer.router.router_replay is None and layer.replay is None for layer in moe_layers(policy.ddp))
        before = gradients(policy)
        policy.forward_backward(batch_of(rollouts), next_token, 5)
        assert RouterReplay.global_router_replay_instances == []
        policy.forward_backward(batch_of(rollouts, routes=False), next_token, 5)
        assert all(torch.equal(a, b) for a, b in zip(before, gradients(policy), strict=True))


@pytest.mark.parametrize("precision", list(Precision))
def test_replay_makes_engine_and_trainer_agree_better(precision: Precision) -> None:
    with parts(precision=precision, num_moe_experts=16, moe_router_topk=4) as (policy, engine):
        worst, mean = [], []
        for seed in range(3):
            rollouts = generate(engine, seed, 16)
            mask_NS = rollouts.response_mask_NS()
            differences = [
                (policy.log_probs(batch_of(rollouts, routes), 5) - rollouts.model_logprobs_NS)[mask_NS].abs()
                for routes in (True, False)
            ]
            worst.append([float(difference.max()) for difference in differences])
            mean.append([float(difference.mean()) for difference in differences])
        # Where float32 flips no expert, both differ from the engine by rounding alone, and either may differ by more.
        rounding = 2e-6 if precision is Precision.fp32 else 0.0
        assert all(with_it <= without + rounding for with_it, without in worst), worst
        assert all(with_it <= without + rounding / 10 for with_it, without in mean), mean
        if precision is Precision.bf16:  # rounding flips near-ties between decoding and training
            assert all(with_it < 0.8 * without for with_it, without in mean), mean


def test_the_trust_region_compares_gates_of_the_replayed_experts() -> None:
    with parts() as (policy, engine):
        rollouts = generate(engine)
        disturb(policy)
        layers = moe_layers(policy.ddp)
        sampler = ContextSampler(layers, 10**6, policy.share)
        policy.watcher = sampler
        policy.forward_backward(batch_of(rollouts), next_token, 3)
        contexts = int(rollouts.response_mask_NS().sum())
        differ = 0
        for index, layer in enumerate(layers):
            routes_CK = layer.context_routes()
            assert routes_CK is not None and len(routes_CK) == len(layer.contexts()) == contexts
            gates_CE = trust_region._gates(layer, layer.contexts(), {})
            assert (gates_CE > 0).nonzero()[:, 1].view(-1, TOPK).tolist() == routes_CK.sort(dim=1).values.tolist()
            assert sorted(routes_CK.tolist()) == sorted(_response_routes(rollouts, index))
            logits_CE = layer.contexts() @ layer.router.weight.T
            differ += int((logits_CE.topk(TOPK).indices.sort().values != routes_CK.sort().values).any(dim=1).sum())
        assert differ > contexts // 4
        sampler.drop()
        assert all(layer.context_routes() is None for layer in layers)
        policy.watcher = None


def _response_routes(rollouts: Rollouts, layer: int) -> list[list[int]]:
    """Routes of the positions from which response tokens were drawn."""
    assert rollouts.routes_NSLK is not None
    return [rollouts.routes_NSLK[n, s - 1, layer].tolist() for n, s in rollouts.response_mask_NS().nonzero().tolist()]


def test_routes_of_another_model_are_refused() -> None:
    with parts() as (policy, engine):
        batch = batch_of(generate(engine))
        assert batch.routes_NSLK is not None
        batch.routes_NSLK = batch.routes_NSLK[:, :, :1]
        with pytest.raises(
            RolloutError, match=r"routes of 1 layers with 3 experts a token, and this rank has 2 layers"
        ):
            policy.forward_backward(batch, next_token, 4)

"""Routes that come back with the samples of servers: checked, of the right layers, packed, and none where a token was never
routed."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vp2o.core.routes import FREE, unpack_routes
from megatron_vp2o.rollout.answers import Asked, BadAnswer, RoutesAsked, samples
from megatron_vp2o.rollout.contract import SAMPLING
from megatron_vp2o.rollout.served import ServedEngine
from tests.rollout.fake_server import encoded, routes_of
from tests.rollout.fakes import FakeHarness
from tests.rollout.test_pool import MANY

ROUTED = RoutesAsked(layers=(1, 2, 4), experts=11, topk=3)
"""A model of five layers, of which two have no experts."""


def answered(routes: Any, tokens: int = 4) -> dict[str, Any]:
    """An answer of one sample without an end-of-sequence."""
    choice = {
        "index": 0,
        "finish_reason": "length",
        "token_ids": [5] * tokens,
        "logprobs": {"content": [{"token_id": 5, "logprob": -1.0}] * tokens},
        "weight_versions": [{"version": "v", "start": 0, "end": tokens}],
        "routed_experts": routes,
    }
    return {"choices": [choice]}


@pytest.mark.parametrize("seed", range(20))
def test_what_is_no_route_of_these_tokens_is_refused(seed: int) -> None:
    rng = random.Random(seed)
    layers = tuple(sorted(rng.sample(range(8), rng.randint(1, 5))))
    asked = RoutesAsked(layers, rng.choice([4, 255, 256, 300]), rng.randint(1, 4))
    prompt, tokens = rng.randint(1, 9), rng.randint(1, 9)
    shape = prompt + tokens - 1, layers[-1] + 1 + rng.randint(0, 3), asked.topk
    dtype = np.uint8 if asked.experts <= 256 else np.uint16
    whole_TAK = np.random.default_rng(seed).integers(0, asked.experts, shape).astype(dtype)

    def parse(routes: Any) -> Any:
        return samples(answered(routes, tokens), 1, Asked([], 9, tokens, {"v": 0}, asked), prompt)[0].routes_TLK

    assert np.array_equal(parse(encoded(whole_TAK)), whole_TAK[:, list(layers)])
    spoilt = [
        None,
        "no base64!",
        encoded(whole_TAK)[
            : rng.randrange(len(encoded(whole_TAK)) // 4 - 1) * 4
        ],  # the last byte may be in the last four
        encoded(np.concatenate([whole_TAK, whole_TAK[:1]])),
        encoded(whole_TAK[:-1]),
        encoded(whole_TAK[:, : layers[-1]]),
        encoded(whole_TAK[:, :, :-1]),
        encoded(whole_TAK[0]),
        encoded(whole_TAK.astype(np.float32)),
        encoded(whole_TAK.astype(np.int64) - asked.experts),
        encoded(whole_TAK.astype(np.int64) + asked.experts),
    ]
    for routes in spoilt:
        with pytest.raises(BadAnswer, match="routes"):
            parse(routes)


def test_routes_that_nobody_asked_for_are_left_out() -> None:
    asked = Asked([], 9, 4, {"v": 0})
    assert samples(answered(encoded(np.zeros((4, 1, 1)))), 1, asked, 1)[0].routes_TLK is None


def test_rollouts_have_the_routes_of_their_tokens(tmp_path: Path) -> None:
    """By two servers, one of which answers with wrong routes now and then; padding and last tokens have none."""
    harness = FakeHarness(tmp_path, servers=2, routes=ROUTED, layers=5)
    try:
        harness.engine.update_weights(harness.weights(0), 1, harness.probe(0))
        for kind in ("no_routes", "short_routes", "foreign_routes"):
            harness.arm(0, kind, after=2)
            rollouts = harness.engine.generate(MANY, range(len(MANY)), SAMPLING, group_size=4)
            assert rollouts.routes_NSLK is not None and rollouts.routes_NSLK.dtype == torch.uint8
            routes_NSLK = unpack_routes(rollouts.routes_NSLK)
            assert routes_NSLK.shape == (len(MANY) * 4, rollouts.tokens_NS.shape[1], 3, 3)
            for n, length in enumerate(rollouts.total_len_N.tolist()):
                wanted = routes_of(rollouts.tokens_NS[n, :length].tolist(), 5, ROUTED.experts, ROUTED.topk)
                assert np.array_equal(routes_NSLK[n, : length - 1].numpy(), wanted[:, [1, 2, 4]])
                assert (routes_NSLK[n, length - 1 :] == FREE).all()
        pool: Any = harness.engine
        snapshot: Any = SimpleNamespace(version=1)
        groups: Any = SimpleNamespace(tp=One, pp=One, cp=One, world=One, _of_replica=(One, One, One))
        staged = ServedEngine(snapshot, pool, groups, stream=iter, probe_tokens=[], tolerance=1.0, stage=[2, 0])  # type: ignore[arg-type]
        staged._served = 1
        stage = staged.generate(MANY[:2], range(2), SAMPLING, 2)
        assert stage.routes_NSLK is not None
        length = int(stage.total_len_N[0])
        wanted = routes_of(stage.tokens_NS[0, :length].tolist(), 5, ROUTED.experts, ROUTED.topk)
        assert np.array_equal(stage.routes_NSLK[0, : length - 1].numpy(), wanted[:, [4, 1]])
    finally:
        harness.engine.close()


One = SimpleNamespace(size=lambda: 1)
"""A group of one process."""

"""Weights that change while servers generate: whose each token is, and that none of unproven weights counts.

VP2O_IN_FLIGHT (2): how many random runs. VP2O_ROLLOUT_SEED (0) draws prompts, moments and faults.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from pathlib import Path

import pytest

from megatron_vp2o.rl.types import Rollouts, SamplingParams
from megatron_vp2o.rollout.answers import Asked, BadAnswer, OtherWeights, samples
from tests.rollout.fakes import END, FakeHarness, table

SEED = int(os.environ.get("VP2O_ROLLOUT_SEED", "0"))
RUNS = int(os.environ.get("VP2O_IN_FLIGHT", "2"))
LONG = SamplingParams(temperature=0.9, top_p=1.0, max_new_tokens=12, seed=0)


def check(harness: FakeHarness, rollouts: Rollouts, models: dict[int, int], asked_of: int) -> set[int]:
    """Each token has the log-probability that the weights of its version give it. Returns the versions that there are."""
    versions_NS, response_NS = rollouts.versions_NS, rollouts.response_mask_NS()
    assert versions_NS is not None and rollouts.weight_version == asked_of
    assert (versions_NS[~response_NS] == -1).all()
    found: set[int] = set()
    for n, total in enumerate(rollouts.total_len_N.tolist()):
        tokens, first = rollouts.tokens_NS[n, :total].tolist(), int(rollouts.prompt_len_N[n])
        made = versions_NS[n, first:total].tolist()
        assert made == sorted(made) and made[0] >= asked_of
        found |= set(made)
        by_model = {version: harness.log_probs(models[version], tokens, 0.9) for version in set(made)}
        wanted = [by_model[version][first - 1 + at] for at, version in enumerate(made)]
        assert rollouts.logprobs_NS[n, first:total].tolist() == pytest.approx(wanted, abs=1e-5)
        assert tokens[-1] == END or total - first == LONG.max_new_tokens
    return found


@pytest.mark.timeout(120 * RUNS + 60)
def test_tokens_are_of_the_weights_that_they_say(tmp_path: Path) -> None:
    """Several updates at random moments; a server that dies in one, loads something else or refuses once, or dies generating."""
    mixed = restarts = 0
    for number in range(RUNS):
        rng = random.Random(1000 * SEED + number)
        harness = FakeHarness(
            tmp_path / str(number),
            servers=2,
            settings={"in_flight_updates": True, "request_timeout_s": 20.0},
            token_s=0.02,
        )
        pool, models = harness.engine, {1: 0}
        pool.update_weights(harness.weights(0), 1, harness.probe(0))
        begun = []
        for version in range(2, 6):
            count = rng.randint(5, 20)
            prompts = [[rng.randint(2, 23) for _ in range(rng.randint(1, 3))] for _ in range(count)]
            begun.append((pool.begin(prompts, range(count), LONG, 3), version - 1, prompts))
            time.sleep(rng.random() * 0.6)
            kind = rng.choice(["", "die_loading", "load_other", "load_half", "refuse", "die_generating"])
            if kind:
                harness.arm(rng.randrange(2), kind)
            models[version] = rng.randrange(2)
            pool.update_weights(harness.weights(models[version]), version, harness.probe(models[version]))
        for batch, asked_of, prompts in begun:
            rollouts = batch.result()
            rows = [
                rollouts.tokens_NS[n, : rollouts.prompt_len_N[n]].tolist() for n in range(len(rollouts.total_len_N))
            ]
            assert rows == [prompt for prompt in prompts for _ in range(3)], "each prompt once, in order"
            mixed += len(check(harness, rollouts, models, asked_of)) > 1
        restarts += pool.restarts
        print(f"seed {1000 * SEED + number}: models {models}, {pool.restarts} restarts", flush=True)
        pool.close()
    assert mixed >= RUNS, "no batch had tokens of several versions"


def test_requests_go_on_and_are_not_asked_again(tmp_path: Path) -> None:
    harness = FakeHarness(tmp_path, settings={"in_flight_updates": True, "request_timeout_s": 20.0}, token_s=0.05)
    pool = harness.engine
    pool.update_weights(harness.weights(0), 1, harness.probe(0))
    asked: list[int] = []
    server = pool._server(pool.members[0]).__class__
    generate = server.generate

    async def counted(self, prompt, *rest):  # type: ignore[no-untyped-def]
        asked.append(prompt[0])
        return await generate(self, prompt, *rest)

    server.generate = counted  # type: ignore[method-assign]
    try:
        begun = pool.begin([[token] for token in range(2, 10)], range(8), LONG, 1)
        time.sleep(0.2)
        assert not begun.future.done()
        pool.update_weights(harness.weights(1), 2, harness.probe(1))
        found = check(harness, begun.result(), {1: 0, 2: 1}, 1)
    finally:
        server.generate = generate  # type: ignore[method-assign]
    assert found == {1, 2} and sorted(asked) == list(range(2, 10))
    pool.close()


def test_without_it_tokens_of_other_weights_are_refused() -> None:
    def answer(*spans: tuple[str, int]) -> dict[str, object]:
        tokens, at, said = [3, 4, 5], 0, []
        for version, end in spans:
            said.append({"version": version, "start": at, "end": end})
            at = end
        content = [{"token_id": token, "logprob": -1.0} for token in tokens]
        choice = {"index": 0, "finish_reason": "length", "token_ids": tokens, "logprobs": {"content": content}}
        return {"choices": [choice | {"weight_versions": said}]}

    several, one = Asked([], 9, 3, {"a": 1, "b-x-unproven": 2, "b": 2}), Asked([], 9, 3, {"b": 2})
    good = answer(("a", 1), ("b-x-unproven", 2), ("b", 3))
    assert samples(good, 1, several, 1)[0].versions == [(1, 1), (2, 2), (2, 3)]
    for refused in (good, answer(("b-y-unproven", 1), ("b", 3)), answer(("a", 3))):
        with pytest.raises(OtherWeights):
            samples(refused, 1, one, 1)
    with pytest.raises(OtherWeights, match="instead of a or b-x-unproven or b"):
        samples(answer(("a", 1), ("b-y-unproven", 3)), 1, several, 1)
    with pytest.raises(OtherWeights, match="go back"):
        samples(answer(("b", 1), ("a", 3)), 1, several, 1)
    with pytest.raises(BadAnswer, match="do not cover"):
        samples(answer(("a", 1), ("b", 2)), 1, several, 1)


def test_the_two_models_differ() -> None:
    """Else nothing above would tell whose a token is."""
    rows = [table(model)["rows.0"] for model in range(2)]
    assert all((one - other).abs().max() > 0.5 for one, other in itertools.combinations(rows, 2))

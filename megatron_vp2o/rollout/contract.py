"""What every engine must do, as tests: subclass `EngineContract` in a test file of your own engine.

    class TestMyEngine(EngineContract):
        @pytest.fixture
        def harness(self): ...   # a `Harness`

pytest collects the inherited tests. They need an engine whose weights can be set to either of two models, and somebody
independent of it who knows those models' log-probabilities.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_vp2o.core.routes import FREE, unpack_routes
from megatron_vp2o.errors import RolloutError, SyncError
from megatron_vp2o.rl.types import Rollouts, SamplingParams
from megatron_vp2o.rollout.protocol import Engine, Probe


class Harness(Protocol):
    """An engine under test, and what is known of its models 0 and 1, which must differ clearly."""

    @property
    def engine(self) -> Engine:
        """The one under test."""
        ...

    vocabulary: int  # prompts are drawn from ids below it
    end: int  # the one id that ends a response; a few percent of the models' tokens must be it
    tolerance: float  # of log-probabilities, nats

    def weights(self, model: int) -> Iterator[tuple[str, Tensor]]:
        """A whole set of weights of one of the models, as `update_weights` takes it."""
        ...

    def log_probs(self, model: int, tokens: Sequence[int], temperature: float) -> list[float]:
        """Log-probabilities of all tokens but the first, by a reference that shares as little code with the engine as can be."""
        ...


SAMPLING = SamplingParams(1.0, 1.0, 12, seed=5)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [5, 6, 7, 8]]


class EngineContract:
    """See the module. Tests may run in any order: each begins by giving the engine weights."""

    def test_a_receipt_says_what_was_taken(self, harness: Harness) -> None:
        sent = [tensor for _, tensor in harness.weights(0)]
        receipt = harness.engine.update_weights(harness.weights(0), 3)
        assert receipt.version == harness.engine.version == 3
        assert receipt.tensors == len(sent)
        assert receipt.bytes == sum(tensor.numel() * tensor.element_size() for tensor in sent)
        other = harness.engine.update_weights(harness.weights(1), 4)
        assert other.checksum != receipt.checksum
        assert harness.engine.update_weights(harness.weights(0), 5).checksum == receipt.checksum

    def test_rollouts_are_what_the_protocol_says(self, harness: Harness) -> None:
        harness.engine.update_weights(harness.weights(0), 11)
        rollouts = harness.engine.generate(PROMPTS, range(4), SAMPLING, group_size=16)
        assert len(rollouts.total_len_N) == 64 and rollouts.weight_version == 11
        check_form(rollouts, [prompt for prompt in PROMPTS for _ in range(16)], SAMPLING, harness)
        assert 0 < int(rollouts.finished_N.sum()) < 64, "the models end some responses and not all"
        distinct = {tuple(rollouts.response(n)) for n in range(16)}
        assert len(distinct) > 8, "the members of a group are samples, not copies of one"

    def test_log_probs_are_those_of_the_present_weights(self, harness: Harness) -> None:
        for model, temperature in ((0, 1.0), (1, 1.0), (1, 0.7), (0, 1.3)):
            harness.engine.update_weights(harness.weights(model), 2)
            sampling = SamplingParams(temperature, 1.0, 12, seed=model)
            rollouts = harness.engine.generate(PROMPTS, range(4), sampling, group_size=4)
            assert _difference(harness, rollouts, model, temperature) <= harness.tolerance
            assert _difference(harness, rollouts, 1 - model, temperature) > 100 * harness.tolerance

    def test_small_requests(self, harness: Harness) -> None:
        harness.engine.update_weights(harness.weights(0), 1)
        none = harness.engine.generate([], [], SAMPLING, group_size=4)
        assert len(none.total_len_N) == 0
        one = harness.engine.generate([[7]], [9], SamplingParams(1.0, 1.0, 1, seed=0))
        check_form(one, [[7]], SamplingParams(1.0, 1.0, 1, seed=0), harness)
        try:
            harness.engine.generate([[5], []], [0, 1], SAMPLING)
        except ValueError:
            return
        raise AssertionError("an empty prompt was accepted")

    def test_greedy_is_the_likeliest_token(self, harness: Harness) -> None:
        harness.engine.update_weights(harness.weights(1), 1)
        greedy = SamplingParams(0.0, 1.0, 3, seed=0)
        rollouts = harness.engine.generate(PROMPTS, range(4), greedy)
        check_form(rollouts, PROMPTS, greedy, harness, log_probs=False)
        for n, prompt in enumerate(PROMPTS):
            first = rollouts.response(n)[0]
            scores = [harness.log_probs(1, [*prompt, token], 1.0)[-1] for token in range(harness.vocabulary)]
            assert scores[first] >= max(scores) - harness.tolerance

    def test_a_set_that_is_not_whole_is_refused(self, harness: Harness) -> None:
        """The engine refuses to generate until it gets a whole one, and then holds just that."""
        for damage in (_nothing, _half, _twice, _unknown, _misshapen):
            harness.engine.update_weights(harness.weights(0), 1)
            _raises(SyncError, lambda d=damage: harness.engine.update_weights(d(harness.weights(1)), 2))  # type: ignore[misc]
            assert harness.engine.version == -1 and not harness.engine.health().ready, damage.__name__
            _raises(SyncError, lambda: harness.engine.generate(PROMPTS, range(4), SAMPLING))
        harness.engine.update_weights(harness.weights(1), 3)
        rollouts = harness.engine.generate(PROMPTS, range(4), SAMPLING, group_size=2)
        assert _difference(harness, rollouts, 1, 1.0) <= harness.tolerance

    def test_a_probe_finds_other_weights(self, harness: Harness) -> None:
        tokens = [[5, 6, 7, 9, 11], [8, 3, 2]]
        probes = [
            Probe(tokens, [harness.log_probs(model, row, 1.0) for row in tokens], harness.tolerance) for model in (0, 1)
        ]
        harness.engine.update_weights(harness.weights(0), 1, probes[0])
        harness.engine.update_weights(harness.weights(1), 2, probes[1])
        _raises(SyncError, lambda: harness.engine.update_weights(harness.weights(0), 3, probes[1]))
        _raises(SyncError, lambda: harness.engine.generate(PROMPTS, range(4), SAMPLING))
        assert harness.engine.update_weights(harness.weights(0), 4, probes[0]).version == 4
        assert harness.engine.health().ready and harness.engine.health().version == 4


class ClosingContract:
    """The end of an engine; apart, because a test that closes it leaves nothing to others."""

    def test_a_closed_engine_refuses(self, harness: Harness) -> None:
        harness.engine.update_weights(harness.weights(0), 1)
        assert harness.engine.health().ready
        harness.engine.close()
        harness.engine.close()
        assert not harness.engine.health().ready
        _raises(RolloutError, lambda: harness.engine.generate(PROMPTS, range(4), SAMPLING))


def check_form(
    rollouts: Rollouts,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    harness: Harness,
    log_probs: bool = True,
) -> None:
    """Every field of rollouts against the prompts that they should answer, row by row."""
    assert len(rollouts.total_len_N) == len(prompts)
    for n, prompt in enumerate(prompts):
        length, total = int(rollouts.prompt_len_N[n]), int(rollouts.total_len_N[n])
        assert rollouts.tokens_NS[n, :length].tolist() == list(prompt)
        response = rollouts.response(n)
        assert 1 <= len(response) <= sampling.max_new_tokens and all(0 <= t < harness.vocabulary for t in response)
        assert harness.end not in response[:-1]
        assert bool(rollouts.finished_N[n]) == (response[-1] == harness.end)
        assert rollouts.finished_N[n] or len(response) == sampling.max_new_tokens
        for logprob_NS in (rollouts.logprobs_NS, rollouts.model_logprobs_NS) if log_probs else ():
            assert logprob_NS.dtype == torch.float32
            inside = logprob_NS[n, length:total]
            assert bool((inside <= 0).all()) and bool((inside > -100).all()) and bool((inside != 0).any())
            outside = torch.cat([logprob_NS[n, :length], logprob_NS[n, total:]])
            assert bool((outside == 0).all())
    if rollouts.routes_NSLK is not None:
        _check_routes(rollouts)


def _check_routes(rollouts: Rollouts) -> None:
    """Every token but a sequence's last one has a route in all layers or in none, and no expert of it comes twice."""
    assert rollouts.routes_NSLK is not None
    assert rollouts.routes_NSLK.shape[:2] == rollouts.tokens_NS.shape
    routes_NSLK = unpack_routes(rollouts.routes_NSLK)
    inside_NS = torch.arange(rollouts.tokens_NS.shape[1]) < rollouts.total_len_N[:, None] - 1
    assert bool((routes_NSLK[~inside_NS] == FREE).all())
    routed_NSL = (routes_NSLK != FREE).all(dim=3)
    assert torch.equal(routed_NSL, (routes_NSLK != FREE).any(dim=3))
    assert torch.equal(routed_NSL.all(dim=2), routed_NSL.any(dim=2)) and bool(routed_NSL.any())
    sorted_NSLK = routes_NSLK.sort(dim=3).values
    assert not bool((sorted_NSLK[..., 1:] == sorted_NSLK[..., :-1])[routed_NSL].any())


def _difference(harness: Harness, rollouts: Rollouts, model: int, temperature: float) -> float:
    """Largest difference of the rollouts' log-probabilities from the reference's of a model."""
    worst = 0.0
    for n in range(len(rollouts.total_len_N)):
        length, total = int(rollouts.prompt_len_N[n]), int(rollouts.total_len_N[n])
        wanted = torch.tensor(harness.log_probs(model, rollouts.tokens_NS[n, :total].tolist(), temperature))
        worst = max(worst, float((wanted[length - 1 :] - rollouts.model_logprobs_NS[n, length:total]).abs().max()))
    return worst


Stream = Iterable[tuple[str, Tensor]]


def _nothing(weights: Stream) -> Stream:
    for _ in weights:
        pass
    return []


def _half(weights: Stream) -> Stream:
    whole = list(weights)
    return whole[: len(whole) // 2]


def _twice(weights: Stream) -> Stream:
    whole = list(weights)
    return itertools.chain(whole, whole[3:4])


def _unknown(weights: Stream) -> Stream:
    return itertools.chain(weights, [("model.nobody.knows.weight", torch.zeros(2, 3))])


def _misshapen(weights: Stream) -> Stream:
    for number, (name, tensor) in enumerate(weights):
        yield name, torch.cat([tensor, tensor]) if number == 4 else tensor


def _raises(kind: type[Exception], action: Callable[[], object]) -> None:
    try:
        action()
    except kind as error:
        assert str(error)
        return
    raise AssertionError(f"{kind.__name__} was expected")

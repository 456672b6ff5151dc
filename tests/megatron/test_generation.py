"""The embedded engine against decoding without a cache, and against teacher-forced scoring."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.config.schema import ModelConfig, TrainConfig  # noqa: E402
from megatron_vp2o.megatron.actor.direct import DirectDecoder  # noqa: E402
from megatron_vp2o.megatron.actor.generation import MegatronEngine  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.rl.types import SamplingParams, TrainBatch  # noqa: E402

pytestmark = pytest.mark.smoke
VOCAB, EOS, PAD = 24, 1, 0
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [5, 6, 7, 8]]


def engine_config() -> TrainConfig:
    config = TrainConfig(
        model=ModelConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, kv_channels=8, num_moe_experts=4, moe_router_topk=2
        )
    )
    config.model.init_method_std = 0.2  # so that distributions are far from uniform
    return config


@pytest.fixture(scope="module")
def engine():
    config = engine_config()
    groups = world.start(config.parallel, config.seed)
    policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=10)
    engine = MegatronEngine(config, policy, eos_ids=[EOS], pad_id=PAD)
    engine.refresh(0)
    yield engine
    world.stop()


def plain_logits(engine: MegatronEngine, tokens: list[int]) -> torch.Tensor:
    """Megatron's own forward pass over a whole sequence, no cache, no padding. Logits of the last position, [V]."""
    model = engine.policy.model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
    model.train()
    return logits[0, -1, :VOCAB]


def greedy_without_cache(engine: MegatronEngine, prompt: list[int], limit: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(limit):
        tokens.append(int(plain_logits(engine, tokens).argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def test_greedy_equals_decoding_without_a_cache(engine):
    rollouts = engine.generate(PROMPTS, range(4), SamplingParams(0.0, 1.0, 12, seed=3))
    for n, prompt in enumerate(PROMPTS):
        assert rollouts.response(n) == greedy_without_cache(engine, prompt, 12)
        assert rollouts.tokens_NS[n, : len(prompt)].tolist() == prompt


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.6)])
def test_log_probs_equal_teacher_forced_ones(engine, temperature, top_p):
    rollouts = engine.generate(PROMPTS, range(4), SamplingParams(temperature, top_p, 12, seed=5), group_size=6)
    mask_NS = rollouts.response_mask_NS()
    batch = TrainBatch(rollouts.tokens_NS, rollouts.total_len_N, mask_NS, temperature=temperature)
    learner_NS = engine.policy.log_probs(batch, 5) * mask_NS
    torch.testing.assert_close(learner_NS, rollouts.model_logprobs_NS, rtol=0, atol=1e-5)
    torch.testing.assert_close(engine.log_probs(rollouts, temperature), rollouts.model_logprobs_NS, rtol=0, atol=1e-5)
    if top_p == 1.0:
        assert torch.equal(rollouts.logprobs_NS, rollouts.model_logprobs_NS)
    else:  # inside a nucleus of probability p every token is likelier, by at most 1 / p
        gain = (rollouts.logprobs_NS - rollouts.model_logprobs_NS)[mask_NS]
        assert gain.min() >= -1e-5 and gain.max() <= -torch.tensor(top_p).log() + 1e-5 and gain.max() > 0.01


def test_samples_do_not_depend_on_batch_order_or_company(engine):
    sampling = SamplingParams(1.0, 1.0, 12, seed=7)
    together = engine.generate(PROMPTS, [10, 11, 12, 13], sampling, group_size=3)
    for p, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], [10 + p], sampling, group_size=3)
        for g in range(3):
            assert alone.response(g) == together.response(3 * p + g)
    backwards = engine.generate(PROMPTS[::-1], [13, 12, 11, 10], sampling, group_size=3)
    assert [backwards.response(n) for n in range(3)] == [together.response(9 + n) for n in range(3)]


@pytest.mark.parametrize("limit", [1, 3, 4, 7, 9, 1024])
def test_small_batches_give_the_same_sequences(engine, monkeypatch, limit):
    """Groups larger than the limit are cut, too: never more than max_batch_size sequences are decoded at once."""
    sampling = SamplingParams(1.0, 1.0, 12, seed=7)
    whole = engine.generate(PROMPTS, range(4), sampling, group_size=4)
    rows: list[int] = []
    step = DirectDecoder.step

    def counted(decoder: DirectDecoder, tokens: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        rows.append(len(tokens))
        return step(decoder, tokens, *arguments, **settings)

    monkeypatch.setattr(DirectDecoder, "step", counted)
    monkeypatch.setattr(engine, "max_batch_size", limit)
    parts = engine.generate(PROMPTS, range(4), sampling, group_size=4)
    assert [parts.response(n) for n in range(16)] == [whole.response(n) for n in range(16)]
    torch.testing.assert_close(parts.logprobs_NS, whole.logprobs_NS, atol=1e-5, rtol=0)
    assert max(rows) <= limit and (limit > 16 or max(rows) > limit // 2)


@pytest.mark.parametrize(("limit", "size"), [(1024, 8), (16, 8), (5, 8), (3, 1)])
def test_every_response_is_handed_over_once_when_it_is_complete(engine, monkeypatch, limit, size):
    """And decoding goes on: all but the last of those that leave a batch are handed over before it ends."""
    monkeypatch.setattr(engine, "max_batch_size", limit)
    sampling = SamplingParams(1.0, 1.0, 12, seed=11)
    handed: dict[int, list[int]] = {}
    calls = []
    step = DirectDecoder.step

    def take(rows, responses):
        assert not handed.keys() & set(rows)
        handed.update(zip(rows, responses, strict=True))
        calls.append("take")

    def counted(*arguments, **settings):
        calls.append("step")
        return step(*arguments, **settings)

    monkeypatch.setattr(DirectDecoder, "step", counted)
    with engine.handing_over(take):
        rollouts = engine.generate(PROMPTS, range(4), sampling, group_size=size)
    assert [handed[n] for n in range(4 * size)] == [rollouts.response(n) for n in range(4 * size)]
    assert calls[-1] == "take"
    assert "step" in calls[calls.index("take") :]
    plain = engine.generate(PROMPTS, range(4), sampling, group_size=size)
    assert len(handed) == 4 * size and torch.equal(plain.tokens_NS, rollouts.tokens_NS)
    assert torch.equal(plain.logprobs_NS, rollouts.logprobs_NS)


def test_stops_at_end_of_sequence_and_at_the_limit(engine):
    rollouts = engine.generate(PROMPTS, range(4), SamplingParams(1.0, 1.0, 12, seed=11), group_size=64)
    ended = 0
    for n in range(len(rollouts.total_len_N)):
        response = rollouts.response(n)
        assert EOS not in response[:-1]
        assert bool(rollouts.finished_N[n]) == (response[-1] == EOS)
        assert rollouts.finished_N[n] or len(response) == 12
        assert (rollouts.tokens_NS[n, int(rollouts.total_len_N[n]) :] == PAD).all()
        ended += bool(rollouts.finished_N[n])
    assert 0 < ended < len(rollouts.total_len_N)
    assert (rollouts.tokens_NS < VOCAB).all()


def test_any_of_several_ids_ends_a_response(engine):
    """With more ends a response is the one with fewer, cut after the first of them: what is drawn does not depend on ends."""
    sampling = SamplingParams(1.0, 1.0, 12, seed=11)
    random = Random(5)
    with_one = engine.generate(PROMPTS, range(4), sampling, group_size=16)
    cut = 0
    for _ in range(3):
        ends = {EOS, *random.sample(range(2, VOCAB), 3)}
        other = MegatronEngine(engine_config(), engine.policy, eos_ids=ends, pad_id=PAD)
        other.refresh(0)
        rollouts = other.generate(PROMPTS, range(4), sampling, group_size=16)
        for n in range(64):
            full = with_one.response(n)
            first = next((i for i, token in enumerate(full) if token in ends), len(full) - 1)
            assert rollouts.response(n) == full[: first + 1]
            assert bool(rollouts.finished_N[n]) == (full[first] in ends)
            cut += first + 1 < len(full)
    assert cut > 20


def test_the_actor_is_a_snapshot(engine):
    sampling = SamplingParams(0.0, 1.0, 12, seed=0)
    before = [engine.generate(PROMPTS, range(4), sampling).response(n) for n in range(4)]
    weights = [p.clone() for p in engine.policy.model.parameters()]
    with torch.no_grad():
        for p in engine.policy.model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    try:
        stale = engine.generate(PROMPTS, range(4), sampling)
        assert [stale.response(n) for n in range(4)] == before and stale.weight_version == 0
        with engine.at_learner_weights():
            pairs = zip(engine.actor.parameters(), engine.policy.model.parameters(), strict=True)
            assert all(mine.data_ptr() == learned.data_ptr() for mine, learned in pairs)  # no third copy
            fresh = [engine.generate(PROMPTS, range(4), sampling).response(n) for n in range(4)]
        assert fresh == [greedy_without_cache(engine, prompt, 12) for prompt in PROMPTS] != before
        again = engine.generate(PROMPTS, range(4), sampling)
        assert [again.response(n) for n in range(4)] == before
        engine.refresh(7)
        refreshed = engine.generate(PROMPTS, range(4), sampling)
        assert [refreshed.response(n) for n in range(4)] == fresh and refreshed.weight_version == 7
    finally:
        with torch.no_grad():
            for p, old in zip(engine.policy.model.parameters(), weights, strict=True):
                p.copy_(old)
        engine.refresh(0)


def test_an_empty_prompt_is_refused(engine):
    with pytest.raises(ValueError, match="0 tokens"):
        engine.generate([[5], []], [0, 1], SamplingParams(1.0, 1.0, 4, seed=0))


def test_no_prompts_give_no_rollouts(engine):
    rollouts = engine.generate([], [], SamplingParams(1.0, 1.0, 4, seed=0), group_size=4)
    assert rollouts.tokens_NS.shape[0] == 0 and len(rollouts.finished_N) == 0

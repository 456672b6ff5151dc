"""From verdicts to advantages: what acts on the task's reward, what on the shaped one."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch

from megatron_vp2o.config.reward import RewardConfig, RewardWeights
from megatron_vp2o.config.schema import (
    Algorithm,
    AnswerKernel,
    AnswerRepulsion,
    AnswerRepulsionConfig,
    GRPOConfig,
    KLEstimator,
    KLReference,
)
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.rewards import RewardShaping, answer_numbers, responses
from megatron_vp2o.rl.types import Rollouts, Verdict
from megatron_vp2o.tasks.tokenizer import CharTokenizer
from megatron_vp2o.tracking.schema import schema_for

TOKENIZER = CharTokenizer()


def verdict(answer: str | None) -> Verdict:
    return Verdict(answer is not None, answer, "" if answer else "value")


def make_rollouts(texts: list[str], seed: int = 0) -> Rollouts:
    """Prompts of different lengths before the responses."""
    rows = [
        (TOKENIZER.encode("1" * (1 + n % 3)), [*TOKENIZER.encode(text), TOKENIZER.eos_id])
        for n, text in enumerate(texts)
    ]
    width = max(len(p) + len(r) for p, r in rows) + 1
    tokens_NS = torch.tensor([p + r + [TOKENIZER.pad_id] * (width - len(p) - len(r)) for p, r in rows])
    prompt_N = torch.tensor([len(p) for p, _ in rows])
    total_N = torch.tensor([len(p) + len(r) for p, r in rows])
    logprobs_NS = -torch.rand(tokens_NS.shape, generator=torch.Generator().manual_seed(seed))
    return Rollouts(tokens_NS, prompt_N, total_N, logprobs_NS, logprobs_NS, torch.ones(len(rows)).bool(), 0)


def settings(form: AnswerRepulsion = AnswerRepulsion.leave_one_out, **repulsion: object) -> GRPOConfig:
    return GRPOConfig(
        group_size=4,
        normalise_by_std=False,
        answer_repulsion=AnswerRepulsionConfig(form=form, **repulsion),  # type: ignore[arg-type]
    )


ANSWERS: list[list[str | None]] = [
    ["1+2", "1+2", "3", None],
    ["1+2", "3", "2+1", "9-6"],
    ["3", "3", "3", "3"],
    [None, None, None, None],
]
TEXTS = [answer or "oops" for group in ANSWERS for answer in group]
VERDICTS = [[verdict(answer) for answer in group] for group in ANSWERS]


def test_statistics_and_filter_act_on_the_shaped_reward():
    """All four right but not all alike: silent for GRPO, and what repulsion lives on."""
    verdicts = [[verdict(a) for a in ["x", "x", "x", "y"]], *VERDICTS[2:]]
    texts = ["1", "1", "1", "2", *TEXTS[8:]]
    plain = RewardShaping(settings(AnswerRepulsion.none), TOKENIZER)(verdicts, make_rollouts(texts), None)
    assert plain.signal_P.tolist() == [False, False, False]
    earned = RewardShaping(settings(), TOKENIZER)(verdicts, make_rollouts(texts), None)
    assert earned.shaped_PG[0].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1.0])
    assert earned.advantages_PG[0].tolist() == pytest.approx([-1 / 12, -1 / 12, -1 / 12, 0.25])
    assert earned.signal_P.tolist() == [True, False, False]
    assert earned.rewards_PG[0].tolist() == [1.0] * 4 and earned.distinct == 3


@pytest.mark.parametrize(
    "form", [AnswerRepulsion.leave_one_out, AnswerRepulsion.count, AnswerRepulsion.quality_diversity]
)
def test_right_answers_are_spared(form):
    """No right answer has a negative advantage, and nothing else changes: wrong ones, and right ones above the mean."""
    verdicts = [[verdict(answer) for answer in ["x", "x", "x", "y"]], *VERDICTS]
    rollouts = make_rollouts(["1", "1", "1", "2", *TEXTS])
    plain = RewardShaping(settings(form), TOKENIZER)(verdicts, rollouts, None)
    spared = RewardShaping(settings(form, spare_right=True), TOKENIZER)(verdicts, rollouts, None)
    pushed_PG = plain.right_PG & (plain.advantages_PG < 0)
    assert pushed_PG.any() and (plain.advantages_PG[~plain.right_PG] < 0).any()
    assert torch.equal(spared.shaped_PG, plain.shaped_PG)
    assert torch.equal(spared.advantages_PG, plain.advantages_PG.masked_fill(pushed_PG, 0.0))


def test_the_prior_is_taken_off_before_the_mean():
    config = dataclasses.replace(
        settings(AnswerRepulsion.none),
        kl_coef=0.1,
        kl_estimator=KLEstimator.reward,
        kl_reference=KLReference.initial,
    )
    rollouts = make_rollouts(TEXTS)
    reference_NS = rollouts.model_logprobs_NS - torch.rand(rollouts.tokens_NS.shape, generator=torch.Generator())
    earned = RewardShaping(config, TOKENIZER)(VERDICTS, rollouts, reference_NS)
    for p, group in enumerate(VERDICTS):
        shaped = []
        for g, v in enumerate(group):
            n = p * 4 + g
            inside = range(int(rollouts.prompt_len_N[n]), int(rollouts.total_len_N[n]))
            log_ratio = sum((rollouts.model_logprobs_NS[n, s] - reference_NS[n, s]).item() for s in inside)
            shaped.append(float(v.correct) - 0.1 * log_ratio)
        assert earned.shaped_PG[p].tolist() == pytest.approx(shaped, abs=1e-6)
        mean = sum(shaped) / 4
        assert earned.advantages_PG[p].tolist() == pytest.approx([s - mean for s in shaped], abs=1e-6)
    assert earned.signal_P.all(), "with the prior even a group without a right answer carries a gradient"


@pytest.mark.parametrize("kernel", [AnswerKernel.canonical, AnswerKernel.ngram, AnswerKernel.edit])
@pytest.mark.parametrize("form", [AnswerRepulsion.leave_one_out, AnswerRepulsion.count])
def test_each_group_is_shaped_by_itself(kernel, form):
    """So it does not matter which data-parallel rank owns it."""
    shaping = RewardShaping(settings(form, kernel=kernel, ngram=2), TOKENIZER)
    rollouts = make_rollouts(TEXTS)
    whole = shaping(VERDICTS, rollouts, None)
    assert not torch.equal(whole.shaped_PG, whole.rewards_PG.double()), "the kernel must have acted"
    for p in range(4):
        part = shaping(VERDICTS[p : p + 1], rollouts.rows(torch.arange(4 * p, 4 * p + 4)), None)
        torch.testing.assert_close(part.shaped_PG[0], whole.shaped_PG[p], rtol=0, atol=1e-12)
        assert torch.equal(part.advantages_PG[0], whole.advantages_PG[p])


def test_a_rank_without_prompts():
    for kernel in (AnswerKernel.canonical, AnswerKernel.ngram, AnswerKernel.edit):
        nothing = make_rollouts(TEXTS).rows(torch.arange(0))
        earned = RewardShaping(settings(kernel=kernel), TOKENIZER)([], nothing, None)
        assert earned.advantages_PG.shape == (0, 4) and earned.signal_P.shape == (0,)


def test_embedder_gets_the_responses(monkeypatch):
    module = types.ModuleType("embedder_of_a_test")
    module.lengths = lambda texts: torch.tensor([[1.0, float(len(text))] for text in texts])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = settings(kernel=AnswerKernel.embedding, embedder="embedder_of_a_test:lengths", bandwidth=0.1)
    earned = RewardShaping(config, TOKENIZER)(VERDICTS, make_rollouts(TEXTS), None)
    shaped = earned.shaped_PG[1].tolist()  # three answers of three characters, and one of one
    assert shaped[1] > shaped[0] == shaped[2] == shaped[3]


@pytest.mark.parametrize("name", ["no.such.module:f", "math:no_such_function", "math"])
def test_an_embedder_that_is_not_there(name):
    with pytest.raises(ConfigError, match=r"embedder=.*package.module:function"):
        RewardShaping(settings(kernel=AnswerKernel.embedding, embedder=name), TOKENIZER)


def test_answer_numbers():
    assert answer_numbers([[verdict(a) for a in ["a", None, "b", "a"]]]).tolist() == [[0, -2, 1, 0]]


def test_responses_start_at_zero():
    rollouts = make_rollouts(["12", "3", "1+2+3"])
    tokens_NS, length_N = responses(rollouts)
    assert [tokens_NS[n, : length_N[n]].tolist() for n in range(3)] == [rollouts.response(n) for n in range(3)]


def test_overlong_responses_are_punished_linearly():
    """DAPO's Eq. 13, written out response by response."""
    texts = ["1" * n for n in (1, 5, 8, 9)]
    earned = RewardShaping(
        settings(AnswerRepulsion.none), TOKENIZER, RewardConfig(overlong_buffer=4, overlong_penalty=0.5), longest=10
    )([[verdict("x"), verdict("x"), verdict(None), verdict("x")]], make_rollouts(texts), None)
    lengths = [len(text) + 1 for text in texts]  # with end-of-sequence
    expected = [0.0 if n <= 6 else -0.5 * min((n - 6) / 4, 1) for n in lengths]
    assert min(expected) == -0.5 and max(expected) == 0.0
    assert earned.parts["overlong"].tolist() == [expected]
    assert earned.rewards_PG.tolist() == [[1, 1, 0, 1]]  # the task's reward is recorded as it was
    assert earned.shaped_PG.tolist() == [[1 + expected[0], 1 + expected[1], expected[2], 1 + expected[3]]]


def test_parts_of_a_composed_reward_are_recorded_by_name():
    verdicts = [
        [Verdict(True, "x", "", 1.1, {"math": 1.0, "format": 0.1}), Verdict(False, None, "", 0.1, {"format": 0.1})] * 2
    ]
    reward = RewardConfig(RewardWeights(math=1.0, format=0.1))
    earned = RewardShaping(settings(AnswerRepulsion.none), TOKENIZER, reward)(verdicts, make_rollouts(["1"] * 4), None)
    alone: Any = types.SimpleNamespace(dp=types.SimpleNamespace(size=lambda: 1))
    metrics = earned.metrics(alone)
    assert metrics["reward/part/math"] == pytest.approx(0.5)
    assert metrics["reward/part/format"] == pytest.approx(0.1)
    assert metrics["reward/mean"] == pytest.approx(0.6)
    names = {key for key in schema_for(Algorithm.grpo, [1], reward.parts()) if key.startswith("reward/part/")}
    assert names == {key for key in metrics if key.startswith("reward/part/")}

"""Mismatch control in real runs: exact where engine and trainer agree, a stop with an explanation where they don't."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_vp2o.config.schema import MismatchConfig
from megatron_vp2o.core.choices import MismatchCorrection, MismatchLevel
from megatron_vp2o.errors import DeadRunError
from megatron_vp2o.megatron.actor.generation import MegatronEngine
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.platform import world
from megatron_vp2o.rl.mismatch import MismatchControl
from tests.megatron.policy_job import PROMPTS, SAMPLING, VOCAB, small_config


@pytest.fixture(scope="module")
def made() -> Iterator[tuple[Any, MegatronEngine]]:
    config = small_config()
    groups = world.start(config.parallel, config.seed)
    policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=4)
    engine = MegatronEngine(config, policy, eos_ids=[1], pad_id=0)
    engine.refresh(0)
    yield groups, engine
    world.stop()


def test_an_engine_that_agrees_is_not_corrected(made: Any) -> None:
    groups, engine = made
    rollouts = engine.generate(PROMPTS, range(len(PROMPTS)), SAMPLING, group_size=4)
    scored_NS = engine.log_probs(rollouts, 1.0)
    for correction in MismatchCorrection:
        recomputed, metrics = MismatchControl(MismatchConfig(correction=correction), groups)(rollouts, scored_NS)
        assert metrics["mismatch/logprob_p999"] < 1e-5 and abs(metrics["mismatch/kl"]) < 1e-8
        if correction is MismatchCorrection.none:
            assert recomputed.weight_NS is None
            continue
        assert recomputed.weight_NS is not None and metrics["mismatch/cut"] == 0
        mask_NS = rollouts.response_mask_NS()
        torch.testing.assert_close(recomputed.weight_NS, mask_NS.float(), rtol=0, atol=1e-4)


def test_one_that_does_not_ends_the_run(made: Any) -> None:
    groups, engine = made
    rollouts = engine.generate(PROMPTS, range(len(PROMPTS)), SAMPLING, group_size=4)
    hotter_NS = engine.log_probs(rollouts, 2.0)  # as if the engine sampled at another temperature than the run
    limit = MismatchControl(MismatchConfig(stop_kl=None), groups)(rollouts, hotter_NS)[1]["mismatch/kl"]
    assert limit > 0.1
    MismatchControl(MismatchConfig(stop_kl=1.01 * limit), groups)(rollouts, hotter_NS)
    with pytest.raises(DeadRunError, match=r"version 0.*stop_kl=") as caught:
        MismatchControl(MismatchConfig(stop_kl=0.99 * limit), groups)(rollouts, hotter_NS)
    assert "Nothing was trained on" in str(caught.value)
    hotter_NS[rollouts.response_mask_NS()] = float("nan")
    with pytest.raises(DeadRunError, match="nan nats"):
        MismatchControl(MismatchConfig(), groups)(rollouts, hotter_NS)


def test_the_settings_bounds_are_used(made: Any) -> None:
    groups, engine = made
    rollouts = engine.generate(PROMPTS, range(len(PROMPTS)), SAMPLING, group_size=4)
    hotter_NS = engine.log_probs(rollouts, 1.5)
    settings = MismatchConfig(
        correction=MismatchCorrection.icepop, level=MismatchLevel.geometric, low=0.9, high=1.1, stop_kl=None
    )
    recomputed, metrics = MismatchControl(settings, groups)(rollouts, hotter_NS)
    mask_NS = rollouts.response_mask_NS()
    mean_N = (hotter_NS - rollouts.model_logprobs_NS).sum(1) / mask_NS.sum(1)
    kept_N = (mean_N.exp() >= 0.9) & (mean_N.exp() <= 1.1)
    assert recomputed.weight_NS is not None and 0 < int(kept_N.sum()) < len(kept_N)
    assert torch.equal((recomputed.weight_NS > 0) & mask_NS, mask_NS & kept_N[:, None])
    cut = float((mask_NS & ~kept_N[:, None]).sum() / mask_NS.sum())
    assert metrics["mismatch/cut"] == pytest.approx(cut) and metrics["mismatch/weight"] < 1.1

"""Batches whose tokens are of several weights: who is compared with whom, and what asks for a refresh.

Shape legend: N sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vp2o.config.schema import BudgetConfig, MismatchConfig
from megatron_vp2o.core.budget import Budget, RefreshReason
from megatron_vp2o.core.choices import MismatchCorrection
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl.control import BudgetMeter
from megatron_vp2o.rl.mismatch import MismatchControl
from megatron_vp2o.rl.types import Rollouts, TrainBatch
from tests.rl.fakes import FakeRefresh, groups_of, rollouts_of
from tests.rl.test_ahead import AheadEngine, Handle
from tests.rl.test_trainer import PROMPTS, Made


@pytest.fixture
def groups() -> Iterator[Groups]:
    with groups_of() as made:
        yield made


def cut(rollouts: Rollouts, versions: list[int], random: Random) -> None:
    """Give each response's tokens these versions, in order, with random borders."""
    versions_NS = torch.full_like(rollouts.tokens_NS, -1)
    for n, (start, end) in enumerate(zip(rollouts.prompt_len_N.tolist(), rollouts.total_len_N.tolist(), strict=True)):
        made = sorted(random.choice(versions) for _ in range(end - start))
        versions_NS[n, start:end] = torch.tensor(made)
    rollouts.versions_NS = versions_NS


@pytest.mark.parametrize("seed", range(4))
def test_the_present_actors_budget_is_that_of_their_rows_alone(groups: Groups, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rollouts = rollouts_of(generator, 12)
    logprobs_NS = rollouts.model_logprobs_NS + torch.randn(rollouts.tokens_NS.shape, generator=generator)
    batch = TrainBatch(
        rollouts.tokens_NS,
        rollouts.total_len_N,
        rollouts.response_mask_NS(),
        behaviour_logprobs_NS=rollouts.model_logprobs_NS,
        present_N=torch.rand(12, generator=generator) < 0.4,
    )
    assert batch.present_N is not None

    def read(*index_N: Tensor) -> tuple[Budget, Budget]:
        meter = BudgetMeter(BudgetConfig(), groups)
        watched = meter.watch(lambda logprobs_NS, *_: (logprobs_NS.sum(), {}))
        for rows in index_N:
            watched(logprobs_NS[rows], logprobs_NS[rows], batch.rows(rows))
        return meter.spent_by_both().read()

    own = batch.present_N.nonzero().squeeze(1)
    whole, present = read(torch.arange(5), torch.arange(5, 12))
    alone, same = read(own)
    assert alone == same and present == pytest.approx(alone) and whole.sequences == 12 > present.sequences == len(own)
    assert whole.drift != pytest.approx(present.drift)
    batch.present_N = None
    assert len(set(read(torch.arange(12)))) == 1


@pytest.mark.parametrize("correction", [MismatchCorrection.tis, MismatchCorrection.mis, MismatchCorrection.icepop])
def test_tokens_of_other_weights_are_compared_with_nobody(groups: Groups, correction: MismatchCorrection) -> None:
    rollouts = rollouts_of(torch.Generator().manual_seed(3), 10)
    cut(rollouts, [1, 2, 3], Random(3))
    compared_NS, response_NS = rollouts.of_version_NS(3), rollouts.response_mask_NS()
    assert 0 < compared_NS.sum() < response_NS.sum()
    scored_NS = rollouts.model_logprobs_NS + torch.where(compared_NS, 0.01, 50.0)  # of the others it is far off
    control = MismatchControl(MismatchConfig(correction=correction, stop_kl=0.1), groups)
    recomputed, metrics = control(rollouts, scored_NS, compared_NS)
    assert metrics["mismatch/logprob_mean"] == pytest.approx(0.01, rel=1e-3)
    assert recomputed.weight_NS is not None
    assert recomputed.weight_NS[compared_NS].tolist() == pytest.approx([1.01005] * int(compared_NS.sum()), rel=1e-4)
    others_NS = response_NS & ~compared_NS
    assert (recomputed.weight_NS[others_NS] == 1).all()
    assert torch.equal(recomputed.logprobs_NS[others_NS], rollouts.model_logprobs_NS[others_NS])
    assert torch.equal(recomputed.logprobs_NS[compared_NS], scored_NS[compared_NS])
    assert metrics["mismatch/weight"] == pytest.approx(1.01005, rel=1e-4) and metrics["mismatch/cut"] == 0


@dataclass
class InFlightEngine(AheadEngine):
    """Takes other weights while it generates. What is under way is done when `finish` says so, with tokens of all weights since."""

    random: Any = None

    def refresh(self, version: int) -> None:
        under_way, self.under_way = self.under_way, []
        super().refresh(version)
        self.under_way = under_way

    def finish(self, handle: Handle) -> None:
        """Its last token is made now."""
        versions = [v for v in range(handle.rollouts.weight_version, self.version + 1) if v in self.held]
        cut(handle.rollouts, versions, self.random)

    @property
    def held(self) -> set[int]:
        return {int(line.split()[-1]) for line in self.log if line.startswith("engine refresh")}

    def log_probs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        """Those of the present weights; of others' tokens they are far off."""
        self.log.append(f"engine log_probs of {len(rollouts.total_len_N)}")
        return rollouts.model_logprobs_NS + torch.where(rollouts.of_version_NS(self.version), self.mismatch, 30.0)


class Under(Handle):
    """Is done once its tokens are."""

    def done(self) -> bool:
        return self.rollouts.versions_NS is not None

    def wait(self) -> Rollouts:
        if not self.done():
            self.engine.finish(self)  # type: ignore[attr-defined]
        return super().wait()


@pytest.mark.parametrize("seed", range(20))
def test_any_run_waits_for_nothing_and_compares_what_can_be(groups: Groups, seed: int) -> None:
    random = Random(seed)
    steps, ahead = 8, random.randrange(1, 4)
    reasons = [random.choice([None, RefreshReason.drift, RefreshReason.ess]) for _ in range(steps)]
    refresh = FakeRefresh([], reasons=reasons)
    made = Made(
        groups,
        refresh=refresh,
        rollout={"ahead": ahead, "in_flight_updates": True},
        engine=InFlightEngine,
        meter=BudgetMeter(BudgetConfig(), groups),
        mismatch=MismatchControl(
            MismatchConfig(correction=random.choice(list(MismatchCorrection)), stop_kl=1.0), groups
        ),
        steps=steps,
        filter_uniform_groups=False,
    )
    engine: Any = made.engine
    engine.random, engine.mismatch = random, 0.125
    begin = engine.begin

    def begins(*asked: Any) -> Any:
        begin(*asked)
        engine.under_way[-1].__class__ = Under
        return engine.under_way[-1]

    engine.begin = begins
    for step in range(steps):
        done_before = [handle.uids[0] for handle in engine.under_way if handle.done()]
        at = len(made.log)
        metrics = made.step()
        log = made.log[at:]
        refreshed = next((n for n, line in enumerate(log) if line.startswith("engine refresh")), None)
        waits = [int(line.split()[1]) for line in log[: refreshed or 0] if line.startswith("wait")]
        assert all(uid in done_before for uid in waits), "it waited for what was under way"
        rollouts = engine.drawn[step]
        if "policy/logprob_mismatch" in metrics and metrics["overlap/age"]:
            assert metrics["policy/logprob_mismatch"] == pytest.approx(0.125)
        if "mismatch/logprob_mean" in metrics:
            assert metrics["mismatch/logprob_mean"] == pytest.approx(0.125, rel=0.02)
        version = made.trainer.progress.actor_version
        wholly_N = (rollouts.of_version_NS(version) == rollouts.response_mask_NS()).all(1)
        budget, _ = refresh.observed[-1]
        assert (0 if budget is None else budget.sequences) == int(wholly_N.sum()), (
            "of the present weights' samples alone"
        )
        for handle in engine.under_way:  # the next one may be ready before its step, or not
            if random.random() < 0.5:
                engine.finish(handle)
            else:
                break
        assert metrics["overlap/token_age"] <= metrics["overlap/age"] and 0 <= metrics["overlap/mixed"] <= 1
    assert [uid for uid, _ in engine.begun] == [n * PROMPTS for n in range(steps)]

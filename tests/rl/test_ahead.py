"""Batches that are generated while an earlier one trains: which weights make them, who scores them, what a resumed run asks for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vp2o.config.schema import MismatchConfig, RouterReplay
from megatron_vp2o.core.budget import Budget, RefreshReason
from megatron_vp2o.core.choices import MismatchCorrection
from megatron_vp2o.core.deferred import Deferred, known
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl.mismatch import MismatchControl
from megatron_vp2o.rl.refresh import EveryBatches
from megatron_vp2o.rl.types import Rollouts
from tests.rl.fakes import FakeEngine, FakeRefresh, groups_of, rollouts_of
from tests.rl.test_trainer import GROUP, PROMPTS, Made


@pytest.fixture
def groups() -> Iterator[Groups]:
    with groups_of() as made:
        yield made


class Handle:
    """A batch under way."""

    def __init__(self, engine: AheadEngine, rollouts: Rollouts, uids: list[int]) -> None:
        self.engine, self.rollouts, self.uids = engine, rollouts, uids

    def done(self) -> bool:
        return self not in self.engine.under_way

    def span(self) -> tuple[float, float]:
        return 2.0 * self.uids[0], 2.0 * self.uids[0] + 1.5

    def wait(self) -> Rollouts:
        self.engine.under_way.remove(self)
        self.engine.log.append(f"wait {self.uids[0]}")
        return self.rollouts

    def cancel(self) -> None:
        self.engine.under_way.remove(self)
        self.engine.log.append(f"cancel {self.uids[0]}")


@dataclass
class AheadEngine(FakeEngine):
    """Refuses other weights while it generates, and scores nothing but what its present weights generated."""

    under_way: list[Handle] = field(default_factory=list)
    begun: list[tuple[int, int]] = field(default_factory=list)  # (position of the first prompt, version)

    def begin(self, prompts: Any, uids: Any, sampling: Any, group_size: int = 1) -> Handle:
        rollouts = super().generate(prompts, uids, sampling, group_size)
        self.log[-1] = f"begin {uids[0]}"
        self.begun.append((uids[0], self.version))
        self.under_way.append(Handle(self, rollouts, list(uids)))
        return self.under_way[-1]

    def generate(self, *_: Any, **__: Any) -> Rollouts:
        raise AssertionError("it is asked ahead")

    def refresh(self, version: int) -> None:
        assert not self.under_way, "other weights while it generates"
        super().refresh(version)

    def log_probs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        assert rollouts.weight_version == self.version, "scored by other weights than its own"
        return super().log_probs(rollouts, temperature)


class Meter:
    """Finds a drift that tells the calls apart."""

    def __init__(self) -> None:
        self.reads = 0

    def watch(self, objective: Any) -> Any:
        return objective

    def spent(self) -> Deferred[Budget]:
        self.reads += 1
        return known(Budget(drift=float(self.reads), ess=1.0, sequences=1))


def trained(made: Made) -> list[int]:
    """Which rollouts the first update of each step trained on, by their place among all that were drawn."""
    drawn = made.engine.drawn
    return [
        next(n for n, rollouts in enumerate(drawn) if _holds(rollouts, batch))
        for batch in made.policy.batches
        if batch.row_N is not None and len(batch.row_N)
    ]


def _holds(rollouts: Rollouts, batch: Any) -> bool:
    return bool(torch.equal(rollouts.model_logprobs_NS[batch.row_N], batch.behaviour_logprobs_NS))


REASONS = [None, None, None, RefreshReason.drift, RefreshReason.ess]


@pytest.mark.parametrize("seed", range(25))
def test_any_run_takes_each_batch_once_of_the_weights_of_so_many_steps_before(groups: Groups, seed: int) -> None:
    random = Random(seed)
    steps, minibatches, ahead = random.randrange(1, 10), random.randrange(1, 3), random.randrange(1, 5)
    reasons = [random.choice(REASONS) for _ in range(steps)]
    control = MismatchControl(MismatchConfig(stop_kl=None), groups) if random.random() < 0.5 else None
    refresh = FakeRefresh([], reasons=list(reasons))
    made = Made(
        groups,
        refresh=refresh,
        rollout={"ahead": ahead},
        engine=AheadEngine,
        meter=Meter(),
        mismatch=control,
        rejects={n for n in range(20) if random.random() < 0.15},
        skips={n for n in range(20) if random.random() < 0.15},
        steps=steps,
        minibatches=minibatches,
        filter_uniform_groups=False,
    )
    engine: Any = made.engine
    actors, learner, metrics = [], [], []
    for _ in range(steps):
        learner.append(made.trainer.progress.optimizer_steps)
        metrics.append(made.step())
        actors.append(engine.version)
    assert engine.begun == [(n * PROMPTS, actors[max(0, n - ahead)]) for n in range(steps)]
    assert not engine.under_way and list(dict.fromkeys(trained(made))) == list(range(steps))
    assert [m["overlap/age"] for m in metrics] == [learner[n] - actors[max(0, n - ahead)] for n in range(steps)]
    assert [m["overlap/queued"] for m in metrics] == [float(min(ahead, steps - n - 1)) for n in range(steps)]
    assert all("policy/logprob_mismatch" in m for m in metrics)
    assert all(("mismatch/kl" in m) == (control is not None) for m in metrics)
    own = [actors[max(0, n - ahead)] == actors[n] for n in range(steps)]
    seen = [None if budget is None else budget.drift for budget, _ in refresh.observed]
    assert seen == [float(n + 1) if own[n] else None for n in range(steps)]
    compared = [batch.engine_logprobs_NS is not None for batch in made.policy.batches]
    assert compared == [metrics[n]["overlap/age"] == 0 for n in trained(made)]


def test_without_a_refresh_nothing_is_waited_for_but_the_steps_own_batch(groups: Groups) -> None:
    made = Made(
        groups, refresh=FakeRefresh([], reasons=[None, RefreshReason.drift]), rollout={"ahead": 1}, engine=AheadEngine
    )
    made.step()
    assert made.log[:5] == ["engine refresh 0", "set_anchor", "begin 0", "begin 3", "wait 0"]
    made.log.clear()
    made.step()
    assert made.log[:2] == ["begin 6", "wait 3"]
    made.log.clear()
    made.step()  # its batch was made, and is scored, by the weights that are given up
    refreshed = ["wait 6", "engine log_probs of 5", "engine refresh 2", "set_anchor", "begin 9", "observe_rollouts"]
    assert made.log[: len(refreshed)] == refreshed
    assert "engine log_probs of 5" not in made.log[2:]


@pytest.mark.parametrize("seed", range(12))
def test_a_resumed_run_asks_for_what_was_queued(groups: Groups, seed: int) -> None:
    """With the weights of then, although the actors are due to get others."""
    random = Random(seed)
    steps, cut, interval = 8, random.randrange(1, 8), random.randrange(1, 4)
    rejects = {n for n in range(steps) if random.random() < 0.2}

    def run() -> Made:
        return Made(
            groups,
            refresh=EveryBatches(interval),
            rollout={"ahead": 1},
            engine=AheadEngine,
            rejects=set(rejects),
            steps=steps,
            filter_uniform_groups=False,
        )

    whole, first, second = run(), run(), run()
    lines = [whole.step() for _ in range(steps)]
    for _ in range(cut):
        first.step()
    second.trainer.restore(copy.deepcopy(vars(first.trainer.progress)))
    for name in ("version", "weights", "drawn"):  # what a checkpoint, and equal draws, bring back
        setattr(second.engine, name, copy.copy(getattr(first.engine, name)))
    second.engine.drawn = second.engine.drawn[:cut]
    second.policy.weights, second.policy.stepped = first.policy.weights, first.policy.stepped
    second.stepper.calls = first.stepper.calls
    rest = [second.step() for _ in range(steps - cut)]
    first_engine, second_engine, engine = (made.engine for made in (first, second, whole))
    assert second_engine.begun == engine.begun[cut:]  # type: ignore[attr-defined]
    assert first_engine.begun == engine.begun[: cut + 1]  # type: ignore[attr-defined]
    for line, wanted in zip(rest, lines[cut:], strict=True):
        assert _timeless(line) == _timeless(wanted)


def _timeless(line: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in line.items() if not key.startswith("time/") and not key.endswith("_s")}


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_actors_are_refreshed_before_a_batch_would_be_too_old(groups: Groups, most: int) -> None:
    made = Made(groups, refresh=FakeRefresh([]), rollout={"ahead": 1, "max_age": most}, engine=AheadEngine)
    metrics = [made.step() for _ in range(9)]
    ages = [m["overlap/age"] for m in metrics]
    assert max(ages) == most and all(m["overlap/again"] == 0 for m in metrics)
    assert metrics[-1]["actor/refreshes_max_age"] > 0


def test_a_batch_that_is_too_old_all_the_same_is_generated_again(groups: Groups) -> None:
    """A run is resumed with a lower bound than it had."""
    made = Made(groups, refresh=FakeRefresh([]), rollout={"ahead": 1}, engine=AheadEngine)
    for _ in range(4):
        made.step()
    made.trainer.config.rollout.max_age = 2
    made.log.clear()
    metrics = made.step()
    # The queued batch is of version 0 and four steps old: it is waited for, because the actors change, and left out.
    assert made.log[:6] == [
        "wait 12",
        "engine log_probs of 5",
        "engine refresh 4",
        "set_anchor",
        "begin 15",
        "begin 12",
    ]
    assert made.engine.begun[-2:] == [(15, 4), (12, 4)]  # type: ignore[attr-defined]
    assert metrics["overlap/again"] == PROMPTS * GROUP and metrics["overlap/age"] == 0
    assert trained(made)[-1] == 6 and made.step()["overlap/again"] == PROMPTS * GROUP


def test_a_run_that_ends_leaves_nothing_under_way(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(groups, rollout={"ahead": 1}, engine=AheadEngine)

    def fails(*_: Any) -> Any:
        if made.trainer.progress.step == 2:
            raise ValueError("in training")
        return made.policy.__class__.accumulate_gradients(made.policy, *_)

    monkeypatch.setattr(made.policy, "accumulate_gradients", fails)
    monkeypatch.setattr(made.trainer, "evaluate", lambda final: {})
    with pytest.raises(ValueError, match="in training"):
        made.trainer.run()
    engine: Any = made.engine
    assert not engine.under_way and made.log[-1] == "cancel 9"


class Stored(Handle):
    """A batch under way, and the name of what was asked for."""

    asked: tuple[int, str]
    said: dict[str, Any] | None = None

    def wait(self) -> Rollouts:
        if self in self.engine.under_way:
            super().wait()
            self.engine.disk[self.asked] = self  # type: ignore[attr-defined]
        return self.rollouts


@dataclass
class RecallingEngine(AheadEngine):
    """Keeps what was waited for on a disk, which outlives it."""

    disk: dict[tuple[int, str], Stored] = field(default_factory=dict)

    def begin(self, prompts: Any, uids: Any, sampling: Any, group_size: int = 1) -> Stored:
        kept = self.disk.get((uids[0], str(self.version)))
        if kept is not None:
            self.log.append(f"found {uids[0]}")
            return kept
        self.begun.append((uids[0], self.version))
        generator = torch.Generator().manual_seed(100 * uids[0] + self.version)
        rollouts = rollouts_of(generator, len(prompts) * group_size, version=self.version)
        handle = Stored(self, rollouts, list(uids))
        handle.asked = uids[0], str(self.version)
        self.under_way.append(handle)
        return handle

    def asked_of(self, generating: Any) -> str:
        return str(generating.asked[1])

    def recall(self, prompts: Any, uids: Any, sampling: Any, group_size: int, weights: str) -> Any:
        kept = self.disk.get((uids[0], weights))
        return None if kept is None else (kept, kept.said)

    def note(self, generating: Any, arrays: dict[str, Any]) -> None:
        assert generating.asked in self.disk, "its rollouts are not on the disk yet"
        generating.said = arrays


def test_a_resumed_run_has_the_batches_of_weights_that_nobody_has_any_more(groups: Groups) -> None:
    """With what those weights said of them. From a checkpoint before the moment at which the run was killed."""
    recalled = sum(_resumed_with_a_disk(groups, Random(seed)) for seed in range(25))
    assert recalled >= 15


def _resumed_with_a_disk(groups: Groups, random: Random) -> int:
    """One run, and one that goes on; both are alike. Returns how many batches of earlier weights were queued."""
    steps, ahead, interval = 9, random.randrange(2, 5), random.randrange(1, 4)
    saved = random.randrange(1, steps)
    killed = random.randrange(saved, steps)
    replay = random.choice([RouterReplay.off, RouterReplay.R2])
    settings = MismatchConfig(correction=random.choice(list(MismatchCorrection)), stop_kl=None)

    def run() -> Made:
        made = Made(
            groups,
            refresh=EveryBatches(interval),
            rollout={"ahead": ahead},
            replay=replay,
            engine=RecallingEngine,
            mismatch=MismatchControl(settings, groups),
            steps=steps,
            filter_uniform_groups=False,
        )
        made.engine.mismatch = 0.125
        return made

    whole, first, second = run(), run(), run()
    lines = [whole.step() for _ in range(steps)]
    for number in range(killed):
        if number == saved:
            checkpoint = copy.deepcopy(vars(first.trainer.progress)), *states(first)
        first.step()
    if killed == saved:  # at once
        checkpoint = copy.deepcopy(vars(first.trainer.progress)), *states(first)
    second.trainer.restore(copy.deepcopy(checkpoint[0]))
    for part, state in zip((second.engine, second.policy, second.stepper), checkpoint[1:], strict=True):
        vars(part).update(state)
    second.engine.disk = first.engine.disk  # type: ignore[attr-defined]
    rest = [second.step() for _ in range(steps - saved)]
    for line, wanted in zip(rest, lines[saved:], strict=True):
        assert _timeless(line) == _timeless(wanted)
    for batch, wanted_batch in zip(second.policy.batches, whole.policy.batches[saved:], strict=True):
        for name, tensor in vars(wanted_batch).items():
            same = getattr(batch, name)
            assert torch.equal(same, tensor) if isinstance(tensor, Tensor) else same == tensor, name
    assert all(line["overlap/again"] == 0 for line in rest)
    queued = checkpoint[0]["extra"]["queued"]
    return sum(version != checkpoint[0]["actor_version"] for version, _ in queued)


def states(made: Made) -> list[dict[str, Any]]:
    """What a checkpoint brings back of the stand-ins."""
    return [
        {name: getattr(made.engine, name) for name in ("version", "weights")},
        {name: getattr(made.policy, name) for name in ("weights", "stepped")},
        {"calls": made.stepper.calls},
    ]


def test_what_earlier_actors_generated_and_is_not_on_disk_is_generated_again(groups: Groups) -> None:
    def run() -> Made:
        return Made(groups, refresh=EveryBatches(1), rollout={"ahead": 3}, engine=RecallingEngine, steps=9)

    first, second = run(), run()
    for _ in range(4):
        first.step()
    second.trainer.restore(copy.deepcopy(vars(first.trainer.progress)))
    vars(second.engine).update(states(first)[0])
    metrics = [second.step() for _ in range(5)]
    # Three are queued: two of earlier weights, and one of the present ones, which is no loss.
    assert second.engine.begun[:3] == [(12, 3), (15, 3), (18, 3)]  # type: ignore[attr-defined]
    assert [m["overlap/again"] for m in metrics] == [2 * PROMPTS * GROUP] * 5
    assert {n for n, _ in second.engine.begun} == {3 * n for n in range(4, 9)}  # type: ignore[attr-defined]

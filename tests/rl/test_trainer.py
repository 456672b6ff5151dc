"""One reinforcement-learning step with stand-ins for policy, engine and task: who is called when, and with what."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import torch

from megatron_vp2o.config.schema import (
    GRPOConfig,
    KLReference,
    RewardConfig,
    RolloutConfig,
    RouterReplay,
    SamplingConfig,
    TrainConfig,
)
from megatron_vp2o.core.budget import RefreshReason
from megatron_vp2o.core.deferred import Deferred, known
from megatron_vp2o.errors import SyncError
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl.loop import Stopwatch
from megatron_vp2o.rl.objectives import OnRollouts, policy_objective
from megatron_vp2o.rl.refresh import EveryBatches
from megatron_vp2o.rl.trainer import RLTrainer
from megatron_vp2o.rl.types import Split, TrainBatch
from tests.rl.fakes import (
    FakeCheckpointer,
    FakeEngine,
    FakePolicy,
    FakeRefresh,
    FakeSink,
    FakeStepper,
    FakeTask,
    groups_of,
)

PROMPTS, GROUP = 3, 4
ROWS = PROMPTS * GROUP


@pytest.fixture
def groups() -> Iterator[Groups]:
    with groups_of() as made:
        yield made


@dataclass
class Samples:
    """Wants samples of steps that `every` divides."""

    every: int
    prompts: int = 2
    responses: int = 3
    written: list[tuple[int, list[Any]]] = field(default_factory=list)

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def write(self, step: int, samples: Any) -> None:
        self.written.append((step, list(samples)))


class Made:
    """A trainer and its stand-ins."""

    def __init__(
        self,
        groups: Groups,
        *,
        rejects: set[int] = frozenset(),  # type: ignore[assignment]
        skips: set[int] = frozenset(),  # type: ignore[assignment]
        refresh: Any = None,
        samples: Samples | None = None,
        right: str | None = None,
        reward: RewardConfig | None = None,
        kl_reference: KLReference = KLReference.none,
        reference: bool = False,
        replay: RouterReplay = RouterReplay.off,
        rollout: dict[str, Any] | None = None,
        engine: type[FakeEngine] = FakeEngine,
        meter: Any = None,
        mismatch: Any = None,
        **settings: Any,
    ) -> None:
        settings = {"prompts_per_step": PROMPTS, "group_size": GROUP, "steps": 9, "micro_batch_size": 5, **settings}
        algorithm = GRPOConfig(kl_reference=kl_reference, **settings)
        config = TrainConfig(
            algorithm=algorithm,
            reward=reward or RewardConfig(),
            rollout=RolloutConfig(
                sampling=SamplingConfig(temperature=0.8, top_p=0.9, max_new_tokens=8),
                router_replay=replay,
                **(rollout or {}),
            ),
            seed=7,
        )
        self.log: list[str] = []
        self.task = FakeTask({Split.train: 10, Split.validation: 4, Split.test: 4})
        if right is not None:
            self.task.right = right
        self.policy = FakePolicy(self.log, skips=skips)
        self.engine = engine(self.log, self.policy)
        self.stepper = FakeStepper(self.log, self.policy, rejects=rejects)
        self.refresh = refresh or FakeRefresh(self.log)
        self.trainer = RLTrainer(
            config,
            groups,
            FakeSink(self.log),
            FakeCheckpointer(self.log),
            task=self.task,
            policy=self.policy,
            engine=self.engine,
            objective=OnRollouts(policy_objective(algorithm)),
            refresh=self.refresh,
            reference=FakeEngine(self.log, name="reference") if reference else None,
            transform=self.transform,
            stepper=self.stepper,
            samples=samples,
            meter=meter,
            mismatch=mismatch,
        )

    def transform(self) -> Deferred[dict[str, float]]:
        self.log.append("transform")
        return known({"stein/self_weight": 0.5})

    def step(self) -> dict[str, float]:
        """The next step, as the loop takes it."""
        progress = self.trainer.progress
        metrics = self.trainer.step(progress.step, Stopwatch())
        progress.step += 1
        return metrics


UPDATE = ["begin", "accumulate_gradients", "transform", "gradient_norm"]


def test_a_step_calls_its_parts_in_order(groups: Groups) -> None:
    made = Made(groups, minibatches=2, epochs=2, reference=True, kl_reference=KLReference.initial)
    made.step()
    scored = [f"reference log_probs of {ROWS}"]
    first = ["engine refresh 0", "set_anchor", "engine generate", *scored, "observe_rollouts", *UPDATE * 4]
    # no update compared its log-probabilities with the engine's: the engine scores some of its own rollouts
    assert made.log == [*first, "engine log_probs of 5", "observe"]
    made.log.clear()
    made.step()  # the actors keep their weights
    assert made.log == ["engine generate", *scored, "observe_rollouts", *UPDATE * 4, "engine log_probs of 5", "observe"]


def test_the_reference_scores_the_rollouts_unless_it_is_their_own_actor(groups: Groups) -> None:
    for kind in KLReference:
        made = Made(groups, kl_reference=kind, reference=kind is KLReference.initial)
        if made.trainer.reference is not None:
            made.trainer.reference.mismatch = 0.5  # type: ignore[attr-defined]
        made.step()
        (batch,) = made.policy.batches
        assert ("reference log_probs of 12" in made.log) == (kind is KLReference.initial)
        if kind is KLReference.none:
            assert batch.reference_logprobs_NS is None
        else:
            assert batch.reference_logprobs_NS is not None and batch.behaviour_logprobs_NS is not None
            change_NS = (batch.reference_logprobs_NS - batch.behaviour_logprobs_NS)[batch.loss_mask_NS]
            torch.testing.assert_close(
                change_NS, torch.full_like(change_NS, 0.5 if kind is KLReference.initial else 0.0)
            )


def test_the_trainers_own_routes_are_replayed_but_not_by_the_reference(groups: Groups) -> None:
    for replay in RouterReplay:
        made = Made(groups, kl_reference=KLReference.initial, reference=True, replay=replay)
        seen: list[Any] = []
        reference: Any = made.trainer.reference
        plain = reference.log_probs

        def watched(rollouts: Any, temperature: float, plain: Any = plain, seen: list[Any] = seen) -> Any:
            seen.append(rollouts.routes_NSLK)
            return plain(rollouts, temperature)

        reference.log_probs = watched
        made.step()
        (batch,) = made.policy.batches
        assert seen == [None]
        if replay is RouterReplay.R2:  # the engine of this test gives none itself, as R3 asks it to
            assert batch.routes_NSLK is not None and torch.equal(batch.routes_NSLK[:, :, 0, 0], batch.tokens_NS)
        else:
            assert batch.routes_NSLK is None


def test_the_engine_is_asked_for_the_steps_prompts(groups: Groups) -> None:
    made = Made(groups, refresh=EveryBatches(1))
    for step in range(5):
        made.step()
        prompts, uids, sampling, group_size = made.engine.asked[-1]
        positions = list(range(step * PROMPTS, (step + 1) * PROMPTS))
        assert uids == positions and group_size == GROUP
        problems, _ = made.trainer.prompts(step * PROMPTS)
        assert prompts == [made.task.tokenizer.encode(problem.prompt) for problem in problems]
        assert vars(sampling) == {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 8, "seed": 7}
    texts = [made.task.tokenizer.decode(prompt) for asked in made.engine.asked for prompt in asked[0]]
    assert sorted(texts[:10]) == [f"{i}.0=" for i in range(10)] and {t[1:] for t in texts[10:]} == {".1="}


@pytest.mark.parametrize("seed", range(10))
def test_a_rejected_step_ends_the_batch_and_refreshes_the_actors(groups: Groups, seed: int) -> None:
    random = Random(seed)
    minibatches, epochs = random.randrange(1, 4), random.randrange(1, 3)
    updates = minibatches * epochs
    rejected = random.randrange(updates)
    refresh = EveryBatches(100)
    made = Made(groups, refresh=refresh, rejects={rejected}, minibatches=minibatches, epochs=epochs)
    metrics = made.step()
    assert made.log.count("gradient_norm") == rejected + 1, "the rest of the batch is dropped"
    assert made.trainer.progress.optimizer_steps == made.policy.weights == rejected
    assert metrics["optimizer/steps"] == rejected and metrics["actor/version"] == 0
    made.log.clear()
    metrics = made.step()
    assert made.log[:2] == [f"engine refresh {rejected}", "set_anchor"] and made.engine.version == rejected
    assert metrics["actor/refreshes_rejected"] == 1 and metrics["actor/refreshes_start"] == 1
    assert metrics["actor/refreshes"] == 2 and metrics["actor/age"] == 1
    assert metrics["optimizer/steps"] == rejected + updates
    made.log.clear()
    assert made.step()["actor/age"] == 2 and not any("refresh" in call for call in made.log)


def test_the_refresh_policy_sees_each_batch_and_its_reason_is_counted(groups: Groups) -> None:
    refresh = FakeRefresh([], reasons=[None, RefreshReason.drift, None, RefreshReason.drift, RefreshReason.ess])
    made = Made(groups, refresh=refresh, rejects={3})
    metrics = [made.step() for _ in range(6)]
    assert refresh.ages == [1, 2, 1, 2, 1], "the first refresh asks nobody"
    assert [rejected for _, rejected in refresh.observed] == [n == 3 for n in range(6)]
    assert [m["actor/age"] for m in metrics] == [1, 2, 1, 2, 1, 1]
    assert [m["actor/refreshes_drift"] for m in metrics] == [0, 0, 1, 1, 2, 2]
    assert [m["actor/version"] for m in metrics] == [0, 0, 2, 2, 3, 4]
    assert metrics[-1]["actor/refreshes"] == 4 and metrics[-1]["actor/refreshes_ess"] == 1
    state = copy.deepcopy(vars(made.trainer.progress))
    resumed = Made(groups, refresh=FakeRefresh([]))
    resumed.trainer.restore(state)
    assert len(resumed.refresh.observed) == 6, "the refresh policy's state is part of the checkpoint"


def test_an_engine_that_did_not_take_the_weights_ends_the_run(groups: Groups) -> None:
    made = Made(groups, refresh=EveryBatches(1))
    made.step()
    made.engine.policy = FakePolicy([])  # it reads the weights of somebody else
    with pytest.raises(SyncError, match="did not take the weights of version 1"):
        made.step()
    assert made.log.count("engine generate") == 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rank", [0, 1])
def test_row_numbers_are_those_of_all_ranks_rollouts(seed: int, rank: int) -> None:
    """Whatever groups are left out; minibatches of the ranks are made of them."""
    random = Random(seed)
    filtered, masked, minibatches = random.random() < 0.5, random.random() < 0.5, random.randrange(1, 4)
    right = "".join(random.sample([chr(32 + n) for n in range(ROWS)], random.randrange(1, 4)))
    with groups_of(rank, 2) as groups:
        made = Made(
            groups,
            prompts_per_step=2 * PROMPTS,
            right=right,
            filter_uniform_groups=filtered,
            minibatches=minibatches,
            reward=RewardConfig(mask_truncated=masked),
        )
        made.step()
    (rollouts,) = made.engine.drawn
    assert len(rollouts.total_len_N) == ROWS
    correct = [rollouts.response(n)[0] in made.task.tokenizer.encode(right) for n in range(ROWS)]
    keep = []
    for n in range(ROWS):
        group = correct[n // GROUP * GROUP : (n // GROUP + 1) * GROUP]
        mixed = 0 < sum(group) < GROUP
        keep += [n] if (mixed or not filtered) and (rollouts.finished_N[n] or not masked) else []
    rows = [row_of(made, batch, n) for batch in made.policy.batches for n in range(len(batch.length_N))]
    assert sorted(rows) == [rank * ROWS + n for n in keep]
    assert len(made.policy.batches) == minibatches


def row_of(made: Made, batch: TrainBatch, n: int) -> int:
    """The number of a batch's row; its tokens say which rollout of this rank it is."""
    assert batch.row_N is not None and batch.advantages_N is not None
    rollout = int(batch.tokens_NS[n, 0]) - 3
    assert int(batch.row_N[n]) % ROWS == rollout
    text = made.task.tokenizer.decode([3 + rollout])
    assert (batch.advantages_N[n] > 0) == (text in made.task.right) or batch.advantages_N[n] == 0
    return int(batch.row_N[n])


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_the_engines_log_probabilities_are_compared_only_while_it_has_the_learners_weights(
    groups: Groups, interval: int
) -> None:
    made = Made(groups, refresh=EveryBatches(interval))
    for _ in range(7):
        made.step()
    fresh = [batch.engine_logprobs_NS is not None for batch in made.policy.batches]
    assert fresh == [step % interval == 0 for step in range(7)]
    for batch, rollouts in zip(made.policy.batches, made.engine.drawn, strict=True):
        if batch.engine_logprobs_NS is not None:
            assert batch.row_N is not None
            assert torch.equal(batch.engine_logprobs_NS, rollouts.model_logprobs_NS[batch.row_N])
    # steps that were skipped or rejected left the learner where the actors are
    for idle in (Made(groups, skips={0, 1, 2}), Made(groups, rejects={0, 1, 2})):
        for _ in range(5):
            idle.step()
        expected = [True, True, True, True, False]
        assert [batch.engine_logprobs_NS is not None for batch in idle.policy.batches] == expected


def test_the_mismatch_is_the_updates_own_or_is_measured(groups: Groups) -> None:
    made = Made(groups)
    made.engine.mismatch = 0.125
    assert made.step()["policy/logprob_mismatch"] == pytest.approx(0.125)
    made.policy.reports = {"logprob_mismatch": 0.375}
    made.log.clear()
    assert made.step()["policy/logprob_mismatch"] == 0.375
    assert not any("log_probs" in call for call in made.log), "nothing is scored twice"


@pytest.mark.parametrize("every", [1, 2, 4])
def test_samples_are_written_when_they_are_due(groups: Groups, every: int) -> None:
    samples = Samples(every)
    made = Made(groups, samples=samples)
    for _ in range(5):
        made.step()
    assert [step for step, _ in samples.written] == [step for step in range(1, 6) if step % every == 0]
    for step, written in samples.written:
        prompts = [made.task.tokenizer.decode(prompt) for prompt in made.engine.asked[step - 1][0]]
        assert [sample["prompt"] for sample in written] == prompts[:2]
        assert [len(sample["responses"]) for sample in written] == [3, 3]
        rewards = {
            (r["correct"], r["reward"], r["text"][:1] in made.task.right) for s in written for r in s["responses"]
        }
        assert rewards <= {(True, 1.0, True), (False, 0.0, False)} and len(rewards) == 2


def test_a_step_reports_what_it_saw(groups: Groups) -> None:
    made = Made(groups, minibatches=2, refresh=EveryBatches(1))
    watch = Stopwatch()
    metrics = made.trainer.step(0, watch)
    (rollouts,) = made.engine.drawn
    length_N = rollouts.total_len_N - rollouts.prompt_len_N
    assert metrics["rollout/response_length"] == pytest.approx(length_N.double().mean().item())
    assert metrics["rollout/truncated"] == pytest.approx(1 - rollouts.finished_N.double().mean().item())
    assert metrics["reward/mean"] == 0.5 and metrics["rollout/groups_filtered"] == 0.0  # every other row is right
    assert metrics["time/rollout_tokens_per_s"] == pytest.approx(int(length_N.sum()) / watch.seconds["rollout"])
    assert metrics["time/tokens_per_s"] == pytest.approx(int(length_N.sum()) / watch.seconds["train"])
    assert metrics["stein/self_weight"] == 0.5 and metrics["optimizer/lr"] == 0.5
    assert metrics["optimizer/steps"] == 2 and metrics["optimizer/grad_norm"] == 2.0
    progress = made.trainer.progress
    assert (progress.samples, progress.tokens, progress.optimizer_steps) == (ROWS, int(length_N.sum()), 2)
    assert watch.seconds.keys() == {"sync", "rollout", "reference", "reward", "train"}


def test_a_step_without_a_signal_takes_no_step(groups: Groups) -> None:
    made = Made(groups, right="")  # nobody is right
    metrics = made.step()
    assert metrics["rollout/groups_filtered"] == PROMPTS and metrics["optimizer/skipped"] == 1
    assert made.policy.weights == 0 and "policy/loss" not in metrics and "optimizer/grad_norm" not in metrics
    assert made.trainer.progress.empty_in_a_row == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_resumed_run_goes_on_with_the_next_prompt(groups: Groups, seed: int) -> None:
    """Also one that takes another number of prompts a step."""
    random = Random(seed)
    before, after = random.randrange(1, 5), random.randrange(1, 5)
    first, second = Made(groups, prompts_per_step=before), Made(groups, prompts_per_step=after)
    for _ in range(3):
        first.step()
    second.trainer.restore(copy.deepcopy(vars(first.trainer.progress)))
    second.step()
    second.step()
    seen = [uid for made in (first, second) for asked in made.engine.asked for uid in asked[1]]
    assert seen == list(range(3 * before + 2 * after))

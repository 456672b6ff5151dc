"""The reinforcement-learning step, blind to Megatron and to the engine.

    rollouts (`ahead.py`) -> log-probabilities under the reference -> shaped rewards -> advantages -> batch
      -> forward and backward -> gradient transform -> optimizer step (accepted | halved | rejected)
      -> budget verdict (keep the actors | refresh them) -> metrics

Shape legend: P prompts of this data-parallel rank, G rollouts of one prompt, N = P * G, S padded sequence length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_vp2o.config.schema import GRPOConfig, KLReference, RouterReplay, TrainConfig
from megatron_vp2o.core.budget import Budget, RefreshReason
from megatron_vp2o.core.deferred import Deferred, known, read
from megatron_vp2o.parallel.groups import Groups, any_rank, max_scalars, sum_scalars
from megatron_vp2o.rl.ahead import Queued, RolloutQueue, Scored, token_ages
from megatron_vp2o.rl.batching import PromptSchedule, policy_batch, split
from megatron_vp2o.rl.combine import combine
from megatron_vp2o.rl.control import BudgetMeter, PlainSteps
from megatron_vp2o.rl.evaluate import evaluate_splits
from megatron_vp2o.rl.grading import Grading
from megatron_vp2o.rl.interfaces import (
    Checkpointer,
    GradientTransform,
    Objective,
    Policy,
    RefreshPolicy,
    RolloutEngine,
    SampleSink,
    Sink,
    Stepper,
    Task,
)
from megatron_vp2o.rl.loop import Stopwatch, TrainingLoop, no_transform
from megatron_vp2o.rl.mismatch import MismatchControl, Recomputed
from megatron_vp2o.rl.rewards import Earned, RewardShaping
from megatron_vp2o.rl.samples import samples_of
from megatron_vp2o.rl.selection import select_tokens
from megatron_vp2o.rl.sync import verify_sync
from megatron_vp2o.rl.types import Problem, Rollouts, SamplingParams, TrainBatch, Verdict

REFRESHES, REFRESH_POLICY = "refreshes", "refresh_policy"  # keys of Progress.extra
POSITION = "position"  # another one: prompts drawn
QUEUED, AGAIN = "queued", "generated_again"  # further ones: [version, weights] of batches not trained on yet; samples


class RLTrainer(TrainingLoop):
    """Group-relative policy optimisation; what varies is the objective, the transform, the stepper and the refresh policy."""

    def __init__(
        self,
        config: TrainConfig,
        groups: Groups,
        sink: Sink,
        checkpointer: Checkpointer,
        *,
        task: Task,
        policy: Policy,
        engine: RolloutEngine,
        objective: Objective,
        refresh: RefreshPolicy,
        reference: RolloutEngine | None = None,
        transform: GradientTransform = no_transform,
        stepper: Stepper | None = None,
        meter: BudgetMeter | None = None,
        samples: SampleSink | None = None,
        mismatch: MismatchControl | None = None,
    ) -> None:
        super().__init__(config, groups, sink, checkpointer)
        assert isinstance(config.algorithm, GRPOConfig)
        self.settings = config.algorithm
        self.task, self.policy, self.engine = task, policy, engine
        self.objective = objective if meter is None else meter.watch(objective)
        self.refresh, self.reference, self.transform = refresh, reference, transform
        self.stepper: Stepper = stepper or PlainSteps(policy)
        self.meter = meter
        self.samples = samples
        self.mismatch = mismatch
        self.rewards = RewardShaping(
            config.algorithm, task.tokenizer, config.reward, longest=config.rollout.sampling.max_new_tokens
        )
        self.sampling = config.rollout.sampling
        self.queue = RolloutQueue(engine, groups, ahead=config.rollout.ahead > 0)
        self.prompts = PromptSchedule(
            task,
            per_step=self.settings.prompts_per_step,
            seed=config.seed,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
        )

    def step(self, step: int, watch: Stopwatch) -> dict[str, float]:
        """One rollout batch and the optimizer steps on it."""
        self._refresh_actors(step, watch)
        with watch("rollout"):
            self._ask(step, self.config.rollout.ahead + 1)
            queued = self._next(step)
        overlap, ages_at = self._overlap(queued), self.progress.optimizer_steps
        with Grading(self.task, queued.problems, self.settings.group_size, self.groups) as grading:
            with watch("rollout"), grading.beside(self.engine):
                rollouts = self.queue.wait(queued)
            with watch("reference"):
                reference_NS = self._score_reference(rollouts)
                scored = self._scored(queued)
            with watch("reward"):
                verdicts = grading.verdicts(rollouts)
                earned, metrics = self._earned(queued.problems, rollouts, verdicts, reference_NS)
        with watch("train"):
            self.stepper.observe_rollouts(scored.rollouts)
            batch = self._batch(queued, scored, earned, reference_NS)
            updates, budgets, rejected = self._update_on(batch, step)
            metrics |= scored.metrics | combine(updates) | self._mismatch(queued, updates)
            metrics |= self._judge_actors(queued, budgets, rejected)
        metrics |= overlap | self._waited(queued) | token_ages(rollouts, ages_at, self.groups)
        self._count(metrics, watch)
        self.progress.extra[POSITION] = self.position(step) + self.settings.prompts_per_step
        return metrics

    def run(self) -> int:
        """See `TrainingLoop.run`. Nothing is asked for any more when it returns, or raises."""
        try:
            status = super().run()
        finally:
            self.queue.abandon()
        if self.queue.ahead:  # the first rank may end the servers then
            any_rank(False, self.groups.world)
        return status

    def _refresh_actors(self, step: int, watch: Stopwatch) -> None:
        """Give the actors new weights, if that is due. What they were asked for before comes from the weights of before."""
        with watch("rollout"):
            self._ask_for_what_was_queued(step)
        with watch("sync"):
            reason = self._refresh_reason()
        if reason is None:
            return
        for place, queued in enumerate(self.queue.batches):
            if self.config.rollout.in_flight_updates and not self.queue.done(queued):
                break  # responses go on with the new weights; later batches have not begun, or are not done either
            with watch("rollout"):
                self.queue.wait(queued)
            with watch("reference"):
                self._scored(queued)
                self._measure_mismatch(queued)
                if place:  # the first one is trained on in this step
                    self.queue.note(queued)
        with watch("sync"):
            self._refresh(reason)

    def _refresh_reason(self) -> RefreshReason | None:
        progress, rollout = self.progress, self.config.rollout
        if self.engine.version < 0:
            return RefreshReason.start
        reason = self.refresh.reason(progress.actor_age)
        if reason is None and rollout.max_age is not None:
            # What is asked for now, when its turn has come.
            age = self._age(progress.actor_version) + rollout.ahead * self.settings.minibatches * self.settings.epochs
            return RefreshReason.max_age if age > rollout.max_age else None
        return reason

    def _age(self, version: int) -> int:
        """Optimizer steps since weights of this version."""
        return self.progress.optimizer_steps - version

    def _refresh(self, reason: RefreshReason) -> None:
        progress = self.progress
        progress.actor_version = progress.optimizer_steps
        self.engine.refresh(progress.actor_version)
        verify_sync(self.policy, self.engine, progress.actor_version, self.groups)
        self.stepper.set_anchor()
        progress.actor_age = 0
        progress.actor_refreshes += 1
        counts = progress.extra.setdefault(REFRESHES, {})
        counts[reason.value] = counts.get(reason.value, 0) + 1

    def position(self, step: int) -> int:
        """Prompts drawn before this step. Kept in checkpoints, because a resumed run may take another number a step."""
        return int(self.progress.extra.get(POSITION, step * self.settings.prompts_per_step))

    def _ask(self, step: int, wanted: int) -> None:
        """Ask for batches until so many are queued, this step's first; none beyond the run's last step."""
        for number in range(step + len(self.queue), min(step + wanted, self.settings.steps)):
            self._ask_for(step, number - step)

    def _ask_for(self, step: int, place: int, *, first: bool = False) -> None:
        """Ask for the batch of that many steps after this one."""
        self.queue.ask(*self._asked(step, place), first=first)

    def _asked(self, step: int, place: int) -> tuple[list[Problem], list[list[int]], list[int], SamplingParams, int]:
        """Problems, prompts and what else an engine is told of the batch of that many steps after this one."""
        problems, uids = self.prompts(self.position(step) + place * self.settings.prompts_per_step)
        sampling = SamplingParams(
            self.sampling.temperature, self.sampling.top_p, self.sampling.max_new_tokens, self.config.seed
        )
        prompts = [problem.prompt_tokens(self.task.tokenizer) for problem in problems]
        return problems, prompts, uids, sampling, self.settings.group_size

    def _ask_for_what_was_queued(self, step: int) -> None:
        """In a run that goes on: batches of the actors' present weights are asked for again, and are on disk if they were waited
        for; those of earlier weights are on disk, or else generated again by the present ones."""
        kept: Any = self.progress.extra.get(QUEUED, [])
        if isinstance(kept, int):  # of a checkpoint before rollout.ahead could be more than 1
            kept = [[self.progress.actor_version, ""]] * kept
        for place in range(len(self.queue), min(self.config.rollout.ahead, len(kept), self.settings.steps - step)):
            version, weights = kept[place]
            if version != self.progress.actor_version:
                if self.queue.recall(*self._asked(step, place), version=version, weights=weights):
                    continue
                if self.config.rollout.replay is None:
                    self._count_again()
            self._ask_for(step, place)

    def _count_again(self) -> None:
        extra = self.progress.extra
        extra[AGAIN] = extra.get(AGAIN, 0) + self.settings.prompts_per_step * self.settings.group_size

    def _next(self, step: int) -> Queued:
        """Take this step's batch out of the queue; one that is older than `rollout.max_age` is generated again, by the present
        actors. These are younger, because they were refreshed otherwise."""
        rollout = self.config.rollout
        age = self._age(self.queue.batches[0].version)
        if rollout.max_age is not None and age > rollout.max_age and rollout.replay is None:
            self.queue.drop_first()
            self._ask_for(step, 0, first=True)
            self._count_again()
        return self.queue.batches.popleft()

    def _overlap(self, queued: Queued) -> dict[str, float]:
        """How a batch came that was asked for before its step; nothing in a run whose batches are not."""
        if not self.queue.ahead:
            self.progress.extra.pop(QUEUED, None)  # of a run that went on without overlap
            return {}
        self.progress.extra[QUEUED] = [[queued.version, queued.weights] for queued in self.queue.batches]
        return {
            "overlap/age": float(self._age(queued.version)),
            "overlap/queued": float(len(self.queue)),
            "overlap/again": float(self.progress.extra.get(AGAIN, 0)),
        }

    def _waited(self, queued: Queued) -> dict[str, float]:
        """Who waited for whom, at the slowest rank. Collective."""
        if not self.queue.ahead:
            return {}
        seconds = {
            "overlap/trainer_waited_s": self.queue.waited_s(),
            "overlap/servers_waited_s": queued.servers_waited_s,
            "overlap/generation_s": queued.generation_s,
        }
        return max_scalars(seconds, self.groups.world)

    def _score_reference(self, rollouts: Rollouts) -> Tensor | None:
        """Log-probabilities of the rollouts' tokens under the reference [N, S]; None in a run without one."""
        if self.settings.kl_reference is KLReference.anchor:
            return rollouts.model_logprobs_NS
        if self.reference is None:
            return None
        # The reference goes its own ways: it is one model, whoever asks, and not one under the actors' routes.
        return self.reference.log_probs(replace(rollouts, routes_NSLK=None), self.sampling.temperature)

    def _scored(self, queued: Queued) -> Scored:
        """What the weights that generated a batch say of it. The first call comes while the actors still have them."""
        if queued.scored is None:
            assert queued.rollouts is not None
            queued.scored = Scored(*self._recompute(queued.rollouts))
        return queued.scored

    def _recompute(self, rollouts: Rollouts) -> tuple[Rollouts, Recomputed | None, dict[str, float]]:
        """What the trainer makes of the rollouts with the weights that generated them: the routes that it will replay (R2), and
        its log-probabilities against the engine's."""
        temperature = self.sampling.temperature
        compared_NS = self._compared(rollouts)
        if compared_NS is not None and not any_rank(bool(compared_NS.any()), self.groups.world):
            return rollouts, None, {}
        logprobs_NS: Tensor | None = None
        if self.config.rollout.router_replay is RouterReplay.R2:
            logprobs_NS, routes_NSLK = self.engine.log_probs_and_routes(rollouts, temperature)
            rollouts = replace(rollouts, routes_NSLK=routes_NSLK)
        if self.mismatch is None:
            return rollouts, None, {}
        if logprobs_NS is None:
            logprobs_NS = self.engine.log_probs(rollouts, temperature)
        return rollouts, *self.mismatch(rollouts, logprobs_NS, compared_NS)

    def _compared(self, rollouts: Rollouts) -> Tensor | None:
        """Tokens of which the actors' present weights can say what the engine did; None: all of them. [N, S]"""
        if not self.config.rollout.in_flight_updates:
            return None
        return rollouts.of_version_NS(self.engine.version)

    def _earned(
        self,
        problems: list[Problem],
        rollouts: Rollouts,
        verdicts: list[list[Verdict]],
        reference_NS: Tensor | None,
    ) -> tuple[Earned, dict[str, float]]:
        """What the rollouts earned, and what that and their lengths say of the batch."""
        earned = self.rewards(verdicts, rollouts, reference_NS)
        self._show(problems, rollouts, verdicts, earned)
        metrics = earned.metrics(self.groups)
        filtered = metrics["rollout/groups_silent"] if self.settings.filter_uniform_groups else 0.0
        return earned, metrics | {"rollout/groups_filtered": filtered} | self._lengths(rollouts)

    def _show(self, problems: list[Problem], rollouts: Rollouts, verdicts: list[list[Verdict]], earned: Earned) -> None:
        step = self.progress.step + 1
        if self.samples is not None and self.samples.due(step):
            tokenizer = self.task.tokenizer
            self.samples.write(step, samples_of(self.samples, tokenizer, problems, rollouts, verdicts, earned))

    def _lengths(self, rollouts: Rollouts) -> dict[str, float]:
        length_N = rollouts.total_len_N - rollouts.prompt_len_N
        sums: dict[str, float | Tensor] = {
            "rollouts": len(length_N),
            "tokens": length_N.sum(),
            "truncated": (~rollouts.finished_N).sum(),
        }
        total = sum_scalars({key: float(value) for key, value in sums.items()}, self.groups.dp)
        return {
            "rollout/response_length": total["tokens"] / total["rollouts"],
            "rollout/truncated": total["truncated"] / total["rollouts"],
            "rollout/tokens": total["tokens"],
        }

    def _batch(self, queued: Queued, scored: Scored, earned: Earned, reference_NS: Tensor | None) -> TrainBatch:
        """The rollouts to train on, with their advantages and what else the objective needs."""
        settings, rollouts, recomputed = self.settings, scored.rollouts, scored.recomputed
        keep_P = earned.signal_P if settings.filter_uniform_groups else torch.ones_like(earned.signal_P)
        keep_N = keep_P.repeat_interleave(settings.group_size)
        if self.config.reward.mask_truncated:
            keep_N &= rollouts.finished_N
        batch = policy_batch(rollouts, earned.advantages_PG.flatten(), keep_N, self.sampling.temperature)
        batch.row_N = (torch.arange(len(keep_N)) + self.groups.dp_rank * len(keep_N))[keep_N]
        if rollouts.versions_NS is not None:
            others_NS = rollouts.response_mask_NS() & ~rollouts.of_version_NS(self.progress.actor_version)
            batch.present_N = ~others_NS.any(1)[keep_N]
        if self._age(queued.version) == 0:
            batch.engine_logprobs_NS = rollouts.model_logprobs_NS[keep_N]
        if reference_NS is not None:
            batch.reference_logprobs_NS = reference_NS[keep_N]
        if recomputed is not None and recomputed.weight_NS is not None:
            # The ratio is to the trainer's own log-probabilities then; what the engine's differ by is in the weights.
            batch.behaviour_logprobs_NS = recomputed.logprobs_NS[keep_N]
            batch.weight_NS = recomputed.weight_NS[keep_N]
        batch.selected_NS = select_tokens(batch, settings, self.groups, seed=self.config.seed + self.progress.step)
        return batch

    def _minibatches(self, batch: TrainBatch, step: int) -> list[TrainBatch]:
        settings = self.settings
        rows = settings.prompts_per_step * settings.group_size
        return [
            part
            for epoch in range(settings.epochs)
            for part in split(batch, settings.minibatches, seed=(self.config.seed, step, epoch), rows=rows)
        ]

    def _update_on(
        self, batch: TrainBatch, step: int
    ) -> tuple[list[dict[str, float]], tuple[Budget, Budget] | None, bool]:
        """Take the optimizer steps on a rollout batch. After a rejected one, drop the rest and return True: the actors are then
        refreshed before the next batch.

        Returns:
            Metrics of each step; where they are measured, the budget of all samples and that of the actors' present weights' alone;
            and whether the last step was rejected.
        """
        updates, transforms, rejected = [], [], False
        for part in self._minibatches(batch, step):
            metrics, transformed, rejected = self._update(part)
            updates.append(metrics)
            transforms.append(transformed)
            if rejected:
                break
        budgets, *seen = read(self._spent(), *transforms)
        return [metrics | more for metrics, more in zip(updates, seen, strict=True)], budgets, rejected

    def _spent(self) -> Deferred[tuple[Budget, Budget] | None]:
        """See `_update_on`. Without in-flight updates a batch is of one version, and so both are the same."""
        if self.meter is None:
            return known(None)
        if self.config.rollout.in_flight_updates:
            return self.meter.spent_by_both().then(lambda budgets: budgets)
        return self.meter.spent().then(lambda budget: (budget, budget))

    def _update(self, batch: TrainBatch) -> tuple[dict[str, float], Deferred[dict[str, float]], bool]:
        """One optimizer step: gradients, their transform, clipping and AdamW, as far as the stepper allows.

        Returns:
            Metrics, those of the transform, which nothing hangs on, and whether the step was rejected.
        """
        self.stepper.begin(batch)
        measured = self.policy.accumulate_gradients(batch, self.objective, self.settings.micro_batch_size)
        transformed = self.transform()
        stats = self.stepper.step(measured)
        self.count_update(stats)
        taken = {"optimizer/lr": stats.lr}
        if stats.tokens:
            taken["optimizer/grad_norm"] = stats.grad_norm
        return stats.metrics | taken, transformed, stats.rejected

    def _judge_actors(self, queued: Queued, budgets: tuple[Budget, Budget] | None, rejected: bool) -> dict[str, float]:
        """Tell the refresh policy what this rollout batch found. What is found of the samples of earlier actors says nothing of the
        present ones."""
        budget, present = budgets or (None, None)
        if self.config.rollout.in_flight_updates:
            present = present if present is not None and present.sequences else None
        elif queued.version != self.progress.actor_version:
            present = None
        self.refresh.observe(present, rejected)
        self.progress.extra[REFRESH_POLICY] = self.refresh.state_dict()
        if budget is None or budget.sequences == 0:
            return {}
        return {"budget/drift": budget.drift, "budget/ess": budget.ess}

    def restore(self, progress: dict[str, Any]) -> None:
        super().restore(progress)
        if REFRESH_POLICY in self.progress.extra:
            self.refresh.load_state_dict(self.progress.extra[REFRESH_POLICY])

    def _mismatch(self, queued: Queued, updates: list[dict[str, float]]) -> dict[str, float]:
        """How far the engine's log-probabilities are from recomputed ones under the same weights.

        With a fresh actor the first update recomputed them anyway; otherwise, or where it had no token, the actor scores some
        of its own rollouts. Absent where there is none.
        """
        if "logprob_mismatch" in updates[0] and updates[0]["tokens"] > 0:
            return {"policy/logprob_mismatch": updates[0]["logprob_mismatch"]}
        return self._measure_mismatch(queued)

    def _measure_mismatch(self, queued: Queued) -> dict[str, float]:
        """By the actors, the first time while they still have the weights that generated the batch."""
        if queued.mismatch is None:
            queued.mismatch = self._mismatch_of_some(self._scored(queued).rollouts)
        return queued.mismatch

    def _mismatch_of_some(self, rollouts: Rollouts) -> dict[str, float]:
        compared_NS = self._compared(rollouts)
        row_N = (
            torch.arange(len(rollouts.total_len_N)) if compared_NS is None else compared_NS.any(1).nonzero().squeeze(1)
        )
        if compared_NS is not None and not any_rank(len(row_N) > 0, self.groups.world):
            return {}
        row_N = row_N[: self.settings.micro_batch_size]
        some = rollouts.rows(row_N)
        difference_NS = (self.engine.log_probs(some, self.sampling.temperature) - some.model_logprobs_NS).abs()
        if compared_NS is not None:
            difference_NS = torch.where(compared_NS[row_N], difference_NS, 0.0)
        difference = difference_NS.amax().item() if some.tokens_NS.numel() else -1.0
        largest = max_scalars({"difference": difference}, self.groups.dp)["difference"]
        return {"policy/logprob_mismatch": largest} if largest >= 0 else {}

    def _count(self, metrics: dict[str, float], watch: Stopwatch) -> None:
        progress = self.progress
        progress.samples += self.settings.prompts_per_step * self.settings.group_size
        progress.actor_age += 1
        metrics |= {
            "optimizer/steps": progress.optimizer_steps,
            "optimizer/skipped": progress.skipped,
            "actor/version": progress.actor_version,
            "actor/age": progress.actor_age,
            "actor/refreshes": progress.actor_refreshes,
            **{f"actor/refreshes_{reason.value}": self._refreshed(reason) for reason in RefreshReason},
            "time/tokens_per_s": metrics.pop("tokens") / watch.seconds["train"],
            "time/rollout_tokens_per_s": metrics.pop("rollout/tokens")
            / (metrics.get("overlap/generation_s") or watch.seconds["rollout"]),
        }

    def _refreshed(self, reason: RefreshReason) -> int:
        counts: dict[str, int] = self.progress.extra.get(REFRESHES, {})
        return counts.get(reason.value, 0)

    def evaluate(self, final: bool) -> dict[str, float]:
        return evaluate_splits(self.engine, self.task, self.config, self.groups, final=final)

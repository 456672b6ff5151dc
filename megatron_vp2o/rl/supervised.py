"""Next-token training on packed documents: the warm-up before reinforcement, and plain pretraining."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vp2o.config.schema import SupervisedConfig, TrainConfig
from megatron_vp2o.data.packing import PackedBatches
from megatron_vp2o.parallel.groups import Groups, sum_scalars
from megatron_vp2o.rl.control import PlainSteps
from megatron_vp2o.rl.interfaces import Checkpointer, GradientTransform, Policy, Sink, Stepper
from megatron_vp2o.rl.loop import Stopwatch, TrainingLoop, no_transform
from megatron_vp2o.rl.objectives import next_token

STREAM = "stream"


def validation_loss(policy: Policy, batches: PackedBatches, micro_batch_size: int, groups: Groups) -> float:
    """Mean negative log-likelihood (nats per token) of the stream's first batch: the same documents every time."""
    batches.load_state_dict({"position": 0, "offset": 0})
    batch = next(batches)
    logprobs_NS = policy.log_probs(batch, micro_batch_size)
    sums = sum_scalars(
        {
            "nll": -float((logprobs_NS * batch.loss_mask_NS).sum()),
            "tokens": float(batch.loss_mask_NS.sum()),
        },
        groups.dp,
    )
    return sums["nll"] / sums["tokens"]


class SupervisedTrainer(TrainingLoop):
    """One optimizer step a step, on the next batch of the stream.

    Args:
        batches: this rank's share of an endless stream.
        held_out: gives the metrics of an evaluation; called with whether it is the run's last.
    """

    def __init__(
        self,
        config: TrainConfig,
        groups: Groups,
        sink: Sink,
        checkpointer: Checkpointer,
        *,
        policy: Policy,
        batches: PackedBatches,
        held_out: Callable[[bool], dict[str, float]],
        transform: GradientTransform = no_transform,
        stepper: Stepper | None = None,
    ) -> None:
        super().__init__(config, groups, sink, checkpointer)
        assert isinstance(config.algorithm, SupervisedConfig)
        self.settings = config.algorithm
        self.policy, self.batches, self.held_out, self.transform = policy, batches, held_out, transform
        self.stepper: Stepper = stepper or PlainSteps(policy)

    def restore(self, progress: dict[str, object]) -> None:
        super().restore(progress)
        self.batches.load_state_dict(self.progress.extra[STREAM])

    def step(self, step: int, watch: Stopwatch) -> dict[str, float]:
        """Forward, backward, transform, optimizer."""
        batch = next(self.batches)
        with watch("train"):
            self.stepper.begin(batch)
            measured = self.policy.accumulate_gradients(batch, next_token, self.settings.micro_batch_size)
            transformed = self.transform()
            stats = self.stepper.step(measured)
        progress = self.progress
        progress.samples += self.settings.global_batch_size
        self.count_update(stats)
        progress.extra[STREAM] = self.batches.state_dict()
        return {
            "supervised/loss": stats.metrics["loss"],
            **{key: value for key, value in stats.metrics.items() if "/" in key},
            **transformed.read(),
            "optimizer/grad_norm": stats.grad_norm,
            "optimizer/lr": stats.lr,
            "optimizer/steps": progress.optimizer_steps,
            "optimizer/skipped": progress.skipped,
            "time/tokens_per_s": stats.tokens / watch.seconds["train"],
        }

    def evaluate(self, final: bool) -> dict[str, float]:
        return self.held_out(final)

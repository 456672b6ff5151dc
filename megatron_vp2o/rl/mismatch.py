"""Mismatch between engine and trainer: measured each step, corrected in the objective, and a reason to stop.

Shape legend: N sequences of this data-parallel rank, S padded sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.config.schema import MismatchConfig
from megatron_vp2o.core.choices import MismatchCorrection
from megatron_vp2o.core.mismatch import LITERATURE, Weights, mismatch, mismatch_sums, mismatch_weights
from megatron_vp2o.errors import DeadRunError
from megatron_vp2o.parallel.groups import Groups, sum_scalars
from megatron_vp2o.rl.types import Rollouts


@dataclass(frozen=True)
class Recomputed:
    """What the trainer says of a rollout batch under the weights that generated it."""

    logprobs_NS: Tensor  # log pi_old, float32
    weight_NS: Tensor | None  # of each token in the objective; None where nothing is corrected


class MismatchControl:
    """Compares the engine's log-probabilities with the trainer's under the same weights.

    Args:
        settings: correction and limit.
        groups: of the run.
    """

    def __init__(self, settings: MismatchConfig, groups: Groups) -> None:
        self.settings, self.groups = settings, groups
        low, high = LITERATURE.get(settings.correction, (0.0, 1.0))
        self.low = low if settings.low is None else settings.low
        self.high = high if settings.high is None else settings.high

    def __call__(
        self, rollouts: Rollouts, recomputed_NS: Tensor, compared_NS: Tensor | None = None
    ) -> tuple[Recomputed, dict[str, float]]:
        """Weights for the objective, and metrics, equal on all ranks. Collective over data-parallel ranks.

        Args:
            recomputed_NS: the trainer's log-probabilities of the rollouts under the weights that generated them.
            compared_NS: bool, tokens that these weights made; None: all of them. For others the engine's log-probabilities stand,
                and their ratio is 1: nobody has the weights that made them.

        Raises:
            DeadRunError: on all ranks: the KL exceeds `stop_kl`, or is no number. No step was taken on these rollouts.
        """
        mask_NS = rollouts.response_mask_NS()
        if compared_NS is None:
            compared_NS = mask_NS
        else:
            recomputed_NS = torch.where(compared_NS, recomputed_NS, rollouts.model_logprobs_NS)
        log_ratio_NS = recomputed_NS - rollouts.model_logprobs_NS
        sums = mismatch_sums(log_ratio_NS, compared_NS).to(self.groups.device)
        if self.groups.dp_size > 1:
            dist.all_reduce(sums, group=self.groups.dp)
        found = mismatch(sums.cpu())
        if found is None:
            return Recomputed(recomputed_NS, None), {}
        self._refuse(found.kl, found.p999, rollouts.weight_version)
        metrics = {
            "mismatch/logprob_mean": found.mean,
            "mismatch/logprob_p99": found.p99,
            "mismatch/logprob_p999": found.p999,
            "mismatch/kl": found.kl,
        }
        if self.settings.correction is MismatchCorrection.none:
            return Recomputed(recomputed_NS, None), metrics
        weights = self._weights(log_ratio_NS, mask_NS)
        total = sum_scalars(
            {
                "weight": float(weights.weight_NS[compared_NS].sum()),
                "cut": float((weights.cut_NS & compared_NS).sum()),
            },
            self.groups.dp,
        )
        metrics |= {"mismatch/weight": total["weight"] / found.tokens, "mismatch/cut": total["cut"] / found.tokens}
        return Recomputed(recomputed_NS, weights.weight_NS), metrics

    def _weights(self, log_ratio_NS: Tensor, mask_NS: Tensor) -> Weights:
        return mismatch_weights(
            log_ratio_NS,
            mask_NS,
            correction=self.settings.correction,
            level=self.settings.level,
            low=self.low,
            high=self.high,
        )

    def _refuse(self, kl: float, p999: float, version: int) -> None:
        limit = self.settings.stop_kl
        if limit is None or kl <= limit:  # a comparison that NaN fails
            return
        raise DeadRunError(
            f"engine and trainer disagree about the model: with the weights of version {version}, KL(engine || trainer) is "
            f"{kl:.3g} nats a token, above algorithm.mismatch.stop_kl={limit:g} (one token in a thousand differs by at least "
            f"{p999:.3g} nats). Nothing was trained on these rollouts. Usual causes: the weights did not arrive whole, the "
            "engine samples with other settings than the run (temperature, top_p, its own log-probability mode), another "
            "precision or router precision. Compare metrics mismatch/* of earlier steps; raise the limit, or set it to null, "
            "only if that much is expected"
        )

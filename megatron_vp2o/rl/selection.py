"""Which tokens of a rollout batch Clip-Cov and KL-Cov treat apart, the same ones in every layout.

The papers' code selects in each micro-batch under the present policy. Here the whole rollout batch of all ranks is looked at
once, under the actors' log-probabilities: then neither layout nor micro-batches matter. Where the actors have the learner's
weights, these are the policy's for the batch's first optimizer step.

Shape legend: N sequences of this data-parallel rank, S positions, k tokens to select.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vp2o.config.schema import GRPOConfig, PolicyLoss
from megatron_vp2o.core.baseline_objectives import covariance
from megatron_vp2o.core.sampling import uniform_N
from megatron_vp2o.parallel.groups import Groups, gather_rows, sum_scalars
from megatron_vp2o.rl.types import TrainBatch


def select_tokens(batch: TrainBatch, settings: GRPOConfig, groups: Groups, *, seed: int) -> Tensor | None:
    """True at the tokens that are treated apart, [N, S]; None where the objective has none. Collective over data-parallel ranks.

    Args:
        batch: with advantages, the actors' log-probabilities, and the global row numbers `row_N`, on which random numbers
            depend, and not on who holds a row.
    """
    if settings.objective not in (PolicyLoss.clip_cov, PolicyLoss.kl_cov):
        return None
    mask_NS, logprobs_NS, advantages_N = batch.loss_mask_NS, batch.behaviour_logprobs_NS, batch.advantages_N
    assert logprobs_NS is not None and advantages_N is not None and batch.row_N is not None
    length_N = mask_NS.sum(dim=1)
    sums = sum_scalars(
        {
            "tokens": float(length_N.sum()),
            "logprob": float(torch.where(mask_NS, logprobs_NS, 0.0).sum(dtype=torch.float64)),
            "advantage": float((advantages_N.double() * length_N).sum()),
        },
        groups.dp,
    )
    tokens = max(sums["tokens"], 1.0)
    covariance_NS = covariance(logprobs_NS, advantages_N, mask_NS, sums["logprob"] / tokens, sums["advantage"] / tokens)
    k = max(1, int(settings.covariance_fraction * sums["tokens"]))
    if settings.objective is PolicyLoss.kl_cov:
        return _largest(covariance_NS, k, groups)
    inside_NS = (covariance_NS > settings.covariance_low) & (covariance_NS < settings.covariance_high)
    chance_NS = uniform_N(seed, batch.row_N[:, None], torch.arange(mask_NS.shape[1]))
    return _largest(torch.where(inside_NS, chance_NS, -torch.inf), k, groups)


def _largest(values_NS: Tensor, k: int, groups: Groups) -> Tensor:
    """True at the k largest finite values over all ranks, and at those equal to the last of them."""
    own_k = torch.full((k,), -torch.inf, dtype=values_NS.dtype)
    top = values_NS.flatten().topk(min(k, values_NS.numel())).values
    own_k[: len(top)] = top
    threshold = gather_rows(own_k.to(groups.device), groups.dp).topk(k).values[-1].cpu()
    return (values_NS >= threshold) & values_NS.isfinite()

"""From verdicts to what the policy is trained on: shaped rewards, and the advantages that follow from them.

    task reward (1 right, 0 wrong, or a composed one) -> repulsion between answers -> punishment of overlong responses
      -> minus beta times the log-ratio to the reference
      -> advantages within the group -> groups without any

A group's rollouts are all on the rank that generated them, so nothing but the means for the record is communicated.

Shape legend: P prompts of this data-parallel rank, G rollouts of one prompt, N = P * G, S padded sequence length.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vp2o.config.schema import (
    AdvantageEstimator,
    AnswerKernel,
    AnswerRepulsion,
    AnswerRepulsionConfig,
    GRPOConfig,
    KLEstimator,
    RewardConfig,
)
from megatron_vp2o.core.advantages import (
    group_relative_advantages,
    maxrl_advantages,
    overlong_punishment,
    pass_at_k_advantages,
    w_reinforce_advantages,
)
from megatron_vp2o.core.answers import (
    count_repulsion,
    edit_kernel,
    embedding_kernel,
    equality_kernel,
    leave_one_out_repulsion,
    ngram_kernel,
    quality_diversity,
    unlikeliness,
)
from megatron_vp2o.core.prior import sequence_log_ratio
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.parallel.groups import Groups, sum_scalars
from megatron_vp2o.rl.grading import response_text
from megatron_vp2o.rl.interfaces import Tokenizer
from megatron_vp2o.rl.types import Rollouts, Verdict

Embedder = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Earned:
    """What this rank's groups of rollouts earned."""

    rewards_PG: Tensor  # the task's
    right_PG: Tensor  # bool
    shaped_PG: Tensor  # float64: what a group's rollouts are compared by
    advantages_PG: Tensor  # float32
    log_ratio_PG: Tensor | None  # of each response to the reference, nats; None where it is no part of the reward
    parts: dict[str, Tensor]  # [P, G] each: summands of a composed reward, and the punishment of overlong responses
    distinct: int  # right answers that differ within their group, all groups together

    @property
    def signal_P(self) -> Tensor:
        """Groups that carry a gradient: not all advantages are zero."""
        return (self.advantages_PG != 0).any(dim=1)

    def metrics(self, groups: Groups) -> dict[str, float]:
        """Means over all ranks' rollouts. Collective over data-parallel ranks."""
        sums: dict[str, float | Tensor] = {
            "groups": len(self.rewards_PG),
            "rollouts": self.rewards_PG.numel(),
            "signal": self.signal_P.sum(),
            "right": self.right_PG.sum(),
            "any": self.right_PG.any(dim=1).sum(),
            "distinct": self.distinct,
            "reward": self.rewards_PG.sum(),
            "square": self.rewards_PG.square().sum(),
            "shaped": self.shaped_PG.sum(),
            "shaped_square": self.shaped_PG.square().sum(),
        }
        if self.log_ratio_PG is not None:
            sums["log_ratio"] = self.log_ratio_PG.sum()
        sums |= {f"part {name}": part_PG.sum() for name, part_PG in self.parts.items()}
        total = sum_scalars({key: float(value) for key, value in sums.items()}, groups.dp)
        mean, shaped = total["reward"] / total["rollouts"], total["shaped"] / total["rollouts"]
        metrics = {
            "reward/mean": mean,
            "reward/std": max(total["square"] / total["rollouts"] - mean**2, 0.0) ** 0.5,
            "reward/shaped_mean": shaped,
            "reward/shaped_std": max(total["shaped_square"] / total["rollouts"] - shaped**2, 0.0) ** 0.5,
            "rollout/pass_rate": total["right"] / total["rollouts"],
            "rollout/pass_any": total["any"] / total["groups"],
            "rollout/distinct": total["distinct"] / total["groups"],
            "rollout/groups_kept": total["signal"],
            "rollout/groups_silent": total["groups"] - total["signal"],
        }
        if self.log_ratio_PG is not None:
            metrics["reward/log_ratio"] = total["log_ratio"] / total["rollouts"]
        for name in self.parts:
            metrics[f"reward/part/{name}"] = total[f"part {name}"] / total["rollouts"]
        return metrics


class RewardShaping:
    """From verdicts to advantages, as `GRPOConfig` and `RewardConfig` say."""

    def __init__(
        self, settings: GRPOConfig, tokenizer: Tokenizer, reward: RewardConfig | None = None, *, longest: int = 0
    ) -> None:
        """
        Args:
            reward: None for a task that verifies itself, without a punishment of overlong responses.
            longest: tokens of the longest response that is possible.
        """
        self.settings, self.tokenizer, self.reward, self.longest = (
            settings,
            tokenizer,
            reward or RewardConfig(),
            longest,
        )
        self._prior = settings.kl_coef > 0 and settings.kl_estimator is KLEstimator.reward
        self._embedder = _load_embedder(settings.answer_repulsion)

    def __call__(
        self, verdicts: Sequence[Sequence[Verdict]], rollouts: Rollouts, reference_logprobs_NS: Tensor | None
    ) -> Earned:
        """Args:
        verdicts: one for each rollout, group by group.
        reference_logprobs_NS: of the rollouts' tokens under the reference; None in a run without one.
        """
        size = self.settings.group_size
        rewards_PG = torch.tensor([[v.reward for v in group] for group in verdicts], dtype=torch.float32).view(-1, size)
        right_PG = torch.tensor([[v.correct for v in group] for group in verdicts], dtype=torch.bool).view(-1, size)
        shaped_PG, log_ratio_PG = self._repelled(rewards_PG, right_PG, verdicts, rollouts), None
        parts = {
            name: torch.tensor([[v.parts.get(name, 0.0) for v in group] for group in verdicts]).view(-1, size)
            for name in self.reward.active()
        }
        if self.reward.overlong_buffer is not None:
            parts["overlong"] = overlong_punishment(
                (rollouts.total_len_N - rollouts.prompt_len_N).view(-1, size),
                longest=self.longest,
                buffer=self.reward.overlong_buffer,
                most=self.reward.overlong_penalty,
            )
            shaped_PG = shaped_PG + parts["overlong"]
        if self._prior:
            assert reference_logprobs_NS is not None
            # The actors' log-probabilities stand for the policy's: they are, while the actors have the learner's weights.
            log_ratio_PG = sequence_log_ratio(
                rollouts.model_logprobs_NS, reference_logprobs_NS, rollouts.response_mask_NS()
            ).view(-1, size)
            shaped_PG = shaped_PG - self.settings.kl_coef * log_ratio_PG
        return Earned(
            rewards_PG,
            right_PG,
            shaped_PG,
            self._advantages(shaped_PG, right_PG),
            log_ratio_PG,
            parts,
            distinct=sum(len({v.canonical for v in group if v.correct}) for group in verdicts),
        )

    def _repelled(
        self, rewards_PG: Tensor, right_PG: Tensor, verdicts: Sequence[Sequence[Verdict]], rollouts: Rollouts
    ) -> Tensor:
        repulsion, shaped_PG = self.settings.answer_repulsion, rewards_PG.double()
        if not verdicts:
            return shaped_PG
        if self.settings.unlikeliness > 0:
            log_likelihood_N = torch.where(rollouts.response_mask_NS(), rollouts.model_logprobs_NS, 0.0).sum(dim=1)
            shaped_PG = unlikeliness(
                shaped_PG, right_PG, log_likelihood_N.view_as(rewards_PG), self.settings.unlikeliness
            )
        if repulsion.form is AnswerRepulsion.none:
            return shaped_PG
        kernel_PGG = self._kernel(verdicts, rollouts)
        if repulsion.form is AnswerRepulsion.quality_diversity:
            return quality_diversity(shaped_PG, kernel_PGG)
        apply = leave_one_out_repulsion if repulsion.form is AnswerRepulsion.leave_one_out else count_repulsion
        return apply(shaped_PG, right_PG, kernel_PGG, repulsion.strength)

    def _advantages(self, shaped_PG: Tensor, right_PG: Tensor) -> Tensor:
        """The one place where an estimator is chosen."""
        settings = self.settings
        match settings.advantage:
            case AdvantageEstimator.group_relative:
                advantages_PG = group_relative_advantages(
                    shaped_PG, normalise_by_std=settings.normalise_by_std, epsilon=settings.advantage_epsilon
                )
                if settings.answer_repulsion.spare_right:
                    return torch.where(right_PG, advantages_PG.clamp(min=0.0), advantages_PG)
                return advantages_PG
            case AdvantageEstimator.w_reinforce:
                return w_reinforce_advantages(shaped_PG, right_PG, positive_weight=settings.positive_weight)
            case AdvantageEstimator.pass_at_k:
                return pass_at_k_advantages(right_PG, k=settings.pass_k)
            case AdvantageEstimator.maxrl:
                return maxrl_advantages(shaped_PG, epsilon=settings.advantage_epsilon)

    def _kernel(self, verdicts: Sequence[Sequence[Verdict]], rollouts: Rollouts) -> Tensor:
        """How alike the answers of each group are, [P, G, G]."""
        settings, size = self.settings.answer_repulsion, self.settings.group_size
        if settings.kernel is AnswerKernel.canonical:
            return equality_kernel(answer_numbers(verdicts))
        if settings.kernel is AnswerKernel.embedding:
            assert self._embedder is not None
            texts = [response_text(self.tokenizer, rollouts.response(n)) for n in range(len(rollouts.total_len_N))]
            return embedding_kernel(self._embedder(texts).view(len(verdicts), size, -1), settings.bandwidth)
        tokens_NS, length_N = responses(rollouts)
        tokens_PGS, length_PG = tokens_NS.view(len(verdicts), size, -1), length_N.view(-1, size)
        if settings.kernel is AnswerKernel.ngram:
            return ngram_kernel(tokens_PGS, length_PG, n=settings.ngram, bandwidth=settings.bandwidth)
        return edit_kernel(tokens_PGS, length_PG, bandwidth=settings.bandwidth)


def answer_numbers(verdicts: Sequence[Sequence[Verdict]]) -> Tensor:
    """A number for each answer, equal within a group for equal canonical forms; wrong answers, which have none, each get
    their own. int64 [P, G]."""
    rows = []
    for group in verdicts:
        numbers: dict[object, int] = {}
        rows.append(
            [
                -1 - g if v.canonical is None else numbers.setdefault(v.canonical, len(numbers))
                for g, v in enumerate(group)
            ]
        )
    return torch.tensor(rows, dtype=torch.int64).view(len(verdicts), -1)


def responses(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """The responses without their prompts, from position 0 on: tokens [N, longest], and the length of each [N]."""
    length_N = rollouts.total_len_N - rollouts.prompt_len_N
    position_S = torch.arange(int(length_N.max()) if len(length_N) else 0)
    index_NS = (rollouts.prompt_len_N[:, None] + position_S).clamp(max=rollouts.tokens_NS.shape[1] - 1)
    return rollouts.tokens_NS.gather(1, index_NS), length_N


def _load_embedder(settings: AnswerRepulsionConfig) -> Embedder | None:
    """The function that `embedder` names. Raises ConfigError."""
    if settings.embedder is None or settings.form is AnswerRepulsion.none:
        return None
    module, _, name = settings.embedder.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"algorithm.answer_repulsion.embedder={settings.embedder} cannot be loaded ({error}): name a function of an "
            "importable module as package.module:function"
        ) from error
    embedder: Embedder = function
    return embedder

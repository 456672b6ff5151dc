"""KL to a reference policy: the estimators, as rewards and as losses.

The target of VP2O is `pi* ~ pi_ref exp(A / beta)`, and `KL(pi || pi*) = -E[A] / beta + KL(pi || pi_ref) + const`. So the
term that is wanted is beta KL(pi || pi_ref) with pi's own gradient. For samples y of pi and `l = log pi(y) - log pi_ref(y)`
of the whole sequence,

    grad KL(pi || pi_ref) = E[l grad log pi(y)]

which is the policy gradient of the reward -l: `sequence_log_ratio` in the reward is exact. As losses on samples, k2 = l^2 / 2
has this gradient for single tokens, and k3 = e^-l - 1 + l has that of KL(pi_ref || pi), another objective with another
fixed point (Tang & Munos, arXiv 2506.09477).

Shape legend: N sequences, S positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vp2o.core.choices import KLEstimator

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here before exponentiation: e^20 = 4.9e8 is far outside any clip range, and finite in float32."""


def sequence_log_ratio(logprobs_NS: Tensor, reference_logprobs_NS: Tensor, mask_NS: Tensor) -> Tensor:
    """`sum_t (log pi(y_t) - log pi_ref(y_t))` over the tokens that count, in nats. float64 [N].

    Its mean over samples of pi is KL(pi || pi_ref) of sequences. Values outside the mask are ignored.

    Example:
        >>> pi_NS, reference_NS = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -4.0]])
        >>> sequence_log_ratio(pi_NS, reference_NS, torch.tensor([[True, True]])).tolist()
        [3.0]
    """
    log_ratio_NS = logprobs_NS.double() - reference_logprobs_NS.double()
    return torch.where(mask_NS, log_ratio_NS, 0.0).sum(dim=1)


def k3(log_ratio_NS: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(q || p) at samples of q from `log p - log q`: `(p / q - 1) - log(p / q)`.

    Constant, so without gradient, where the log-ratio exceeds MAX_LOG_RATIO. From Schulman, "Approximating KL
    divergence", 2020.

    Example:
        >>> k3(torch.tensor([0.5, 1.0, 2.0]).log())  # -0.5 + 0.6931, 0 and 1 - 0.6931, for log 2 = 0.6931
        tensor([0.1931, 0.0000, 0.3069])
    """
    log_ratio_NS = log_ratio_NS.clamp(max=MAX_LOG_RATIO)
    return log_ratio_NS.expm1() - log_ratio_NS


def token_kl_loss(reference_log_ratio_NS: Tensor, estimator: KLEstimator) -> Tensor:
    """The estimate of each token's KL(pi || pi_ref), to be minimised over samples of pi.

    Args:
        reference_log_ratio_NS: `log pi_ref - log pi` of sampled tokens, with pi's gradient.
        estimator: k2, k3 or k3+; what `reward` does is no loss of tokens.

    Raises:
        ValueError: for `reward`.

    Example:
        >>> token_kl_loss(torch.tensor([[-2.0, 0.0]]), KLEstimator.k2).tolist()
        [[2.0, 0.0]]
    """
    if estimator is KLEstimator.reward:
        raise ValueError("kl_estimator=reward belongs into the reward: as a loss it has no expected gradient")
    if estimator is KLEstimator.k3:
        return k3(reference_log_ratio_NS)
    k2_NS = 0.5 * reference_log_ratio_NS.square()
    if estimator is KLEstimator.k2:
        return k2_NS
    return k3(reference_log_ratio_NS.detach()) + k2_NS - k2_NS.detach()

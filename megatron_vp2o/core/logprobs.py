"""Log-probabilities of given tokens and the entropy of the distributions they came from, on one device.

The twin over a vocabulary split between ranks is `parallel/logprobs.py`. Shape legend: V vocabulary; leading dimensions
are free.
"""

from __future__ import annotations

from torch import Tensor


def token_log_probs_and_entropy(
    logits_V: Tensor, targets: Tensor, *, temperature: float, valid_vocab: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets` and entropy (nats) of softmax(logits / temperature), both differentiable.

    Args:
        logits_V: [..., V], finite, any float type; computed in float32.
        targets: [...], int64 ids below `valid_vocab`.
        temperature: positive.
        valid_vocab: ids from here on are padding and have probability zero; None means V.

    Returns:
        Two float32 tensors of shape [...].

    Raises:
        ValueError: if the temperature is not positive (greedy sampling has no density).

    Example:
        >>> import torch
        >>> logprobs, entropy = token_log_probs_and_entropy(torch.zeros(1, 4), torch.tensor([2]), temperature=1.0)
        >>> (round(logprobs.exp().item(), 3), round(entropy.exp().item(), 3))
        (0.25, 4.0)
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need one above 0")
    log_p_V = (logits_V[..., :valid_vocab].float() / temperature).log_softmax(dim=-1)
    entropy = -(log_p_V.exp() * log_p_V).sum(dim=-1)
    return log_p_V.gather(-1, targets[..., None]).squeeze(-1), entropy

"""Drawing tokens, with random numbers that depend on nothing but (seed, sequence, position).

Counter-based: no generator state, so the layout, the order of sequences in a batch and what else is sampled change
nothing. Shape legend: N sequences, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: the increment of splitmix64
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)

MASS_BITS = 40
"""Probabilities are cut to multiples of 2^-40 for drawing: integer sums are exact, so the CDF cannot run backwards
(a parallel floating-point scan may) and a token without mass cannot be drawn."""


def _signed(word: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit word."""
    return word - (1 << 64) if word >> 63 else word


def _mix_int(word: int) -> int:
    """The twin of `_mix` on a Python integer."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        word = ((word ^ (word >> shift)) * multiplier) & _WORD
    return word


def _mix(word: Tensor) -> Tensor:
    """Finaliser of splitmix64 (Steele et al., OOPSLA 2014): a bijection of 64-bit words with full avalanche."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, None), strict=True):
        # int64 shifts are arithmetic; the mask makes them logical
        word = word ^ ((word >> shift) & ((1 << (64 - shift)) - 1))
        if multiplier is not None:
            word = word * _signed(multiplier)
    return word


def _to_open_unit(word: Tensor) -> Tensor:
    """The upper 52 bits as a fraction, half a step up: never 0 or 1, and every value is exact in float64."""
    return (((word >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52


def uniform_N(seed: int, uid_N: Tensor, position: int | Tensor) -> Tensor:
    """One uniform number in the open interval (0, 1) for each (seed, uid, position).

    Args:
        seed: any integer (its low 64 bits count).
        uid_N: int64, a global identity of each sequence.
        position: which draw of the sequence, an integer or an int64 tensor that broadcasts with `uid_N`; so one call
            can make the numbers of all steps, `uniform_N(seed, uid_N[:, None], torch.arange(steps))`.

    Returns:
        float64, shape of `uid_N` and `position` broadcast, on the device of `uid_N`; multiples of 2^-53, equal on every
        device.

    Example:
        >>> together_N, alone_N = uniform_N(0, torch.tensor([8, 3]), position=5), uniform_N(0, torch.tensor([3]), position=5)
        >>> bool(together_N[1] == alone_N[0]), bool(0 < alone_N[0] < 1)
        (True, True)
    """
    key_N = _mix(uid_N * _signed(_GOLDEN) + _signed(_mix_int(seed & _WORD)))
    if isinstance(position, int):
        word_N = key_N + _signed((position + 1) * _GOLDEN & _WORD)
    else:
        word_N = key_N + (position + 1) * _signed(_GOLDEN)
    return _to_open_unit(_mix(word_N))


def _nucleus_mass(mass_NV: Tensor, top_p: float) -> Tensor:
    """`mass_NV`, set to 0 outside the nucleus: the fewest tokens whose mass reaches `top_p` of the whole."""
    sorted_NV, order_NV = mass_NV.sort(dim=-1, descending=True, stable=True)
    reached_NV = sorted_NV.cumsum(dim=-1)
    # A token stays if those before it fall short; the first always does.
    short_NV = reached_NV - sorted_NV < top_p * reached_NV[:, -1:].double()
    return torch.zeros_like(mass_NV).scatter_(-1, order_NV, torch.where(short_NV, sorted_NV, 0))


def sample(
    logits_NV: Tensor, u_N: Tensor, *, temperature: float, top_p: float, valid_vocab: int | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the CDF at `u_N`.

    Args:
        logits_NV: any float type; computed in float32. -inf is allowed, NaN gives an arbitrary valid id and a NaN.
        u_N: uniform numbers in (0, 1), one a row; float64 for full resolution. Not looked at when greedy.
        temperature: of the softmax; 0 takes the most likely token (the first of equals).
        top_p: nucleus (Holtzman et al., arXiv 1904.09751): the fewest most likely tokens with at least this
            probability, after temperature; of equal ones lower ids come first. 1 keeps all.
        valid_vocab: ids from here on are padding and have probability zero; None means V.

    Returns:
        token_N (int64) and logprob_N (float32), its log-probability under the distribution it was drawn from: with
        temperature, renormalised over the nucleus, and 0 when greedy, which is a point mass.

    Raises:
        ValueError: for a negative temperature or a `top_p` outside (0, 1].

    Example:
        >>> logits_NV = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> token_N, logprob_N = sample(logits_NV, torch.tensor([0.7]), temperature=1.0, top_p=1.0)  # CDF: 0.5, 0.75, 1
        >>> token_N.tolist(), round(logprob_N.exp().item(), 3)
        ([1], 0.25)
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or above")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
    logits_NV = logits_NV[:, :valid_vocab]
    if temperature == 0:
        token_N = logits_NV.argmax(dim=-1)
        return token_N, torch.zeros(token_N.shape, device=token_N.device)
    logp_NV = (logits_NV.float() / temperature).log_softmax(dim=-1)
    mass_NV = (logp_NV.exp() * 2.0**MASS_BITS).long()
    whole_N1 = None
    if top_p < 1:
        whole_N1 = mass_NV.sum(dim=-1, keepdim=True)
        mass_NV = _nucleus_mass(mass_NV, top_p)
    cdf_NV = mass_NV.cumsum(dim=-1)
    kept_N1 = cdf_NV[:, -1:]
    # u <= 1 - 2^-53, so u * kept rounds to less than kept: there is always an entry of the CDF beyond the target
    target_N1 = (u_N.double()[:, None] * kept_N1).long()
    # the clamp is for rows of NaN, whose mass is whatever the device makes of it
    token_N1 = torch.searchsorted(cdf_NV, target_N1, right=True).clamp_(max=cdf_NV.shape[1] - 1)
    logprob_N1 = logp_NV.gather(-1, token_N1)
    if whole_N1 is not None:
        logprob_N1 = logprob_N1 - (kept_N1.double() / whole_N1).log().float()
    return token_N1.squeeze(1), logprob_N1.squeeze(1)

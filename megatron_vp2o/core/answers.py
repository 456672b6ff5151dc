"""Rollouts as particles: kernels between the answers of a group, and rewards that push right answers apart.

A kernel says how alike two answers are, between 0 and 1, and is 1 for an answer and itself. Everything is batched over
prompts, or over pairs of answers; nothing loops over pairs.

Shape legend: P prompts, G rollouts of each prompt (the group), S tokens, D embedding size, U distinct n-grams of a group,
M pairs of answers.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORKSPACE = 2**22
"""Most counts of n-grams that are held at a time."""


def equality_kernel(answer_PG: Tensor) -> Tensor:
    """1 where two answers of a group are the same, else 0.

    Args:
        answer_PG: a number for each answer, equal for answers that are the same.

    Returns:
        float64 [P, G, G].

    Example:
        >>> equality_kernel(torch.tensor([[24, 24, 7]])).tolist()
        [[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]
    """
    return (answer_PG[:, :, None] == answer_PG[:, None, :]).double()


def embedding_kernel(embedding_PGD: Tensor, bandwidth: float) -> Tensor:
    """`exp(-d / bandwidth)` with the cosine distance `d = 1 - cos`, at least 0. A zero vector is at distance 1 from all
    others.

    Returns:
        float64 [P, G, G].

    Example:
        >>> kernel_PGG = embedding_kernel(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), bandwidth=0.5)  # cos = 0, so d = 1
        >>> round(kernel_PGG[0, 0, 1].log().item(), 6)
        -2.0
    """
    unit_PGD = torch.nn.functional.normalize(embedding_PGD.double(), dim=-1)
    distance_PGG = (1.0 - unit_PGD @ unit_PGD.transpose(1, 2)).clamp(min=0.0)
    return _of_distance(distance_PGG, bandwidth)


def ngram_kernel(tokens_PGS: Tensor, length_PG: Tensor, *, n: int, bandwidth: float) -> Tensor:
    """`exp(-d / bandwidth)` with d the cosine distance of the counts of token n-grams.

    An answer shorter than n counts as one n-gram, all of it. Counts are exact: nothing is hashed.

    Args:
        tokens_PGS: int64, answers without their prompts, padded on the right with anything.
        length_PG: tokens of each answer.
        n: tokens of an n-gram.

    Returns:
        float64 [P, G, G].

    Example:
        >>> tokens_PGS = torch.tensor([[[1, 2, 3], [1, 2, 4]]])  # one of two bigrams in common: cos = 1/2
        >>> kernel_PGG = ngram_kernel(tokens_PGS, torch.tensor([[3, 3]]), n=2, bandwidth=1.0)
        >>> round(kernel_PGG[0, 0, 1].log().item(), 6)
        -0.5
    """
    _, G, S = tokens_PGS.shape
    position_S = torch.arange(S, device=tokens_PGS.device)
    inside_PGS = position_S < length_PG[..., None]
    padded_PGS = torch.nn.functional.pad(torch.where(inside_PGS, tokens_PGS, -1), (0, n - 1), value=-1)
    gram_PGSn = padded_PGS.unfold(2, n, 1)
    last_PG = (length_PG - n).clamp(min=0)  # where the last n-gram begins
    counts_PGS = (position_S <= last_PG[..., None]).double()
    which_PGS, U = _numbered(gram_PGSn)
    at_once = max(1, WORKSPACE // (G * U))
    kernels_PGG = [
        embedding_kernel(counts.new_zeros((len(which), G, U)).scatter_add_(2, which, counts), bandwidth)
        for which, counts in zip(which_PGS.split(at_once), counts_PGS.split(at_once), strict=True)
    ]
    return torch.cat(kernels_PGG)


def _numbered(gram_PGSn: Tensor) -> tuple[Tensor, int]:
    """A number from 0 on for each n-gram, equal within a group for equal ones [P, G, S]; and U, the most that a group has."""
    P, G, S, n = gram_PGSn.shape
    if P * G * S == 0:
        return gram_PGSn.new_zeros((P, G, S)), 1
    token_PGSn = gram_PGSn - gram_PGSn.min()
    vocabulary = int(token_PGSn.max()) + 1
    # Numbers of (group, tokens so far), with one token more each time. They keep the groups' order.
    which_PGS = torch.arange(P, device=gram_PGSn.device)[:, None, None].expand(P, G, S)
    for i in range(n):
        which_PGS = torch.unique(which_PGS * vocabulary + token_PGSn[..., i], return_inverse=True)[1]
    which_PGS = which_PGS - which_PGS.flatten(1).amin(dim=1)[:, None, None]
    return which_PGS, int(which_PGS.max()) + 1


def edit_kernel(tokens_PGS: Tensor, length_PG: Tensor, *, bandwidth: float) -> Tensor:
    """`exp(-d / bandwidth)` with d the Levenshtein distance over the longer answer's length (0 to 1).

    The time is S steps over `[P G (G - 1) / 2, S]` numbers: for answers of thousands of tokens take another kernel.

    Returns:
        float64 [P, G, G].

    Example:
        >>> tokens_PGS = torch.tensor([[[1, 2], [1, 3]]])  # one substitution in two tokens: d = 1/2
        >>> kernel_PGG = edit_kernel(tokens_PGS, torch.tensor([[2, 2]]), bandwidth=1.0)
        >>> round(kernel_PGG[0, 0, 1].log().item(), 6)
        -0.5
    """
    P, G, _ = tokens_PGS.shape
    first, second = torch.triu_indices(G, G, offset=1, device=tokens_PGS.device)
    distance_M = levenshtein(
        tokens_PGS[:, first].flatten(0, 1),
        length_PG[:, first].flatten(),
        tokens_PGS[:, second].flatten(0, 1),
        length_PG[:, second].flatten(),
    )
    longer_M = torch.maximum(length_PG[:, first], length_PG[:, second]).flatten().clamp(min=1)
    distance_PGG = torch.zeros((P, G, G), dtype=torch.float64, device=tokens_PGS.device)
    distance_PGG[:, first, second] = (distance_M.double() / longer_M).view(P, -1)
    return _of_distance(distance_PGG + distance_PGG.transpose(1, 2), bandwidth)


def levenshtein(a_MS: Tensor, a_length_M: Tensor, b_MS: Tensor, b_length_M: Tensor) -> Tensor:
    """Insertions, deletions and substitutions from each a to its b; int64 [M].

    The usual table, row by row. Within a row `d[j] = min(c[j], d[j-1] + 1)` is `min_{i<=j} (c[i] - i) + j`: a running
    minimum, so that a row is a handful of operations on all pairs at once.

    Example:
        >>> levenshtein(torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.tensor([[1, 3, 0]]), torch.tensor([2])).tolist()
        [1]
    """
    M, S = b_MS.shape
    step = torch.arange(S + 1, device=b_MS.device)
    row_MS = step.expand(M, -1)
    result_M = b_length_M.clone()  # of an empty a
    for i in range(a_MS.shape[1]):
        substituted = row_MS[:, :-1] + (a_MS[:, i : i + 1] != b_MS)
        candidates = torch.cat([row_MS.new_full((M, 1), i + 1), torch.minimum(row_MS[:, 1:] + 1, substituted)], dim=1)
        row_MS = (candidates - step).cummin(dim=1).values + step
        here_M = row_MS.gather(1, b_length_M[:, None]).squeeze(1)
        result_M = torch.where(a_length_M == i + 1, here_M, result_M)
    return result_M


def _of_distance(distance_PGG: Tensor, bandwidth: float) -> Tensor:
    if bandwidth <= 0:
        raise ValueError(f"bandwidth is {bandwidth}; a kernel needs one above 0")
    kernel_PGG = (-distance_PGG / bandwidth).exp()
    kernel_PGG.diagonal(dim1=1, dim2=2).fill_(1.0)
    return kernel_PGG


def right_density(right_PG: Tensor, kernel_PGG: Tensor) -> Tensor:
    """Leave-one-out density of an answer among the group's other right ones:

        rho_i = sum_{j != i} R_j k_ij / max(N - 1, 1),      N = sum_j R_j

    For a right answer it lies between 0 (no other right one is like it) and 1 (all are). float64 [P, G].

    Example:
        >>> kernel_PGG = equality_kernel(torch.tensor([[5, 5, 6]]))
        >>> right_density(torch.tensor([[True, True, True]]), kernel_PGG).tolist()
        [[0.5, 0.5, 0.0]]
    """
    right_PG = right_PG.double()
    other_PGG = kernel_PGG - torch.diag_embed(kernel_PGG.diagonal(dim1=1, dim2=2))
    others_P1 = (right_PG.sum(dim=1, keepdim=True) - 1.0).clamp(min=1.0)
    return (other_PGG @ right_PG[..., None]).squeeze(-1) / others_P1


def leave_one_out_repulsion(rewards_PG: Tensor, right_PG: Tensor, kernel_PGG: Tensor, strength: float) -> Tensor:
    """`r_i = R_i (1 - strength rho_i)` for right answers: the repulsive force of SVGD between samples, `-grad log density`,
    as a reward. Wrong answers keep R_i.

    With R in {0, 1} and strength below 1 every right answer keeps more than a wrong one. float64 [P, G].

    Args:
        rewards_PG: R.
        right_PG: which answers are right.
        kernel_PGG: how alike two answers are.

    Example:
        >>> kernel_PGG = equality_kernel(torch.tensor([[5, 5, 6]]))
        >>> leave_one_out_repulsion(torch.ones(1, 3), torch.tensor([[True, True, True]]), kernel_PGG, strength=0.5).tolist()
        [[0.75, 0.75, 1.0]]
    """
    return rewards_PG.double() * torch.where(right_PG, 1.0 - strength * right_density(right_PG, kernel_PGG), 1.0)


def count_repulsion(rewards_PG: Tensor, right_PG: Tensor, kernel_PGG: Tensor, strength: float) -> Tensor:
    """`r_i = R_i / n_i^strength` for right answers, with `n_i` the right answers like this one, itself included:
    `sum_j 1[j right] k_ij`. Wrong answers keep R_i.

    At strength 1 each class of like answers shares one answer's reward. float64 [P, G].

    Example:
        >>> kernel_PGG = equality_kernel(torch.tensor([[5, 5, 6]]))
        >>> count_repulsion(torch.ones(1, 3), torch.tensor([[True, True, True]]), kernel_PGG, strength=1.0).tolist()
        [[0.5, 0.5, 1.0]]
    """
    alike_PG = (kernel_PGG @ right_PG.double()[..., None]).squeeze(-1)
    return rewards_PG.double() / torch.where(right_PG, alike_PG, 1.0) ** strength


def quality_diversity(rewards_PG: Tensor, kernel_PGG: Tensor) -> Tensor:
    """`r_i = R_i d_i` with `d_i = sum_{j != i} (1 - k_ij) / (G - 1)`, how unlike all other rollouts of its group, right or wrong.

    The product of quality and diversity of DARLING (Li et al., arXiv 2509.02534), whose learnt classifier of likeness is a
    kernel here. A right answer that the whole group gives earns 0. float64 [P, G].

    Example:
        >>> quality_diversity(torch.ones(1, 3), equality_kernel(torch.tensor([[5, 5, 6]]))).tolist()
        [[0.5, 0.5, 1.0]]
    """
    others = max(kernel_PGG.shape[-1] - 1, 1)
    alike_PG = kernel_PGG.sum(dim=2) - kernel_PGG.diagonal(dim1=1, dim2=2)
    return rewards_PG.double() * (1.0 - alike_PG / others)


def unlikeliness(rewards_PG: Tensor, right_PG: Tensor, log_likelihood_PG: Tensor, strength: float) -> Tensor:
    """`r_i = R_i (1 - strength rank_i / G)` for right rollouts, with rank 0 for the group's least likely one and G - 1 for its most
    likely: rare right answers earn more (He et al., arXiv 2506.02355). Equally likely rollouts share the lowest of their
    ranks, so that equal responses earn the same. Wrong ones keep R_i. float64 [P, G].

    Args:
        log_likelihood_PG: of each whole response under the policy.

    Example:
        >>> log_likelihood_PG = torch.tensor([[-1.0, -9.0]])
        >>> unlikeliness(torch.ones(1, 2), torch.tensor([[True, True]]), log_likelihood_PG, strength=0.5).tolist()
        [[0.75, 1.0]]
    """
    rank_PG = (log_likelihood_PG[:, None, :] < log_likelihood_PG[:, :, None]).sum(dim=2)
    factor_PG = 1.0 - strength * rank_PG.double() / rewards_PG.shape[1]
    return rewards_PG.double() * torch.where(right_PG, factor_PG, 1.0)

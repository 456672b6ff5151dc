"""The choices that the method leaves open, as names. No torch here: the configuration reads them too.

Example:
    >>> Kernel("cosine") is Kernel.cosine, KLEstimator("k3+").name
    (True, 'k3+')
"""

from __future__ import annotations

import enum


class Kernel(enum.Enum):
    """How alike two prototypes are, c_ij."""

    projective = "projective"  # (v_i . v_j)^2: blind to the sign, which a singular vector does not have
    cosine = "cosine"  # v_i . v_j


class TemperatureScaling(enum.Enum):
    """How the kernel's temperature falls with the number of experts."""

    log = "log"  # tau_0 / log E: SVGD's bandwidth rule (Liu & Wang 2016, section 5) keeps sum_j K_ij bounded
    sqrt = "sqrt"  # tau_0 / sqrt E
    none = "none"


class Normalisation(enum.Enum):
    """What the field's sums over neighbours are divided by."""

    row = "row"  # sums of kernel weights: each row of w+ and w- adds up to 1
    svgd = "svgd"  # the number of active experts, and w- without the kernel: the field of Liu & Wang (arXiv 1608.04471)


class RepulsionScale(enum.Enum):
    """How large the repulsion is."""

    absolute = "absolute"  # eta times the kernel's gradient
    relative = "relative"  # eta times the norm of the expert's attraction gradient


class Orthogonality(enum.Enum):
    """Which measure of two expert outputs' overlap is penalised (Guo et al., arXiv 2505.22323)."""

    projection = "projection"  # squared length of one output's projection on the other: the paper's equation
    cosine = "cosine"  # squared cosine: free of the outputs' scale


class OrthogonalityScale(enum.Enum):
    """What the coefficient of the orthogonality loss is of."""

    absolute = "absolute"  # the loss
    relative = "relative"  # the loss over its first value, as in Guo et al.'s code: the loss begins at the coefficient


class RatioLength(enum.Enum):
    """How a response's log-ratio is taken over its tokens."""

    mean = "mean"  # length-normalised, as GSPO's
    sum = "sum"


KLEstimator = enum.Enum("KLEstimator", {"reward": "reward", "k2": "k2", "k3": "k3", "k3+": "k3+"})
"""How the KL to the reference enters (docs/method.md). `reward`: the sequence's log-ratio, subtracted from the reward, which
is exact; `k2`: half the squared log-ratio of each token, as a loss; `k3`: Schulman's estimate as a loss, whose gradient is
that of the KL the other way round; `k3+`: the value of k3 with the gradient of k2."""


class AnswerRepulsion(enum.Enum):
    """How a right answer's reward falls with how many of its group say the same."""

    none = "none"
    leave_one_out = "leave_one_out"  # R (1 - strength * density among the group's other right answers)
    count = "count"  # R / (number of right answers alike)^strength
    quality_diversity = "quality_diversity"  # R times the mean distance to the group's other rollouts (DARLING)


class AnswerKernel(enum.Enum):
    """When two answers are alike, from 0 (not at all) to 1 (the same)."""

    canonical = "canonical"  # 1 if the task's canonical forms are equal, else 0
    ngram = "ngram"  # exp(-distance / bandwidth), cosine distance of the counts of token n-grams
    edit = "edit"  # ... Levenshtein distance of the tokens, over the longer one's length
    embedding = "embedding"  # ... cosine distance of embeddings


class AdvantageEstimator(enum.Enum):
    """How rewards of a group become advantages."""

    group_relative = "group_relative"  # (r - mean) / std: GRPO; without the division Dr. GRPO
    w_reinforce = "w_reinforce"  # a small constant for right rollouts, -1 for wrong ones
    pass_at_k = "pass_at_k"  # of the best of k rollouts, analytically
    maxrl = "maxrl"  # (r - mean) / mean


class PolicyLoss(enum.Enum):
    """What is maximised, of each token."""

    vp2o = "vp2o"  # ratio times advantage, unclipped
    grpo = "grpo"  # clipped surrogate (with clip_epsilon_high above clip_epsilon_low: DAPO's clip-higher)
    gspo = "gspo"  # clipped surrogate on the response's length-normalised ratio
    cispo = "cispo"  # REINFORCE weighted by the clipped ratio, which has no gradient
    clip_cov = "clip_cov"  # grpo without the gradient of some tokens of large covariance
    kl_cov = "kl_cov"  # unclipped, with a penalty on the tokens of largest covariance


class MismatchCorrection(enum.Enum):
    """What is done about an engine that computes other log-probabilities than the trainer (`core/mismatch.py`)."""

    none = "none"  # the ratio is taken to the engine's log-probabilities, drift and mismatch in one
    tis = "tis"  # truncated importance sampling
    mis = "mis"  # masked importance sampling
    icepop = "icepop"  # masked from both sides


class MismatchLevel(enum.Enum):
    """Whose ratio is bounded."""

    token = "token"
    sequence = "sequence"  # the product over the response's tokens
    geometric = "geometric"  # its geometric mean over them

"""Settings of the algorithms: supervised training, GRPO and VP2O with its Stein field, trust region and budget. Part of the
schema (`config/schema.py`); what several of them must satisfy together is in `validate_algorithm.py`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Annotated, Optional

from megatron_vp2o.config.ranges import COEFFICIENT, COUNT, DECAY, SHARE, Range
from megatron_vp2o.core.choices import (
    AdvantageEstimator,
    AnswerKernel,
    AnswerRepulsion,
    Kernel,
    KLEstimator,
    MismatchCorrection,
    MismatchLevel,
    Normalisation,
    Orthogonality,
    OrthogonalityScale,
    PolicyLoss,
    RatioLength,
    RepulsionScale,
    TemperatureScaling,
)


class Algorithm(enum.Enum):
    supervised = "supervised"
    grpo = "grpo"
    vp2o = "vp2o"


class KLReference(enum.Enum):
    none = "none"
    initial = "initial"  # the weights the run started from
    anchor = "anchor"  # the actors' weights that generated the rollouts


class ControlMode(enum.Enum):
    off = "off"  # not computed
    monitor = "monitor"  # computed and recorded, never acted upon
    enforce = "enforce"


class PrefixSharing(enum.Enum):
    """Whether the rows of a group share their prompt in training."""

    off = "off"
    on = "on"
    auto = "auto"  # where that leaves at most nine tenths of a step's tokens


class DataSource(enum.Enum):
    task = "task"  # demonstrations of the run's task
    jsonl = "jsonl"  # one JSON object a line with a text field
    indexed = "indexed"  # Megatron IndexedDataset (.bin/.idx), already tokenised


@dataclass
class DataConfig:
    """Token data for supervised training and pretraining."""

    source: DataSource = DataSource.task
    """Where documents come from."""
    path: Optional[str] = None
    """jsonl: the file; indexed: the prefix (without .bin or .idx)."""
    text_field: str = "text"
    """jsonl: the field that holds the text."""
    tokenizer: Optional[str] = None
    """Folder of a Hugging Face tokenizer for jsonl; null uses the task's own."""
    pack: bool = True
    """Put several documents into one row; attention does not cross their borders."""


@dataclass
class SteinConfig:
    """The Stein field over experts: how their gradients are transformed (VP2O section 3.2; docs/method.md)."""

    enabled: bool = False
    """Transform expert gradients; off, nothing of this section is computed, unless monitored."""
    monitor: bool = False
    """Compute and record routing statistics and prototypes without transforming: for a baseline beside a VP2O run."""
    attraction: bool = True
    """Mix the gradients of co-active experts by their kernel weights."""
    eta: Annotated[float, COEFFICIENT] = 0.01
    """Strength of the repulsion between experts that are not co-active; 0 turns it off."""
    repulsion_scale: RepulsionScale = RepulsionScale.absolute
    """absolute: eta times the kernel's gradient (the paper's); relative: eta times the expert's attraction gradient norm."""
    normalisation: Normalisation = Normalisation.row
    """row: rows of the weights add up to 1 (the paper's); svgd: sums over the number of active experts, as in SVGD."""
    neighbours: Annotated[Optional[int], Range(1, 2**14)] = 4
    """m, most co-active neighbours of an expert besides itself; null where coactivation_threshold is set."""
    coactivation_threshold: Annotated[Optional[float], SHARE] = None
    """rho, experts with at least this co-activation score are neighbours; null where neighbours is set."""
    coactivation_ema: Annotated[float, DECAY] = 0.9
    """Decay of the moving average of co-activation scores over steps; 0 takes each step by itself."""
    kernel: Kernel = Kernel.projective
    """projective: (v_i . v_j)^2, blind to a prototype's sign; cosine: v_i . v_j."""
    tau: Annotated[float, Range(1e-6, 10**6)] = 1.0
    """tau_0, base temperature of the kernel."""
    temperature_scaling: TemperatureScaling = TemperatureScaling.log
    """The temperature is tau over log E, over sqrt E, or tau itself."""
    power_iterations: Annotated[int, Range(1, 1000)] = 2
    """n, power iterations a prototype takes at each update, and terms of its derivative."""
    initial_power_iterations: Annotated[int, Range(1, 10_000)] = 256
    """Most (accelerated) iterations that find the prototypes at the start, from random directions, and settle them whenever the
    trust region takes an anchor; they end when directions turn by less than 1e-5 radians, after some 100 for fresh weights."""
    prototype_interval: Annotated[int, COUNT] = 1
    """Optimizer steps between prototype updates. A trust region measures prototypes, and so updates them, at every step."""
    chunk_mib: Annotated[float, Range(1e-6, 10**6)] = 256.0
    """Most memory of the expert exchange's workspace, in MiB."""


@dataclass
class SpecializationConfig:
    """Expert specialisation losses (Guo et al., arXiv 2505.22323). They add to the objective; 0 turns each off."""

    orthogonality_coef: Annotated[float, COEFFICIENT] = 0.0
    """beta_o, weight of the overlap of the outputs of a token's experts; see orthogonality_scale."""
    orthogonality_scale: OrthogonalityScale = OrthogonalityScale.absolute
    """absolute: the weight is of the loss itself; relative: of the loss over its first value, so that it begins at the weight. The
    first step with a token measures that value and does not apply the loss."""
    orthogonality: Orthogonality = Orthogonality.projection
    """projection: the paper's equation; cosine: free of scale."""
    orthogonality_token_fraction: Annotated[float, SHARE] = 1.0
    """Share of a micro-batch's tokens that the orthogonality loss is taken over."""
    variance_coef: Annotated[float, COEFFICIENT] = 0.0
    """gamma, weight of the (negative) variance of the router's scores over tokens."""

    @property
    def enabled(self) -> bool:
        """Whether there is any such loss."""
        return self.orthogonality_coef > 0 or self.variance_coef > 0


@dataclass
class AlgorithmConfig:
    """What every algorithm has. A recipe picks one of the classes below through the `algorithm` group."""

    name: Algorithm = Algorithm.grpo
    """Which algorithm."""
    steps: Annotated[int, COUNT] = 100
    """Training steps; for RL a step is one rollout batch."""
    micro_batch_size: Annotated[int, Range(1, 10**6)] = 64
    """Sequences in one forward pass on one rank."""
    max_consecutive_nonfinite_steps: Annotated[int, COUNT] = 8
    """Optimizer steps in a row with a gradient that is not finite, after which the run ends with an error (status 3)."""
    max_consecutive_empty_steps: Annotated[int, COUNT] = 100
    """Optimizer steps in a row without a token to train on, after which the run ends with an error (status 3)."""
    stein: SteinConfig = field(default_factory=SteinConfig)
    """The gradient transform."""
    specialization: SpecializationConfig = field(default_factory=SpecializationConfig)
    """Further losses on experts and router."""


@dataclass
class SupervisedConfig(AlgorithmConfig):
    """Next-token training: warm-up on demonstrations, or pretraining on a token dataset."""

    name: Algorithm = Algorithm.supervised
    """Which algorithm."""
    global_batch_size: Annotated[int, Range(1, 10**6)] = 64
    """Rows in one optimizer step, over all ranks."""
    micro_batch_size: Annotated[int, Range(1, 10**6)] = 64
    """Rows in one forward pass on one rank."""
    sequence_length: Annotated[Optional[int], Range(2, 2**24)] = None
    """Tokens in a row; null means model.max_sequence_length."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where the tokens come from."""


@dataclass
class AnswerRepulsionConfig:
    """Repulsion between the right answers of a group: rollouts as particles in function space. This project's, not the
    paper's (docs/method.md). It acts on the reward, before the group's mean is taken."""

    form: AnswerRepulsion = AnswerRepulsion.none
    """none; leave_one_out: R (1 - strength * density among the group's other right answers); count: R over the number of
    right answers alike, to the power of strength; quality_diversity: R times the mean distance to all others (DARLING)."""
    strength: Annotated[float, SHARE] = 0.5
    """alpha of leave_one_out, c of count; at most 1, so that a right answer always earns more than a wrong one."""
    spare_right: bool = False
    """Right answers get no negative advantage: those that many others give are left as they are while rare ones are made likelier.
    To make an answer less likely makes wrong ones likelier, too."""
    kernel: AnswerKernel = AnswerKernel.canonical
    """When two answers are alike. canonical: equal by the task's canonical form; ngram, edit, embedding: exp(-distance /
    bandwidth), for tasks whose canonical form does not tell answers apart."""
    bandwidth: Annotated[float, Range(1e-6, 1000)] = 0.3
    """Distance (0 to 1) at which two answers are alike by 1/e; ngram, edit and embedding only."""
    ngram: Annotated[int, Range(1, 1000)] = 3
    """Tokens of an n-gram; ngram only."""
    embedder: Optional[str] = None
    """`package.module:function` that takes a list of response texts and returns a [texts, size] tensor; embedding only."""


@dataclass
class MismatchConfig:
    """What is done about a rollout engine that computes other log-probabilities than the trainer with the same weights
    (core/mismatch.py, docs/rollouts.md). Measuring or correcting costs one more forward pass over each rollout batch."""

    measure: Optional[bool] = None
    """Recompute all rollouts' log-probabilities with the actors' weights and record mismatch/*; null: for servers only."""
    correction: MismatchCorrection = MismatchCorrection.none
    """none: the importance ratio is taken to the engine's log-probabilities; tis, mis, icepop: it is taken to the recomputed
    ones, and each token is weighted by recomputed over engine's probability, truncated or masked."""
    level: MismatchLevel = MismatchLevel.token
    """Whose ratio is bounded: the token's, or the response's (product over its tokens, or their geometric mean)."""
    low: Annotated[Optional[float], Range(1e-9, 1)] = None
    """icepop: lower bound of the ratio; null: 0.5."""
    high: Annotated[Optional[float], Range(1, 1e9)] = None
    """Upper bound of the ratio; null: 2 for tis and mis, 5 for icepop."""
    stop_kl: Annotated[Optional[float], Range(1e-12, 1e6)] = 0.1
    """Where measured: the run ends, before it trains on them, when KL(engine || trainer) of a token exceeds this, in nats."""


@dataclass
class GRPOConfig(AlgorithmConfig):
    """Group-relative policy optimisation (Shao et al., arXiv 2402.03300) with token-level normalisation."""

    name: Algorithm = Algorithm.grpo
    """Which algorithm."""
    prompts_per_step: Annotated[int, Range(1, 10**6)] = 32
    """Prompts in a rollout batch, over all ranks."""
    group_size: Annotated[int, Range(1, 10**6)] = 8
    """G, rollouts of one prompt."""
    micro_batch_tokens: Annotated[Optional[int], Range(2, 2**24)] = None
    """Pack rows, without attention across them, into micro-batches of at most this many tokens, dealt to ranks by cost; a longer
    row gets one of its own. null: micro-batches of micro_batch_size padded rows, each rank its own."""
    prefix_sharing: PrefixSharing = PrefixSharing.auto
    """With micro_batch_tokens: compute the prompt of a group once, and let each response attend to it and to itself (training and
    scoring; exact to rounding). auto: in steps in which that leaves at most nine tenths of the tokens."""
    minibatches: Annotated[int, Range(1, 10**6)] = 1
    """Optimizer steps per pass over a rollout batch."""
    epochs: Annotated[int, Range(1, 10**4)] = 1
    """Passes over a rollout batch."""
    clip_epsilon_low: Annotated[float, SHARE] = 0.2
    """Lower clip of the importance ratio: 1 - this."""
    clip_epsilon_high: Annotated[float, Range(1e-6, 1e12)] = 0.2
    """Upper clip of the importance ratio: 1 + this."""
    objective: PolicyLoss = PolicyLoss.grpo
    """What is maximised. grpo: the clipped surrogate; gspo, cispo, clip_cov, kl_cov: baselines (docs/baselines.md)."""
    covariance_fraction: Annotated[float, SHARE] = 2e-4
    """clip_cov, kl_cov: share of the tokens that are treated apart, at least one."""
    covariance_kl_coef: Annotated[float, COEFFICIENT] = 1.0
    """kl_cov: weight of the penalty on these."""
    covariance_low: Annotated[float, Range(-1e6, 1e6)] = 1.0
    """clip_cov: they are drawn from tokens with a covariance above this."""
    covariance_high: Annotated[float, Range(-1e6, 1e6)] = 5.0
    """clip_cov: and below this."""
    advantage: AdvantageEstimator = AdvantageEstimator.group_relative
    """How rewards become advantages. group_relative: GRPO's; w_reinforce, pass_at_k, maxrl: baselines (docs/baselines.md)."""
    positive_weight: Annotated[float, COEFFICIENT] = 0.1
    """w_reinforce: advantage of a right rollout (a wrong one has -1); 0 trains on wrong ones only (NSR)."""
    pass_k: Annotated[int, Range(1, 10**6)] = 4
    """pass_at_k: rollouts of which the best one counts."""
    unlikeliness: Annotated[float, Range(0, 1)] = 0.0
    """Share of its reward that the group's most likely right rollout loses; less the less likely (arXiv 2506.02355)."""
    normalise_by_std: bool = True
    """Divide advantages by the group's standard deviation (false: Dr. GRPO, arXiv 2503.20783)."""
    advantage_epsilon: Annotated[float, Range(1e-12, 1000)] = 1e-6
    """Added to the standard deviation."""
    filter_uniform_groups: bool = True
    """Leave out groups whose rewards are all equal (they carry no gradient); they are counted. false keeps their tokens in the
    loss's denominator, which makes the gradient smaller by the share of tokens that the other groups have."""
    kl_coef: Annotated[float, COEFFICIENT] = 0.0
    """beta, weight of the KL to the reference; with kl_estimator=reward in nats of the whole response."""
    kl_estimator: KLEstimator = KLEstimator.k3
    """reward: the response's log-ratio is subtracted from its reward, before the group's mean is taken: exact; k2, k3, k3+:
    an estimate of each token as a loss (k3 is GRPO's, and has the gradient of the KL the other way round)."""
    kl_reference: KLReference = KLReference.none
    """Which reference; needed when kl_coef > 0."""
    entropy_coef: Annotated[float, COEFFICIENT] = 0.0
    """Weight of an entropy bonus."""
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    """Engine and trainer that disagree about log-probabilities."""
    answer_repulsion: AnswerRepulsionConfig = field(default_factory=AnswerRepulsionConfig)
    """Repulsion between right answers."""


@dataclass
class TrustRegionConfig:
    """The geometric trust region: a step may move the router-weighted prototypes only so far from the actors' (VP2O
    section 3.3)."""

    mode: ControlMode = ControlMode.enforce
    """off | monitor | enforce."""
    delta: Annotated[float, Range(1e-9, 1000)] = 0.1
    """Largest mean distance between the learner's barycenters and the anchor's; barycenters have at most unit length."""
    delta_nats: Annotated[Optional[float], Range(1e-9, 1000)] = None
    """Learn delta from the run: from pairs of distance and policy drift of its steps, so that a step at the bound costs this
    many nats a response token; `delta` is then what counts until there are enough pairs. null: delta stays as it is."""
    max_policy_drift: Annotated[Optional[float], Range(1e-9, 1000)] = None
    """Largest mean |log pi - log pi_actor| of a response token after a step, in nats. A step beyond it is halved or rejected
    like one beyond delta. null: the policy's drift is recorded, and no part of the verdict. This project's, not the paper's."""
    drift_share: Annotated[float, Range(1e-6, 1, also=(0,))] = 0.0625
    """Share of an optimizer step's rows, over all ranks, that are scored again after the step, to measure the policy's drift.
    0: none, and nothing is known of it."""
    contexts_per_rank: Annotated[int, Range(1, 10**6)] = 1024
    """Response tokens of an optimizer step at which the distance is taken, on each rank and in each layer."""
    max_backtracks: Annotated[int, Range(0, 100)] = 3
    """How often a step that goes too far is halved before it is rejected."""
    max_consecutive_rejections: Annotated[int, COUNT] = 8
    """Rejected steps in a row after which the run ends with an error."""
    snapshot_on_host: bool = False
    """Keep the state of before the step in host memory instead of the accelerator's."""


@dataclass
class BudgetConfig:
    """The on-policy budget: actors get new weights when the learner has drifted from them (VP2O Eq. 11)."""

    mode: ControlMode = ControlMode.enforce
    """off and monitor: actors are refreshed every rollout.refresh_interval batches; enforce: when the budget is spent."""
    max_drift: Annotated[float, Range(1e-9, 10**6)] = 0.05
    """Refresh when the mean |log-ratio| of a response exceeds this, in nats (per token with ratio_length=mean)."""
    min_ess: Annotated[float, SHARE] = 0.9
    """Refresh when the tempered effective sample size falls below this fraction."""
    temper: Annotated[float, Range(1e-3, 1000)] = 1.0
    """lambda, the exponent of the tempered ratios."""
    ratio_length: RatioLength = RatioLength.mean
    """mean: length-normalised, as in GSPO; sum: of the whole response."""
    max_age: Annotated[Optional[int], COUNT] = 16
    """Refresh after this many rollout batches at the latest; null sets no limit."""


@dataclass
class VP2OConfig(GRPOConfig):
    """Variational proximal policy optimisation: group-relative advantages, and every expert a particle of a Stein flow."""

    name: Algorithm = Algorithm.vp2o
    """Which algorithm."""
    objective: PolicyLoss = PolicyLoss.vp2o
    """vp2o: unclipped, proximal control comes from trust region and budget; grpo: the clipped surrogate; or another one's."""
    trust_region: TrustRegionConfig = field(default_factory=TrustRegionConfig)
    """Bounds each step."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """Decides when actors are refreshed."""
    stein: SteinConfig = field(default_factory=lambda: SteinConfig(enabled=True))
    """The gradient transform."""
    specialization: SpecializationConfig = field(
        default_factory=lambda: SpecializationConfig(
            orthogonality_coef=1e-4, orthogonality_scale=OrthogonalityScale.relative
        )
    )
    """Further losses on experts and router; VP2O has the orthogonality loss, which begins at 1e-4."""
    kl_coef: Annotated[float, COEFFICIENT] = 0.02
    """beta, weight of the prior term; with kl_estimator=reward in nats of the whole response."""
    kl_estimator: KLEstimator = KLEstimator.reward
    """reward: the response's log-ratio is subtracted from its reward, before the group's mean is taken: exact; k2, k3, k3+:
    an estimate of each token as a loss."""
    kl_reference: KLReference = KLReference.initial
    """The prior: the weights that the run starts from, or the actors' (anchor); needed when kl_coef > 0."""

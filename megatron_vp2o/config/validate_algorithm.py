"""What the settings of an algorithm must satisfy together; their single ranges stand beside them in `algorithm.py`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vp2o.config.ranges import as_yaml
from megatron_vp2o.config.schema import (
    AdvantageEstimator,
    AlgorithmConfig,
    AnswerKernel,
    AnswerRepulsion,
    ControlMode,
    DataSource,
    Dispatcher,
    GRPOConfig,
    Implementation,
    KLEstimator,
    KLReference,
    MismatchCorrection,
    MismatchLevel,
    PolicyLoss,
    PrefixSharing,
    SoftmaxType,
    SupervisedConfig,
    TrainConfig,
    VP2OConfig,
)


def optimizer_steps(algorithm: AlgorithmConfig) -> int:
    """Optimizer steps of the whole run, which the learning-rate schedule spans (fewer where groups are filtered out)."""
    if isinstance(algorithm, GRPOConfig):
        return algorithm.steps * algorithm.epochs * algorithm.minibatches
    return algorithm.steps


def algorithm_problems(config: TrainConfig) -> Iterator[str]:
    """One line for each."""
    yield from _stein(config)
    yield from _packing(config)
    algorithm = config.algorithm
    own_name = type(algorithm)().name
    if algorithm.name is not own_name:
        yield (
            f"algorithm.name={algorithm.name.name} does not go with the settings of {own_name.name}: "
            f"choose the group, algorithm={algorithm.name.name} (override /algorithm in a recipe), not the name"
        )
    if isinstance(algorithm, SupervisedConfig):
        yield from _data(config, algorithm)
    if isinstance(algorithm, GRPOConfig):
        if algorithm.group_size < 2:
            yield (
                f"algorithm.group_size={algorithm.group_size}: a group of one is its own mean, so every advantage is zero and "
                "nothing is learnt; choose at least 2"
            )
        if algorithm.kl_coef > 0 and algorithm.kl_reference is KLReference.none:
            yield (
                f"algorithm.kl_coef={algorithm.kl_coef} needs a reference, but algorithm.kl_reference=none: "
                "set algorithm.kl_reference=initial or algorithm.kl_coef=0"
            )
        yield from _shaping(algorithm)
        yield from _mismatch(algorithm)
        if isinstance(algorithm, VP2OConfig):
            yield from _control(algorithm)
        elif algorithm.kl_reference is KLReference.anchor:
            yield (
                "algorithm.kl_reference=anchor is the prior of algorithm=vp2o, and this run is grpo: "
                "choose algorithm.kl_reference=initial, or algorithm=vp2o"
            )
        if config.rollout.sampling.temperature == 0:
            yield (
                "rollout.sampling.temperature=0 is greedy, so the rollouts of a group are all alike and every advantage is "
                "zero: choose a temperature above 0"
            )


def _stein(config: TrainConfig) -> Iterator[str]:
    stein, experts = config.algorithm.stein, config.model.num_moe_experts
    if not (stein.enabled or stein.monitor):
        return
    if (stein.neighbours is None) == (stein.coactivation_threshold is None):
        yield (
            f"algorithm.stein.neighbours={stein.neighbours} and "
            f"algorithm.stein.coactivation_threshold={stein.coactivation_threshold}: "
            "set exactly one of them, and the other to null"
        )
    least = 12 * experts / 2**20
    if stein.chunk_mib < least:
        yield (
            f"algorithm.stein.chunk_mib={stein.chunk_mib} holds not even one column of {experts} experts: "
            f"choose at least {least:.3g}"
        )


def _shaping(algorithm: GRPOConfig) -> Iterator[str]:
    """Terms of the reward that would do nothing."""
    in_reward = algorithm.kl_coef > 0 and algorithm.kl_estimator is KLEstimator.reward
    if in_reward and algorithm.kl_reference is KLReference.anchor:
        yield (
            "algorithm.kl_estimator=reward with algorithm.kl_reference=anchor: the rollouts come from the anchor, so the "
            "log-ratio is always 0; choose algorithm.kl_reference=initial, or algorithm.kl_estimator=k2"
        )
    if in_reward and algorithm.advantage is not AdvantageEstimator.group_relative:
        yield (
            f"algorithm.advantage={algorithm.advantage.name} looks at right and wrong and not at the KL that "
            f"algorithm.kl_estimator=reward takes off the reward: choose algorithm.kl_estimator=k3+, or algorithm.kl_coef=0, or "
            "algorithm.advantage=group_relative"
        )
    shaped = algorithm.answer_repulsion.form is not AnswerRepulsion.none or algorithm.unlikeliness > 0
    if algorithm.advantage is AdvantageEstimator.pass_at_k:
        if shaped:
            yield (
                "algorithm.advantage=pass_at_k looks at right and wrong only, so answer_repulsion and unlikeliness would do "
                "nothing: turn them off, or choose algorithm.advantage=group_relative"
            )
        if algorithm.pass_k > algorithm.group_size:
            yield (
                f"algorithm.pass_k={algorithm.pass_k} exceeds algorithm.group_size={algorithm.group_size}: "
                f"choose at most {algorithm.group_size}"
            )
    if algorithm.covariance_low >= algorithm.covariance_high:
        yield (
            f"algorithm.covariance_low={algorithm.covariance_low} is not below algorithm.covariance_high="
            f"{algorithm.covariance_high}: choose the smaller first"
        )
    if algorithm.objective is PolicyLoss.vp2o and not isinstance(algorithm, VP2OConfig):
        yield (
            "algorithm.objective=vp2o is unclipped, and algorithm=grpo has no trust region that bounds a step: choose "
            "algorithm.objective=grpo, or algorithm=vp2o"
        )
    repulsion = algorithm.answer_repulsion
    on = repulsion.form is not AnswerRepulsion.none
    if on and (repulsion.kernel is AnswerKernel.embedding) != (repulsion.embedder is not None):
        yield (
            f"algorithm.answer_repulsion.kernel={repulsion.kernel.name} with algorithm.answer_repulsion.embedder="
            f"{as_yaml(repulsion.embedder)}: kernel=embedding needs an embedder (package.module:function), and no other "
            "kernel takes one"
        )
    if repulsion.spare_right and not (on and algorithm.advantage is AdvantageEstimator.group_relative):
        yield (
            f"algorithm.answer_repulsion.spare_right=true with algorithm.answer_repulsion.form={repulsion.form.name} and "
            f"algorithm.advantage={algorithm.advantage.name}: it is about right answers that repulsion pushes away, so choose a "
            "form and algorithm.advantage=group_relative, or spare_right=false"
        )


def _mismatch(algorithm: GRPOConfig) -> Iterator[str]:
    """Bounds that nothing would read, and a correction that is not measured."""
    settings = algorithm.mismatch
    none, icepop = settings.correction is MismatchCorrection.none, settings.correction is MismatchCorrection.icepop
    if settings.low is not None and not icepop:
        yield (
            f"algorithm.mismatch.low={settings.low} is icepop's bound, and algorithm.mismatch.correction="
            f"{settings.correction.name}: choose correction=icepop, or low=null"
        )
    for name, value in (("high", settings.high), ("level", settings.level)):
        if none and value not in (None, MismatchLevel.token):
            yield (
                f"algorithm.mismatch.{name}={as_yaml(value)} does nothing with algorithm.mismatch.correction=none: choose tis, "
                f"mis or icepop, or leave algorithm.mismatch.{name} as it is"
            )
    if settings.measure is False and not none:
        yield (
            f"algorithm.mismatch.measure=false with algorithm.mismatch.correction={settings.correction.name}: what is corrected "
            "is measured; leave measure null, or set correction=none"
        )


def _control(algorithm: VP2OConfig) -> Iterator[str]:
    """Thresholds that can never be met, or never be exceeded: known without training."""
    region, budget = algorithm.trust_region, algorithm.budget
    if region.mode is ControlMode.enforce and region.delta >= 2.0:
        yield (
            f"algorithm.trust_region.delta={region.delta} can never be exceeded, because barycenters have at most unit length: "
            "choose less than 2 or algorithm.trust_region.mode=monitor"
        )
    for name in ("delta_nats", "max_policy_drift"):
        if getattr(region, name) is not None and not region.drift_share:
            yield (
                f"algorithm.trust_region.{name}={getattr(region, name)} needs the policy's drift, and "
                "algorithm.trust_region.drift_share=0 measures none: choose a share above 0, or null"
            )
    rows = algorithm.prompts_per_step * algorithm.group_size
    if budget.mode is ControlMode.enforce and budget.min_ess <= 1.0 / rows:
        yield (
            f"algorithm.budget.min_ess={budget.min_ess} can never be undercut: "
            f"the effective sample size of {rows} rollouts is at least {1.0 / rows:.3g}; "
            "choose more, or algorithm.budget.mode=monitor"
        )
    controlled = region.mode is ControlMode.enforce or budget.mode is ControlMode.enforce
    if algorithm.objective is PolicyLoss.vp2o and not controlled:
        yield (
            "algorithm.objective=vp2o is unclipped, and neither algorithm.trust_region.mode nor algorithm.budget.mode is "
            "enforce, so nothing bounds a step: enforce one of them or choose algorithm.objective=grpo"
        )


def _data(config: TrainConfig, algorithm: SupervisedConfig) -> Iterator[str]:
    data = algorithm.data
    if data.source is not DataSource.task and data.path is None:
        what = "the .jsonl file" if data.source is DataSource.jsonl else "the dataset's prefix"
        yield f"algorithm.data.source={data.source.name} needs algorithm.data.path, which is null: set it to {what}"
    if data.pack and config.model.window_size is not None:
        yield (
            f"algorithm.data.pack=true with model.window_size={config.model.window_size}: "
            "Megatron's sliding window sees over the borders of documents; use algorithm.data.pack=false"
        )


def _packing(config: TrainConfig) -> Iterator[str]:
    """What rows packed into one sequence cannot go together with."""
    algorithm, model = config.algorithm, config.model
    if not isinstance(algorithm, GRPOConfig):
        return
    if algorithm.prefix_sharing is PrefixSharing.on:
        if algorithm.micro_batch_tokens is None:
            yield (
                "algorithm.prefix_sharing=on lays the rows of a group out as one sequence, and algorithm.micro_batch_tokens=null "
                "pads each row: set algorithm.micro_batch_tokens to the tokens of a micro-batch, or algorithm.prefix_sharing=auto"
            )
        if model.implementation is Implementation.transformer_engine:
            yield (
                "algorithm.prefix_sharing=on needs this project's attention, and model.implementation=transformer_engine has its "
                "own: set model.implementation=local, or algorithm.prefix_sharing=off"
            )
        if config.parallel.context_parallel > 1:
            yield (
                f"algorithm.prefix_sharing=on with parallel.context_parallel={config.parallel.context_parallel}: a shared prompt "
                "cannot be cut over ranks yet; choose algorithm.prefix_sharing=off, or parallel.context_parallel=1"
            )
    if algorithm.micro_batch_tokens is None:
        return
    packed = f"algorithm.micro_batch_tokens={algorithm.micro_batch_tokens}"
    if model.window_size is not None:
        yield (
            f"{packed} packs rows, and attention with model.window_size={model.window_size} has no path for packed rows: "
            "set algorithm.micro_batch_tokens=null"
        )
    if model.softmax_type is not SoftmaxType.vanilla:
        yield (
            f"{packed} packs rows, and attention with model.softmax_type={model.softmax_type.name} has no path for packed rows: "
            "set algorithm.micro_batch_tokens=null"
        )
    if model.moe_token_dispatcher_type is Dispatcher.allgather:
        yield (
            f"{packed} gives every rank its own number of tokens, and model.moe_token_dispatcher_type=allgather needs the same "
            "on all: use alltoall, or algorithm.micro_batch_tokens=null"
        )

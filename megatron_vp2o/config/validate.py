"""What cannot work, found before any process group, download or import of torch.

Every message quotes the value, the bound and the fix. Limits that Megatron-Core sets itself are in
megatron/core/transformer/transformer_config.py (`__post_init__`) and megatron/core/parallel_state.py
(`initialize_model_parallel`); here they come earlier, and all together.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterable, Iterator

from megatron_vp2o.config.exp_manager import exp_manager_problems
from megatron_vp2o.config.export import export_problems
from megatron_vp2o.config.folders import folder_problems
from megatron_vp2o.config.parameters import count_on_rank
from megatron_vp2o.config.ranges import as_yaml, range_problems
from megatron_vp2o.config.schema import (
    DataSource,
    Dispatcher,
    EngineKind,
    GRPOConfig,
    Implementation,
    MismatchCorrection,
    RouterScore,
    SoftmaxType,
    SupervisedConfig,
    TrainConfig,
)
from megatron_vp2o.config.validate_algorithm import algorithm_problems, optimizer_steps
from megatron_vp2o.config.validate_reward import reward_outside, reward_problems
from megatron_vp2o.config.validate_rollout import rollout_outside, rollout_problems, servers_on_node
from megatron_vp2o.config.validate_task import task_problems
from megatron_vp2o.errors import ConfigError

SMALLEST_VOCABULARY = 104
"""Ids of the tasks' own tokenizer, which a model has where its settings name no number."""


def validate(
    config: TrainConfig,
    world_size: int = 1,
    *,
    cuda_devices: int | None = None,
    local_world_size: int = 1,
    elsewhere: bool = False,
) -> None:
    """Refuse a configuration that cannot work.

    Call before the process groups and before anything is written to `run_dir` (it looks whether another run is there).

    Args:
        world_size: processes of the run.
        cuda_devices: GPUs of this node, 0 for none; None where that is not known yet: what needs them is not checked.
        local_world_size: processes of the run on this node.
        elsewhere: the run is to start on another machine or in a container; what is installed here is not looked at.

    Raises:
        ConfigError: everything that is wrong, one line each; but only causes, not what follows from them: ranges first, where
            they hold combinations, where those hold what is outside of the settings (files, packages, devices).
    """
    _refuse(range_problems(config))  # the rules divide by these numbers
    rules = (
        *(_task, _model, _layout, _optimizer, algorithm_problems, _sequence, _evaluation),
        *(reward_problems, rollout_problems),
    )
    _refuse(itertools.chain(*(rule(config) for rule in rules)))
    _refuse(_world(config, world_size))
    # What is outside of the settings comes last: a missing folder says nothing to somebody who misspelt a number.
    problems = [
        *folder_problems(config),
        *export_problems(config),
        *exp_manager_problems(config.exp_manager, elsewhere=elsewhere),
    ]
    if not elsewhere:
        problems.extend([*_packages(config), *reward_outside(config), *rollout_outside(config)])
    if cuda_devices is not None:
        problems.extend(_devices(config, cuda_devices, local_world_size))
        problems.extend(servers_on_node(config.rollout, cuda_devices, local_world_size, world_size))
    _refuse(problems)


def validate_layout(config: TrainConfig, world_size: int) -> None:
    """Refuse a layout that the model or the processes do not fit, for programs that load a model and do not train it.

    Raises:
        ConfigError: everything that is wrong, one line each.
    """
    _refuse(itertools.chain(_model(config), _layout(config)))
    _refuse(itertools.chain(_world(config, world_size), _packages(config)))


def _refuse(problems: Iterable[str]) -> None:
    if lines := list(problems):
        raise ConfigError("\n".join(lines))


def validate_prompts(config: TrainConfig, max_prompt_tokens: int) -> None:
    """Refuse a task whose prompts, with the longest response, don't fit into the context. Call once the task is made.

    Args:
        max_prompt_tokens: the task's bound over all its prompts.

    Raises:
        ConfigError: with the value, the bound and the fix.
    """
    if not solves_task(config):
        return
    response, context = config.rollout.sampling.max_new_tokens, config.model.max_sequence_length
    if max_prompt_tokens + response > context:
        raise ConfigError(
            f"prompts of task.name={config.task.name} have up to {max_prompt_tokens} tokens, and with "
            f"rollout.sampling.max_new_tokens={response} that exceeds model.max_sequence_length={context}: "
            f"raise model.max_sequence_length to {max_prompt_tokens + response} or shorten the responses"
        )


def validate_vocabulary(config: TrainConfig, tokenizer_size: int) -> None:
    """Refuse a model that does not know all of its tokenizer's ids. Call once the tokenizer is there.

    Raises:
        ConfigError: with the value, the bound and the fix.
    """
    size = config.model.vocab_size
    if size is not None and size < tokenizer_size:
        raise ConfigError(
            f"model.vocab_size={size} is less than the {tokenizer_size} ids of the tokenizer: "
            f"choose at least {tokenizer_size}, null for just that, or the tokenizer that the model was made with"
        )


def solves_task(config: TrainConfig) -> bool:
    """Whether the run trains on its task: not where its tokens come from files."""
    return not isinstance(config.algorithm, SupervisedConfig) or config.algorithm.data.source is DataSource.task


def compares_rollouts(config: TrainConfig) -> bool:
    """Whether all rollouts are recomputed with the actors' weights, in one more forward pass, for `mismatch/*`."""
    algorithm = config.algorithm
    if not isinstance(algorithm, GRPOConfig):
        return False
    measure = algorithm.mismatch.measure
    if algorithm.mismatch.correction is not MismatchCorrection.none:
        return True
    return config.rollout.engine is not EngineKind.embedded if measure is None else measure


def data_parallel_size(config: TrainConfig, world_size: int) -> int:
    """Ranks with different data: world / (tensor * pipeline * context)."""
    parallel = config.parallel
    return world_size // (parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel)


def _divides(what: str, value: int, by: str, divisor: int) -> Iterator[str]:
    """A problem if `divisor` does not divide `value`."""
    if value % divisor:
        fit = ", ".join(str(d) for d in range(1, min(value, 1024) + 1) if value % d == 0)
        yield (
            f"{what}={value} is not divisible by {by}={divisor}: choose {by} from {fit}, or {what} a multiple of {divisor}"
        )


def _task(config: TrainConfig) -> Iterator[str]:
    yield from task_problems(config.task)


def _model(config: TrainConfig) -> Iterator[str]:
    model = config.model
    yield from _divides(
        "model.num_attention_heads", model.num_attention_heads, "model.num_query_groups", model.num_query_groups
    )
    if model.kv_channels % 2:
        yield f"model.kv_channels={model.kv_channels} must be even, because rotary embedding turns pairs of channels"
    if model.moe_router_topk > model.num_moe_experts:
        yield (
            f"model.moe_router_topk={model.moe_router_topk} exceeds model.num_moe_experts={model.num_moe_experts}: "
            f"choose at most {model.num_moe_experts}"
        )
    softmax = model.moe_router_score_function is RouterScore.softmax
    if model.moe_router_topk == 1 and softmax and not model.moe_router_pre_softmax:
        yield (
            "model.moe_router_topk=1 with moe_router_pre_softmax=false makes every gate 1 and the router's gradient 0: "
            "set model.moe_router_pre_softmax=true or choose a larger top-k"
        )
    if model.window_attn_skip_freq is not None and model.window_size is None:
        yield (
            f"model.window_attn_skip_freq={model.window_attn_skip_freq} with model.window_size=null has no window to leave out: "
            "set model.window_size, or model.window_attn_skip_freq=null"
        )
    if model.moe_router_enable_expert_bias and softmax:
        yield (
            "model.moe_router_enable_expert_bias=true needs model.moe_router_score_function=sigmoid, but it is softmax: "
            "change one of them"
        )


def _layout(config: TrainConfig) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    tensor, expert_tensor = parallel.tensor_parallel, parallel.expert_tensor_parallel
    yield from _divides(
        "model.num_moe_experts", model.num_moe_experts, "parallel.expert_parallel", parallel.expert_parallel
    )
    yield from _divides("model.num_layers", model.num_layers, "parallel.pipeline_parallel", parallel.pipeline_parallel)
    for name in ("num_attention_heads", "num_query_groups", "moe_shared_expert_intermediate_size"):
        if (width := getattr(model, name)) is not None:
            yield from _divides(f"model.{name}", width, "parallel.tensor_parallel", tensor)
    yield from _divides(
        "model.moe_ffn_hidden_size", model.moe_ffn_hidden_size, "parallel.expert_tensor_parallel", expert_tensor
    )
    if model.add_bias_linear and expert_tensor > 1:
        yield (
            f"parallel.expert_tensor_parallel={expert_tensor}: Megatron has no expert tensor parallelism for experts with biases "
            "(model.add_bias_linear=true): choose 1, and parallel.expert_parallel to split them"
        )
    if tensor > 1 and parallel.sequence_parallel is False:
        yield (
            f"parallel.sequence_parallel=false with parallel.tensor_parallel={tensor}: "
            "Megatron trains experts under tensor parallelism only with sequence parallelism; leave it null or set it to true"
        )
    if tensor == 1 and parallel.sequence_parallel:
        yield (
            "parallel.sequence_parallel=true with parallel.tensor_parallel=1 has nothing to split: "
            "leave it null, or raise parallel.tensor_parallel to at least 2"
        )
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        yield (
            "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true and "
            f"parallel.overlap_grad_reduce=true, but they are {as_yaml(parallel.distributed_optimizer)} and "
            f"{as_yaml(parallel.overlap_grad_reduce)}: set both, or turn it off"
        )
    if parallel.pipeline_parallel > 1 and model.moe_token_dispatcher_type is Dispatcher.allgather:
        yield (
            "model.moe_token_dispatcher_type=allgather cannot take the varying lengths that "
            f"parallel.pipeline_parallel={parallel.pipeline_parallel} sends: use alltoall, or no pipeline parallelism"
        )
    orthogonality = config.algorithm.specialization.orthogonality_coef
    if orthogonality > 0 and model.moe_token_dispatcher_type is Dispatcher.allgather:
        yield (
            f"algorithm.specialization.orthogonality_coef={orthogonality} needs each token's expert outputs apart, and "
            "model.moe_token_dispatcher_type=allgather adds them up elsewhere: use alltoall, or "
            "algorithm.specialization.orthogonality_coef=0"
        )
    if parallel.context_parallel > 1:
        yield from _context(config)


def _context(config: TrainConfig) -> Iterator[str]:
    """What sequences that are split over ranks cannot have."""
    model, context = config.model, config.parallel.context_parallel
    if model.window_size is not None:
        yield (
            f"parallel.context_parallel={context} with model.window_size={model.window_size}: attention that is split over ranks "
            "has no sliding windows; choose 1, or model.window_size=null"
        )
    if model.softmax_type is not SoftmaxType.vanilla:
        yield (
            f"parallel.context_parallel={context} with model.softmax_type={model.softmax_type.value}: attention that is split over "
            "ranks has no sinks; choose 1, or model.softmax_type=vanilla"
        )


def _packages(config: TrainConfig) -> Iterator[str]:
    for setting in _needs_transformer_engine(config):
        if importlib.util.find_spec("transformer_engine") is None:
            yield (
                f"{setting} needs transformer-engine, which is not installed: "
                "install the [gpu] extra on a machine with CUDA, or use model.implementation=auto"
            )


def _needs_transformer_engine(config: TrainConfig) -> Iterator[str]:
    if config.model.implementation is Implementation.transformer_engine:
        yield "model.implementation=transformer_engine"


def _world(config: TrainConfig, world_size: int) -> Iterator[str]:
    parallel, algorithm = config.parallel, config.algorithm
    dense = parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel
    expert = parallel.expert_parallel * parallel.expert_tensor_parallel * parallel.pipeline_parallel
    if world_size % dense:
        yield (
            f"{world_size} processes are not divisible by tensor * pipeline * context parallelism = {parallel.tensor_parallel} * "
            f"{parallel.pipeline_parallel} * {parallel.context_parallel} = {dense}: "
            f"start a multiple of {dense} (torchrun --nproc-per-node) or lower parallel.*"
        )
    if world_size % expert:
        yield (
            f"{world_size} processes are not divisible by expert * expert-tensor * pipeline parallelism = "
            f"{parallel.expert_parallel} * {parallel.expert_tensor_parallel} * {parallel.pipeline_parallel} = {expert}: "
            f"start a multiple of {expert} (torchrun --nproc-per-node) or lower parallel.*"
        )
    if world_size % dense or world_size % expert:
        return
    ranks = data_parallel_size(config, world_size)
    if isinstance(algorithm, SupervisedConfig) and algorithm.global_batch_size % ranks:
        yield (
            f"algorithm.global_batch_size={algorithm.global_batch_size} is not divisible by the {ranks} data-parallel ranks: "
            f"choose a multiple of {ranks}"
        )
    if isinstance(algorithm, GRPOConfig):
        if algorithm.prompts_per_step % ranks:
            yield (
                f"algorithm.prompts_per_step={algorithm.prompts_per_step} is not divisible by the {ranks} data-parallel ranks: "
                f"choose a multiple of {ranks}"
            )
        elif (algorithm.prompts_per_step // ranks * algorithm.group_size) % algorithm.minibatches:
            rollouts = algorithm.prompts_per_step // ranks * algorithm.group_size
            yield (
                f"algorithm.minibatches={algorithm.minibatches} does not divide the {rollouts} rollouts of a rank "
                f"(prompts_per_step={algorithm.prompts_per_step} * group_size={algorithm.group_size} / {ranks} data-parallel "
                f"ranks): choose a divisor of {rollouts}"
            )


def _devices(config: TrainConfig, cuda_devices: int, local_world_size: int) -> Iterator[str]:
    if cuda_devices == 0:
        for setting in _needs_transformer_engine(config):
            yield (f"{setting} needs a GPU, and this machine has none: use model.implementation=auto")
        yield from _host_memory(config, local_world_size)
        return
    yield from _context_of_documents(config)
    if local_world_size > cuda_devices:
        yield (
            f"{local_world_size} processes on a node with {cuda_devices} GPUs: "
            f"start at most {cuda_devices} (torchrun --nproc-per-node)"
        )


def _context_of_documents(config: TrainConfig) -> Iterator[str]:
    """transformer-engine's context-parallel attention takes no mask, which documents packed into a row need."""
    algorithm, model, context = config.algorithm, config.model, config.parallel.context_parallel
    packs = isinstance(algorithm, SupervisedConfig) and algorithm.data.pack
    asked = model.implementation in (Implementation.auto, Implementation.transformer_engine)
    engine = asked and importlib.util.find_spec("transformer_engine")
    if packs and engine and context > 1:
        yield (
            f"parallel.context_parallel={context} with algorithm.data.pack=true: transformer-engine does not split rows of several "
            "documents over ranks; set algorithm.data.pack=false or model.implementation=torch"
        )


def _host_memory(config: TrainConfig, local_world_size: int) -> Iterator[str]:
    """What training certainly takes on the CPU: weights, the actor's, gradients and two moments, in float32."""
    vocabulary = config.model.vocab_size or SMALLEST_VOCABULARY
    count = count_on_rank(config.model, config.parallel, vocabulary).total
    needed, there = 20 * count * local_world_size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        yield (
            f"the model has {count / 1e9:.3g}e9 parameters on each rank, and {local_world_size} of them take at least "
            f"{needed / 2**30:.4g} GiB of this machine's {there / 2**30:.3g} GiB: choose a smaller model.*, or more machines"
        )


def _optimizer(config: TrainConfig) -> Iterator[str]:
    optimizer, algorithm = config.optimizer, config.algorithm
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr={optimizer.min_lr} exceeds optimizer.lr={optimizer.lr}: choose at most {optimizer.lr}"
    total = optimizer_steps(algorithm)
    if optimizer.lr_warmup_steps >= total:
        yield (
            f"optimizer.lr_warmup_steps={optimizer.lr_warmup_steps} leaves nothing of the run's {total} optimizer steps: "
            f"choose at most {total - 1}, or raise algorithm.steps"
        )


def _sequence(config: TrainConfig) -> Iterator[str]:
    context, algorithm = config.model.max_sequence_length, config.algorithm
    response = config.rollout.sampling.max_new_tokens
    if solves_task(config) and response >= context:
        yield (
            f"rollout.sampling.max_new_tokens={response} leaves no room for a prompt in model.max_sequence_length={context}: "
            f"choose at most {context - 1}, less the prompt"
        )
    if isinstance(algorithm, SupervisedConfig) and (algorithm.sequence_length or 0) > context:
        yield (
            f"algorithm.sequence_length={algorithm.sequence_length} exceeds model.max_sequence_length={context}: "
            f"choose at most {context}, or null for just that"
        )


def _evaluation(config: TrainConfig) -> Iterator[str]:
    evaluation, task = config.evaluation, config.task
    for k in evaluation.pass_at:
        if not 1 <= k <= evaluation.samples:
            yield (
                f"evaluation.pass_at has {k}, which must be between 1 and evaluation.samples={evaluation.samples}: "
                "change it, or draw more samples"
            )
    if solves_task(config) and evaluation.problems > task.validation_size:
        yield (
            f"evaluation.problems={evaluation.problems} exceeds task.validation_size={task.validation_size}: "
            f"choose at most {task.validation_size}, or prepare more"
        )

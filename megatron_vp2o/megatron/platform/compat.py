"""What differs between the supported megatron-core versions, and repairs of what is wrong in them on any device.

Nothing here depends on the kind of device; that is `cpu.py`. Line numbers are of megatron/core in 0.16.1 and in 0.19.2.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from megatron_vp2o.errors import ConfigError

logger = logging.getLogger(__name__)

OLDEST, BEYOND = Version("0.16.1"), Version("0.20")


@dataclass(frozen=True)
class Site:
    """A line of megatron/core that a patch is about: file, number in 0.16.1 and in 0.19.2 (None: not there), text."""

    file: str
    line_0_16_1: int | None
    line_0_19_2: int | None
    text: str


@dataclass(frozen=True)
class Patch:
    """One change to megatron.core.

    Attributes:
        name: as `enable_cpu` and `prepare` report it.
        why: what goes wrong without it.
        until: the condition that retires it.
        targets: what is replaced, "module:attribute.path".
        sites: the lines that make it necessary.
        apply: makes the change. Once.
        needed: tests what of `until` can be tested; the patch is not applied where it returns False.
    """

    name: str
    why: str
    until: str
    targets: tuple[str, ...]
    sites: tuple[Site, ...]
    apply: Callable[[], None]
    needed: Callable[[], bool] = lambda: True


def megatron_version() -> Version:
    """Version of the installed megatron-core. Raises ConfigError where there is none."""
    try:
        return Version(importlib.metadata.version("megatron-core"))
    except importlib.metadata.PackageNotFoundError:
        pass  # perhaps a source checkout on PYTHONPATH, which has no metadata
    try:
        return Version(importlib.import_module("megatron.core").__version__)
    except ModuleNotFoundError as error:
        if error.name not in ("megatron", "megatron.core"):
            raise
        raise ConfigError(f"megatron-core is not installed; pip install 'megatron-core>={OLDEST},<{BEYOND}'") from None


@functools.cache
def prepare() -> tuple[str, ...]:
    """Check what megatron.core needs, quieten it, and apply the repairs. Call it before importing megatron.core.

    Returns:
        Names of the repairs that this installation needed.

    Raises:
        ConfigError: megatron-core is missing or of an unsupported version, or a package that it needs without
            declaring it is missing.
    """
    check_installation()
    quieten()
    applied = []
    for patch in REPAIRS:
        if patch.needed():
            patch.apply()
            applied.append(patch.name)
    return tuple(applied)


def check_installation() -> None:
    """Raises ConfigError for what `prepare` says; warns of an `apex` that is not NVIDIA's."""
    version = megatron_version()
    if version < OLDEST or version.release >= BEYOND.release:  # a release candidate of BEYOND is beyond, too
        raise ConfigError(
            f"megatron-core {version} is installed, but {OLDEST} <= version < {BEYOND} is supported; "
            f"pip install 'megatron-core>={OLDEST},<{BEYOND}'"
        )
    undeclared = {
        "psutil": "writing checkpoints; 0.16.1 hangs without it",
        "tqdm": "its inference engines",
    }
    if version >= Version("0.17"):
        undeclared["triton"] = "importing its mixture-of-experts layer"
    for package, purpose in undeclared.items():
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"megatron-core {version} needs {package} without declaring it (for {purpose}); pip install {package}"
            )
    if (place := foreign_apex()) is not None:
        warnings.warn(
            f"the package 'apex' in {place} is not NVIDIA's Apex but PyPI's toolkit for the Pyramid web framework; "
            "pip uninstall apex (NVIDIA's is built from https://github.com/NVIDIA/apex, and is optional here)",
            stacklevel=2,
        )


def foreign_apex() -> Path | None:
    """Where an `apex` is installed that lacks what Megatron imports from NVIDIA's; None if there is no such package."""
    spec = importlib.util.find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return None
    place = Path(next(iter(spec.submodule_search_locations)))
    return None if (place / "multi_tensor_apply").is_dir() else place


# Beginnings of messages that are known, true, and about nothing that a user of this project can or need change.
_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (UserWarning, "Transformer Engine and Apex are not installed"),  # it works without, only slower on a GPU
    (UserWarning, "Apex is not installed. Falling back to Torch Norm"),
    (UserWarning, "full scope is deprecated"),  # said by TransformerConfig of its own default
    (UserWarning, "MimoModelConfig is experimental"),  # imported, not used
    (UserWarning, "The .grad attribute of a Tensor that is not a leaf"),  # its optimizers look whether there is one
    (UserWarning, "torch.distributed is disabled, unavailable or uninitialized"),  # each rank reads its own part
    (UserWarning, "The argument order of load has been changed"),
    (FutureWarning, "`load_state_dict` is deprecated and will be removed"),
    (FutureWarning, "Please use DTensor instead"),
    (FutureWarning, "`torch.distributed.(reduce_scatter|all_gather_into)_tensor` is deprecated"),
)
_LOG_RECORDS = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    # 0.16.1 says so of every MoELayer that is not its own class; ours needs no other arguments
    "megatron.core.transformer.transformer_layer": "Unknown MLP type",
}


class _Without(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginning)


def quieten() -> None:
    """Drop the warnings around megatron.core that are known and harmless (`_WARNINGS`, `_LOG_RECORDS`), and no others."""
    for category, beginning in _WARNINGS:
        warnings.filterwarnings("ignore", message=beginning, category=category)
    for name, beginning in _LOG_RECORDS.items():
        logging.getLogger(name).addFilter(_Without(beginning))
    if importlib.util.find_spec("transformer_engine") is None:
        logger.info("megatron-core %s without transformer-engine: torch's AdamW and norms are used", megatron_version())


# --- specs and parameters ---------------------------------------------------------------------------------------------


def replace_in_spec(spec: Any, replacements: dict[type, type]) -> Any:
    """A copy of a (nested) layer spec with other classes in it.

    Raises:
        ValueError: a class to be replaced does not occur, as when a Megatron version builds its specs otherwise.
    """
    found: set[type] = set()

    def walk(node: Any) -> Any:
        if isinstance(node, type):
            if node not in replacements:
                return node
            found.add(node)
            return replacements[node]
        if isinstance(node, (list, tuple)):
            return type(node)(walk(item) for item in node)
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, functools.partial):
            return functools.partial(walk(node.func), *map(walk, node.args), **walk(node.keywords))
        if dataclasses.is_dataclass(node) and not isinstance(node, type):
            names = [field.name for field in dataclasses.fields(node) if field.init]
            return dataclasses.replace(node, **{name: walk(getattr(node, name)) for name in names})
        return node

    copy = walk(spec)
    if missing := sorted(old.__name__ for old in replacements if old not in found):
        raise ValueError(f"not in the layer spec of megatron-core {megatron_version()}: {', '.join(missing)}")
    return copy


def mark_expert_parameters(model: torch.nn.Module) -> None:
    """Put the routed experts' parameters into the expert buffers and optimizer in every layout. Call it before DDP.

    Megatron marks them (`allreduce=False`) only where expert_parallel > 1. So, without this, expert_parallel=1 with
    expert tensor parallelism unlike tensor parallelism reduces their gradients over the wrong ranks
    (tensor_parallel/layers.py:829, 886 in 0.16.1; mended in 0.19.2), and optimizer state cannot move between
    expert_parallel=1 and more (its keys get a prefix only where there are two optimizers).
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


# --- state that megatron.core keeps for the process -------------------------------------------------------------------


def leave_inference_mode() -> None:
    """Clear the process-wide flag that 0.19.2's engines set and leave set (inference/utils.py:20). 0.16.1 has none."""
    utils = importlib.import_module("megatron.core.inference.utils")
    if hasattr(utils, "InferenceMode"):
        utils.InferenceMode.unset_active()


def forget_loss_scales() -> None:
    """Let the coming schedule set the scale of the router losses afresh.

    0.19.2 keeps the first one's tensor and copies later ones into it (moe_utils.py:334), which fails between a loop whose
    scale is a scalar and one whose scale has a dimension.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def forget_auxiliary_losses() -> None:
    """Drop what has been tracked, and for how many layers: before a model of another depth in the same process."""
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        get_moe_metrics_tracker().metrics.clear()
    except ModuleNotFoundError:
        _tracked_losses().clear()
    forget_loss_scales()


def _tracked_losses() -> dict[str, dict[str, Any]]:
    """Tracked values per layer, [L]: a dictionary in 0.16.1 (moe_utils.py:1103), an object from 0.19.2 on."""
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ModuleNotFoundError:
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        return get_moe_layer_wise_logging_tracker()
    return {name: vars(entry) for name, entry in get_moe_metrics_tracker().metrics.items()}


# --- repairs ----------------------------------------------------------------------------------------------------------


def _undefined_gemm() -> bool:
    return not hasattr(importlib.import_module("megatron.core.transformer.moe.moe_utils"), "te_general_gemm")


def _define_gemm() -> None:
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    moe_utils.te_general_gemm = None


def _torch_optimizer() -> bool:
    return not importlib.import_module("megatron.core.optimizer.distrib_optimizer").HAVE_APEX_OR_TE


def _repair_distributed_optimizer() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = DistributedOptimizer.state_dict
    load_state_dict = DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def allocate(self: Any) -> None:
        """The state that torch's Adam makes in its first step; Megatron's own allocation omits `step`."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if "step" not in state:
                    state["step"] = torch.tensor(0.0)
                    for key in ("exp_avg", "exp_avg_sq"):
                        state.setdefault(key, torch.zeros_like(parameter))

    def is_torch_adam(self: Any) -> bool:
        return isinstance(self.optimizer, (torch.optim.Adam, torch.optim.AdamW))

    @functools.wraps(state_dict)
    def state_dict_of_any_step(self: Any) -> Any:
        if is_torch_adam(self):
            allocate(self)
        return state_dict(self)

    @functools.wraps(load_state_dict)
    def load_with_own_steps(self: Any, loaded: Any) -> None:
        if not is_torch_adam(self):
            load_state_dict(self, loaded)
            return
        allocate(self)
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @functools.wraps(set_states)
    @torch.no_grad()
    def set_all_but_step(self: Any, model_param: Any, tensors: Any) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = state.pop("step", None)  # loaded with the groups, not with the parameters
        set_states(self, model_param, tensors)
        if step is not None:
            state["step"] = step

    DistributedOptimizer.state_dict = state_dict_of_any_step
    DistributedOptimizer.load_state_dict = load_with_own_steps
    DistributedOptimizer._set_main_param_and_optimizer_states = set_all_but_step


def _router_losses_shrink() -> bool:
    from megatron.core.transformer.moe.router import TopKRouter

    return "tp_cp_group" not in TopKRouter.attach_and_log_load_balancing_loss.__code__.co_names


def _repair_router_losses() -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    attach = TopKRouter.attach_and_log_load_balancing_loss
    apply_z_loss = TopKRouter.apply_z_loss
    signature = inspect.signature(attach)

    @functools.wraps(attach)
    def attach_to_all_tokens(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        tokens = given["activation"].shape[0] if given["valid_token_count"] is None else given["valid_token_count"]
        given["valid_token_count"] = tokens * given["self"].tp_cp_group.size()  # used only with per-token loss
        return attach(*call.args, **call.kwargs)

    @functools.wraps(apply_z_loss)
    def apply_z_loss_to_all_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self.calculate_per_token_loss:
            return apply_z_loss(self, *args, **kwargs)
        self.config.moe_z_loss_coeff = coefficient * self.tp_cp_group.size()
        try:
            return apply_z_loss(self, *args, **kwargs)
        finally:
            self.config.moe_z_loss_coeff = coefficient

    TopKRouter.attach_and_log_load_balancing_loss = attach_to_all_tokens
    TopKRouter.apply_z_loss = apply_z_loss_to_all_tokens


def _norm_of_each() -> bool:
    clip_grads: Any = importlib.import_module("megatron.core.optimizer.clip_grads")
    return bool(clip_grads.l2_norm_impl.__name__ == "local_multi_tensor_l2_norm")


def _norm_on_the_device() -> None:
    clip_grads: Any = importlib.import_module("megatron.core.optimizer.clip_grads")

    def norm(_: int, __: Any, lists: list[list[torch.Tensor]], *___: Any) -> tuple[torch.Tensor, None]:
        norms = [norm for tensors in lists for norm in torch._foreach_norm(tensors)]
        return torch.stack(norms).float().norm().view(1), None

    def scale(_: int, __: Any, lists: list[list[torch.Tensor]], factor: float) -> None:
        for source, target in zip(*lists, strict=True):
            torch.mul(source, factor, out=target)

    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = norm, scale


def _permute_selects() -> bool:
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    return "masked_select" in moe_utils.permute.__code__.co_names


def _permute_without_selecting() -> None:
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    original = moe_utils.permute
    signature = inspect.signature(original)

    @functools.wraps(original)
    def permute(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        map_TE, rows = given["routing_map"], given["num_out_tokens"]
        if given["fused"] or given["drop_and_pad"] or not isinstance(rows, int) or map_TE.device.type == "cpu":
            return original(*args, **kwargs)
        place_R = map_TE.bool().T.reshape(-1).to(torch.int8).argsort(descending=True, stable=True)[:rows]
        token_R = place_R % len(map_TE)
        probs_TE = given["probs"]
        probs_R = None if probs_TE is None else probs_TE.T.reshape(-1)[place_R]
        return given["tokens"].index_select(0, token_R), probs_R, token_R

    moe_utils.permute = dispatcher.permute = permute


def _counts_tokens_on_the_host() -> bool:
    distributed: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    return "clamp" not in distributed.finalize_model_grads.__code__.co_names


def _divide_without_asking() -> None:
    package: Any = importlib.import_module("megatron.core.distributed")
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    original = module.finalize_model_grads
    signature = inspect.signature(original)

    @functools.wraps(original)
    def finalize(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        tokens = given["num_tokens"]
        if tokens is None:
            original(*args, **kwargs)
            return
        given["num_tokens"] = None
        original(*call.args, **call.kwargs)
        groups = given["pg_collection"]
        if groups is None:
            pipeline = parallel_state.get_pipeline_model_parallel_group()
            data = parallel_state.get_data_parallel_group(with_context_parallel=True)
        else:
            pipeline, data = groups.pp, groups.dp_cp
        torch.distributed.broadcast(tokens, group=pipeline, group_src=pipeline.size() - 1)
        torch.distributed.all_reduce(tokens, group=data)
        for chunk in given["model"]:
            chunk.scale_gradients(1.0 / tokens.clamp(min=1))

    from megatron.core import parallel_state

    module.finalize_model_grads = package.finalize_model_grads = finalize


_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"

_ROUTER = "megatron.core.transformer.moe.router:TopKRouter"

REPAIRS: tuple[Patch, ...] = (
    Patch(
        name="undefined-gemm",
        why="without transformer-engine the router reads te_general_gemm, which only its import defines: NameError",
        until="the name exists (0.19.2, or transformer-engine installed)",
        targets=("megatron.core.transformer.moe.moe_utils:router_gating_linear",),
        sites=(Site("transformer/moe/moe_utils.py", 1192, None, "if te_general_gemm is not None"),),
        apply=_define_gemm,
        needed=_undefined_gemm,
    ),
    Patch(
        name="distributed-optimizer-load",
        why="over torch's AdamW, DistributedOptimizer cannot save before its first step, nor load: it asserts one "
        "`step` over a state that is still empty, wants `step` among a parameter's tensors, copies into leaves with "
        "autograd on, and gives all parameters one `step` tensor, which then counts once for each of them",
        until="transformer-engine or NVIDIA's Apex is installed (their FusedAdam is used), or Megatron tests this path",
        targets=(
            f"{_OPTIMIZER}.state_dict",
            f"{_OPTIMIZER}.load_state_dict",
            f"{_OPTIMIZER}._set_main_param_and_optimizer_states",
        ),
        sites=(
            Site("optimizer/distrib_optimizer.py", 642, 839, "assert len(steps) == 1"),
            Site("optimizer/distrib_optimizer.py", 940, 1225, "dst_tensors[key].copy_(tensors[key])"),
            Site("optimizer/distrib_optimizer.py", 825, 1032, 's["step"] = step'),
        ),
        apply=_repair_distributed_optimizer,
        needed=_torch_optimizer,
    ),
    Patch(
        name="router-losses-per-token",
        why="with calculate_per_token_loss, the gradients of auxiliary and z-loss are scaled by the tokens of one rank, where "
        "the division that follows counts those of all: under sequence (or context) parallelism they are that much too small",
        until="the scale has the size of tp_cp_group in it (0.19.2)",
        targets=(f"{_ROUTER}.attach_and_log_load_balancing_loss", f"{_ROUTER}.apply_z_loss"),
        sites=(
            Site("transformer/moe/router.py", 466, None, "aux_loss * num_tokens"),
            Site("transformer/moe/router.py", 498, None, "z_loss * num_tokens"),
        ),
        apply=_repair_router_losses,
        needed=_router_losses_shrink,
    ),
    Patch(
        name="gradient-norm-waits",
        why="the norm of all gradients is made of a list of numbers that the host reads from the device, one a parameter",
        until="transformer-engine or NVIDIA's Apex is installed, or Megatron's own version stays on the device",
        targets=(
            "megatron.core.optimizer.clip_grads:l2_norm_impl",
            "megatron.core.optimizer.clip_grads:multi_tensor_scale_impl",
        ),
        sites=(
            Site("utils.py", 1206, 1331, "torch.norm(torch.tensor(l2))"),
            Site("utils.py", 1215, 1340, "dst.copy_(src * scale)"),
        ),
        apply=_norm_on_the_device,
        needed=_norm_of_each,
    ),
    Patch(
        name="permutation-waits",
        why="the rows of tokens that are sent to experts are selected by a mask: the host waits for their number, which it knows",
        until="they are found by sorting (0.19.2)",
        targets=("megatron.core.transformer.moe.moe_utils:permute",),
        sites=(Site("transformer/moe/moe_utils.py", 369, None, "token_indices.masked_select(routing_map)"),),
        apply=_permute_without_selecting,
        needed=_permute_selects,
    ),
    Patch(
        name="token-count-waits",
        why="between backward pass and optimizer the host asks the device whether there was any token",
        until="gradients are divided by at least one token (0.19.2)",
        targets=("megatron.core.distributed.finalize_model_grads:finalize_model_grads",),
        sites=(Site("distributed/finalize_model_grads.py", 495, None, "if num_tokens > 0:"),),
        apply=_divide_without_asking,
        needed=_counts_tokens_on_the_host,
    ),
)

"""Repairs of what is wrong in megatron.core on any device: optimizer, router, and what makes the host wait.

`compat.prepare` applies those that an installation needs. Line numbers are of megatron/core in 0.16.1 and in 0.19.2.

Shape legend: T tokens, E experts, R rows (tokens that are sent to experts, one for each choice).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch

from megatron_vp2o.megatron.platform.patches import Patch, Site, in_place_of


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

    @in_place_of(attach)
    def attach_to_all_tokens(call: inspect.BoundArguments) -> Any:
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

    @in_place_of(original)
    def permute(call: inspect.BoundArguments) -> Any:
        given = call.arguments
        map_TE, rows = given["routing_map"], given["num_out_tokens"]
        if given["fused"] or given["drop_and_pad"] or not isinstance(rows, int) or map_TE.device.type == "cpu":
            return original(*call.args, **call.kwargs)
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

    @in_place_of(original)
    def finalize(call: inspect.BoundArguments) -> None:
        given = call.arguments
        tokens = given["num_tokens"]
        if tokens is None:
            original(*call.args, **call.kwargs)
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

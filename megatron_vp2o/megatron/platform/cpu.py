"""What lets megatron.core run without CUDA, under gloo. Where there is CUDA, none of it is applied.

Scope: Megatron writes `torch.cuda.current_device()` and `device="cuda"` where it means "the device that I run on".
Every module of megatron.core gets a `torch` of its own: a stand-in whose `cuda` part, and whose tensor factories when
asked for "cuda", mean the CPU. torch itself is not touched. What is seen outside megatron.core:
  - `model_parallel_cuda_manual_seed` seeds, and Megatron's random-number tracker swaps, torch's CPU generator;
  - a finder at the head of `sys.meta_path` gives megatron.core modules that are imported later their stand-in too.

`PATCHES` lists the changes, each with the lines that make it necessary (0.16.1; 0.19.2) and what would retire it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.megatron.platform.compat import prepare
from megatron_vp2o.megatron.platform.patches import Patch, Site

CPU = torch.device("cpu")
PACKAGE = "megatron.core"


def enable_cpu() -> list[str]:
    """Let megatron.core run on this machine's CPU if it has no CUDA. Best before its first import; may be repeated.

    On every machine it first calls `compat.prepare`: installation check, and repairs that don't depend on the device.

    Returns:
        Names of the applied patches (see `PATCHES`), [] where torch.cuda.is_available().

    Raises:
        ConfigError: megatron-core is missing or unsupported (see `compat.prepare`).
    """
    prepare()
    return [] if torch.cuda.is_available() else list(_apply_patches())


@functools.cache
def _apply_patches() -> tuple[str, ...]:
    applied = []
    for patch in PATCHES:
        if patch.needed():
            patch.apply()
            applied.append(patch.name)
    return tuple(applied)


# --- the stand-in for torch -------------------------------------------------------------------------------------------


class Stream:
    """Takes the place of torch.cuda.Stream: on the CPU everything happens in program order."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def wait_event(self, _: Any) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Event:
    """Takes the place of torch.cuda.Event: whatever was recorded has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, _: Any = None) -> None:
        pass

    def wait(self, _: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class _StandIn(types.ModuleType):
    """A module with some names of its own; what else is asked of it comes from `original`."""

    def __init__(self, original: types.ModuleType, names: dict[str, Any]) -> None:
        super().__init__(original.__name__, f"{original.__name__} as {PACKAGE} sees it without CUDA")
        self.__dict__.update(names, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


_FACTORIES = ("arange", "empty", "eye", "full", "ones", "rand", "randint", "randn", "tensor", "zeros")
_FACTORIES_LIKE = ("empty_like", "full_like", "ones_like", "zeros_like")


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):  # means nothing without a GPU, and raises
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def _torch_stand_in() -> types.ModuleType:
    stream = Stream()

    def nothing(*_: Any, **__: Any) -> None:
        pass

    def get_rng_state(*_: Any, **__: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    cuda = _StandIn(
        torch.cuda,
        {
            "current_device": lambda: CPU,
            "set_device": nothing,
            "synchronize": nothing,
            "empty_cache": nothing,
            "Stream": Stream,
            "Event": Event,
            "current_stream": lambda *_: stream,
            "default_stream": lambda *_: stream,
            "set_stream": nothing,
            "stream": lambda _: contextlib.nullcontext(),
            "is_current_stream_capturing": lambda: False,
            "get_rng_state": get_rng_state,
            "set_rng_state": set_rng_state,
            "manual_seed": manual_seed,
            "random": _StandIn(torch.cuda.random, {"get_rng_state": get_rng_state, "set_rng_state": set_rng_state}),
        },
    )
    # A copy of the names, so that looking one up costs what it costs in torch itself.
    names = {key: value for key, value in vars(torch).items() if not key.startswith("__")}
    names.update({name: _on_cpu(getattr(torch, name)) for name in _FACTORIES + _FACTORIES_LIKE}, cuda=cuda)
    return _StandIn(torch, names)


TORCH = _torch_stand_in()


def _give_stand_in(module: types.ModuleType) -> None:
    if vars(module).get("torch") is torch:
        module.torch = TORCH  # type: ignore[attr-defined]


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        _give_stand_in(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds megatron.core modules as usual, and has them given the stand-in once they are executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != PACKAGE and not fullname.startswith(f"{PACKAGE}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def _loaded_modules() -> Iterator[types.ModuleType]:
    for name, module in list(sys.modules.items()):
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            yield module


def _scope_torch() -> None:
    sys.meta_path.insert(0, _Finder())
    for module in _loaded_modules():
        _give_stand_in(module)


# --- replacements -----------------------------------------------------------------------------------------------------


def _resolve(target: str) -> Any:
    """The object that "module:attribute.path" names."""
    module, path = target.split(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def _replace_function(target: str, make: Callable[[Any], Any]) -> None:
    """Put make(original) in place of a function, also where other modules have imported it by name."""
    original = _resolve(target)
    replacement = make(original)
    for module in _loaded_modules():
        for name, value in list(vars(module).items()):
            if value is original:
                setattr(module, name, replacement)


def _split_sizes_to_numpy(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    return move


def _gather_uneven(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def gather(
        input_: Tensor, group: Any, output_split_sizes: Sequence[int] | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, *args, **kwargs)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: len(input_)] = input_
        gathered = input_.new_empty(len(sizes), *padded.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), padded, group=group)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    return gather


def _reduce_scatter_uneven(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reduce_scatter(
        input_: Tensor, group: Any, input_split_sizes: Sequence[int] | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return original(input_, group, input_split_sizes, *args, **kwargs)
        sizes = [int(size) for size in input_split_sizes]
        padded = input_.new_zeros(len(sizes), max(sizes), *input_.shape[1:])
        for row, part in zip(padded, input_.split(sizes), strict=True):
            row[: len(part)] = part
        output = torch.empty_like(padded[0])
        dist.reduce_scatter_tensor(output, padded.flatten(0, 1), group=group)
        return output[: sizes[group.rank()]].contiguous()

    return reduce_scatter


def _set_cpu_rng_state(_: Callable[..., Any]) -> Callable[..., None]:
    def set_state(new_state: Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    return set_state


def _rewrite(code: types.CodeType, constants: dict[str, str], names: dict[str, str]) -> types.CodeType:
    """The same code with other string constants and attribute names, in nested functions too."""

    def constant(value: Any) -> Any:
        if isinstance(value, types.CodeType):
            return _rewrite(value, constants, names)
        if isinstance(value, tuple):
            return tuple(constant(item) for item in value)
        return constants.get(value, value) if isinstance(value, str) else value

    return code.replace(
        co_consts=tuple(constant(value) for value in code.co_consts),
        co_names=tuple(names.get(name, name) for name in code.co_names),
    )


def _rewrite_functions(
    targets: Sequence[str], constants: dict[str, str] | None = None, names: dict[str, str] | None = None
) -> None:
    for target in targets:
        function: Any = inspect.unwrap(_resolve(target))  # what is under decorators,
        function = getattr(function, "__func__", function)  # and under a bound class method
        function.__code__ = _rewrite(function.__code__, constants or {}, names or {})


# --- the list ---------------------------------------------------------------------------------------------------------

_CPU_TYPE_NAMES = {f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")}
_GATHER = "megatron.core.tensor_parallel.mappings:_gather_along_first_dim"
_REDUCE_SCATTER = "megatron.core.tensor_parallel.mappings:_reduce_scatter_along_first_dim"
_SET_RNG = "megatron.core.tensor_parallel.random:_set_cuda_rng_state"
_MOVE = "megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu"
_COMPARE_TYPE_NAMES = (
    "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__",
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__",
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups",
    "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
)
_CALL_TENSOR_CUDA = (
    "megatron.core.models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer",
    "megatron.core.dist_checkpointing.exchange_utils:exchange_loaded_tensors_gather_rounds",
    "megatron.core.dist_checkpointing.exchange_utils:exchange_loaded_tensors_broadcast",
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.get_parameter_state_dp_zero",
    "megatron.core.tensor_parallel.data:broadcast_data",
)


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="scoped-torch",
        why="devices, streams, events and generator state of torch.cuda, and factories with device='cuda', raise",
        until="Megatron takes the device from its configuration or from torch.accelerator",
        targets=("megatron.core.tensor_parallel.mappings:torch", "megatron.core.pipeline_parallel.schedules:torch"),
        sites=(
            Site("models/common/embeddings/rotary_pos_embedding.py", 162, 162, "torch.cuda.current_device()"),
            Site("tensor_parallel/layers.py", 552, 647, "torch.cuda.current_device()"),
            Site("tensor_parallel/mappings.py", 141, 145, "torch.cuda.current_device()"),
            Site("tensor_parallel/random.py", 237, 305, "torch.cuda.manual_seed(seed)"),
            Site("transformer/moe/router.py", 90, 98, "torch.cuda.current_device()"),
            Site("transformer/moe/token_dispatcher.py", 445, 469, "torch.cuda.Stream()"),
            Site("transformer/moe/token_dispatcher.py", 871, 922, "torch.cuda.current_stream()"),
            Site("transformer/moe/shared_experts.py", 123, 192, "torch.cuda.Stream()"),
            Site("pipeline_parallel/p2p_communication.py", 321, 342, "torch.cuda.current_device()"),
            Site("pipeline_parallel/p2p_communication.py", 398, 419, "torch.cuda.synchronize()"),
            Site("pipeline_parallel/schedules.py", 596, 749, 'device="cuda"'),
            Site("pipeline_parallel/schedules.py", 2138, 2292, 'device="cuda"'),
            Site("optimizer/clip_grads.py", 90, 96, "device='cuda'"),
        ),
        apply=_scope_torch,
    ),
    Patch(
        name="rng-state",
        why="the state is handed to the generators of CUDA devices through a queue that never runs without CUDA: "
        "the tracker's fork() would leave every random number as it was, in silence",
        until="the tracker takes a generator, or a device",
        targets=(_SET_RNG,),
        sites=(Site("tensor_parallel/random.py", 111, 174, "_lazy_call(cb)"),),
        apply=lambda: _replace_function(_SET_RNG, _set_cpu_rng_state),
    ),
    Patch(
        name="all-to-all-split-sizes",
        why="split sizes become arrays only when moved from a GPU, and all_to_all_single rejects tensors",
        until="maybe_move_tensor_to_cpu honours as_numpy for CPU tensors",
        targets=(_MOVE,),
        sites=(Site("transformer/moe/moe_utils.py", 1093, 1184, "tensor.is_cuda"),),
        apply=lambda: _replace_function(_MOVE, _split_sizes_to_numpy),
    ),
    Patch(
        name="uneven-gather",
        why="gloo gathers parts of one size; with expert tensor parallelism they differ. Pad to the largest, then cut",
        until="gloo's all_gather takes a list of uneven tensors",
        targets=(_GATHER,),
        sites=(Site("tensor_parallel/mappings.py", 150, 154, "torch.distributed.all_gather("),),
        apply=lambda: _replace_function(_GATHER, _gather_uneven),
    ),
    Patch(
        name="uneven-reduce-scatter",
        why="as uneven-gather, for the way back",
        until="gloo's reduce_scatter takes a list of uneven tensors",
        targets=(_REDUCE_SCATTER,),
        sites=(Site("tensor_parallel/mappings.py", 193, 197, "torch.distributed.reduce_scatter("),),
        apply=lambda: _replace_function(_REDUCE_SCATTER, _reduce_scatter_uneven),
    ),
    Patch(
        name="tensor-type-names",
        why="dtypes are told apart by Tensor.type(), which says 'torch.FloatTensor' on the CPU; the names in these "
        "functions' code are changed",
        until="they compare dtypes",
        targets=_COMPARE_TYPE_NAMES,
        sites=(
            Site("optimizer/optimizer.py", 671, 1009, "torch.cuda.HalfTensor"),
            Site("optimizer/distrib_optimizer.py", 361, 401, "torch.cuda.HalfTensor"),
            Site("optimizer/distrib_optimizer.py", 582, 758, "torch.cuda.HalfTensor"),
            Site("optimizer/clip_grads.py", 167, 174, "torch.cuda.FloatTensor"),
        ),
        apply=lambda: _rewrite_functions(_COMPARE_TYPE_NAMES, constants=_CPU_TYPE_NAMES),
    ),
    Patch(
        name="tensor-cuda-method",
        why="Tensor.cuda() raises without CUDA; in these functions' code it becomes Tensor.cpu()",
        until="they move tensors to the device of the parameters or of the group",
        targets=_CALL_TENSOR_CUDA,
        sites=(
            Site("models/common/language_module/language_module.py", 244, 307, "weight.data.cuda()"),
            Site("dist_checkpointing/exchange_utils.py", 336, 339, ".cuda()"),
            Site("dist_checkpointing/exchange_utils.py", 499, 506, ".cuda()"),
            Site("optimizer/distrib_optimizer.py", 1089, 1374, "send_tensor.cuda()"),
            Site("tensor_parallel/data.py", 84, 84, ".cuda()"),
        ),
        apply=lambda: _rewrite_functions(_CALL_TENSOR_CUDA, names={"cuda": "cpu"}),
    ),
)

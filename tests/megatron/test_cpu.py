"""The patches: nothing is patched where there is CUDA, each is about something that exists, and each does what it says."""

from __future__ import annotations

import functools
import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vp2o.megatron.platform import compat, cpu
from megatron_vp2o.megatron.platform.patches import Patch
from megatron_vp2o.megatron.platform.repairs import REPAIRS
from tests.distributed import ROOT, run_distributed

pytestmark = pytest.mark.smoke  # they are about the installed megatron-core

NO_CUDA = not torch.cuda.is_available()
ALL = [*cpu.PATCHES, *REPAIRS]
without_cuda = pytest.mark.skipif(not NO_CUDA, reason="nothing is patched where there is CUDA")


@pytest.fixture(scope="module", autouse=True)
def enabled() -> list[str]:
    return cpu.enable_cpu()


def run_python(code: str) -> list[str]:
    """Lines printed by a fresh interpreter; what it writes to stderr fails the test."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


@without_cuda
def test_applied_patches_are_named_and_applied_once(enabled: list[str]) -> None:
    assert enabled == [patch.name for patch in cpu.PATCHES]
    finders = [finder for finder in sys.meta_path if isinstance(finder, cpu._Finder)]
    assert cpu.enable_cpu() == enabled
    assert [finder for finder in sys.meta_path if isinstance(finder, cpu._Finder)] == finders
    assert len(finders) == 1


def test_where_there_is_cuda_nothing_is_patched() -> None:
    """As it was before the call: all that megatron.core's modules and classes hold, their code, and torch itself."""
    code = """
import importlib, inspect, sys, types, torch
from megatron_vp2o.megatron.platform import compat
from megatron_vp2o.megatron.platform import cpu
compat.prepare()
torch.cuda.is_available = lambda: True
for target in [target for patch in cpu.PATCHES for target in patch.targets]:
    importlib.import_module(target.split(":")[0])

def held(owner):
    return {name: (id(value), id(getattr(inspect.unwrap(value), "__code__", None)) if callable(value) else None)
            for name, value in vars(owner).items() if name != "__warningregistry__"}

def everything():
    modules = [m for name, m in sys.modules.items() if name.startswith("megatron.core")] + [torch, torch.cuda]
    classes = [c for m in modules for c in vars(m).values() if inspect.isclass(c) and c.__module__ == m.__name__]
    return {str(owner): held(owner) for owner in [*modules, *classes, torch.Tensor]}, list(sys.meta_path), list(sys.modules)

before = everything()
assert len(before[0]) > 300
print(cpu.enable_cpu(), everything() == before)
"""
    assert run_python(code) == ["[] True"]


@without_cuda
def test_it_works_on_modules_that_are_loaded_and_on_those_that_come_later_in_silence() -> None:
    code = """
import sys, torch
from megatron_vp2o.megatron.platform import compat
from megatron_vp2o.megatron.platform import cpu
compat.quieten()
import megatron.core.models.gpt.gpt_layer_specs
assert "megatron.core.energy_monitor" not in sys.modules
cpu.enable_cpu()
import megatron.core.energy_monitor
seen = [vars(m).get("torch") for name, m in sys.modules.items() if name.startswith("megatron.core")]
print(sum(torch_ is cpu.TORCH for torch_ in seen) > 100, any(torch_ is torch for torch_ in seen))
"""
    assert run_python(code) == ["True False"]


def _resolve(target: str) -> Any:
    module, path = target.split(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.name)
def test_what_is_patched_exists(patch: Patch) -> None:
    assert patch.targets and all(_resolve(target) is not None for target in patch.targets)
    assert patch.why and patch.until


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.name)
def test_the_lines_that_make_it_necessary_are_where_it_says(patch: Patch) -> None:
    version = str(compat.megatron_version())
    if version not in ("0.16.1", "0.19.2"):
        pytest.skip(f"line numbers are of 0.16.1 and 0.19.2, not {version}")
    core = Path(importlib.import_module("megatron.core").__path__[0])
    lines = [(site, site.line_0_16_1 if version == "0.16.1" else site.line_0_19_2) for site in patch.sites]
    for site, line in lines:
        if line is not None:
            found = (core / site.file).read_text().splitlines()[line - 1]
            assert site.text in found, f"{site.file}:{line} is {found.strip()!r}"


@without_cuda
def test_torch_itself_is_untouched() -> None:
    assert isinstance(torch.zeros, type(len)) and isinstance(vars(torch._C.TensorBase)["cuda"], type(str.join))
    assert torch.Tensor.cuda is torch._C.TensorBase.cuda and torch.Tensor.type is torch._C.TensorBase.type
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()


@without_cuda
def test_the_stand_in_means_the_cpu() -> None:
    assert cpu.TORCH.cuda.current_device() == torch.device("cpu")
    assert cpu.TORCH.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    assert cpu.TORCH.empty_like(torch.zeros(1), device=torch.device("cuda", 0)).device.type == "cpu"
    assert cpu.TORCH.zeros(2, device="meta").device.type == "meta"
    assert cpu.TORCH.nn is torch.nn and cpu.TORCH.cuda.is_available is torch.cuda.is_available
    with cpu.TORCH.cuda.stream(cpu.TORCH.cuda.Stream()):
        assert cpu.TORCH.cuda.current_stream().record_event().query()
    with pytest.raises(AttributeError):
        cpu.TORCH.no_such_name  # noqa: B018


@without_cuda
def test_the_rng_tracker_forks_the_cpu_generator() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    outside = torch.get_rng_state()
    tracker.add("inside", 5)
    draws = []
    for _ in range(2):
        with tracker.fork("inside"):
            draws.append(torch.rand(3))
        assert torch.equal(torch.get_rng_state(), outside)
    assert torch.equal(torch.stack(draws), torch.rand(2, 3, generator=torch.Generator().manual_seed(5)))


@without_cuda
def test_split_sizes_become_arrays_wherever_the_function_was_imported() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    assert token_dispatcher.maybe_move_tensor_to_cpu is moe_utils.maybe_move_tensor_to_cpu
    sizes = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3, 0]), as_numpy=True)
    assert isinstance(sizes, np.ndarray) and sizes.tolist() == [3, 0]
    assert torch.is_tensor(token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3, 0])))
    assert token_dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None


@without_cuda
@pytest.mark.distributed
def test_uneven_parts_are_gathered_and_scattered_back() -> None:
    all_sizes = [[3, 1], [0, 2]]
    for rank, found in enumerate(run_distributed("tests.megatron.test_cpu:gather_uneven", 2, all_sizes)):
        for sizes, (gathered, gradient) in zip(all_sizes, found, strict=True):
            assert gathered == [[10.0 * source + row] for source, rows in enumerate(sizes) for row in range(rows)]
            assert gradient == [[3.0]] * sizes[rank]  # 1 from rank 0 and 2 from rank 1


def gather_uneven(all_sizes: list[list[int]]) -> list[Any]:
    """What a rank of the test above does: forward gathers, backward reduce-scatters."""
    import torch.distributed as dist

    cpu.enable_cpu()
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), []
    for sizes in all_sizes:
        mine = (10.0 * rank + torch.arange(sizes[rank])).unsqueeze(1).requires_grad_()
        gathered = gather_from_sequence_parallel_region(mine, group=dist.group.WORLD, output_split_sizes=sizes)
        ((rank + 1) * gathered).sum().backward()
        assert mine.grad is not None
        found.append((gathered.tolist(), mine.grad.tolist()))
    dist.destroy_process_group()
    return found


def _words(code: types.CodeType) -> tuple[set[str], set[str]]:
    """String constants and attribute names in a function's code, nested functions included."""
    constants: set[str] = set()
    names = set(code.co_names)
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            inner_constants, inner_names = _words(value)
            constants |= inner_constants
            names |= inner_names
        else:
            constants |= {item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, str)}
    return constants, names


@without_cuda
@pytest.mark.parametrize("target", cpu._COMPARE_TYPE_NAMES)
def test_rewritten_code_compares_with_the_cpus_type_names(target: str) -> None:
    constants, _ = _words(inspect.unwrap(_resolve(target)).__code__)
    assert not constants & {"torch.cuda.FloatTensor", "torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"}
    assert constants & {"torch.FloatTensor", "torch.HalfTensor"}


@without_cuda
@pytest.mark.parametrize("target", cpu._CALL_TENSOR_CUDA)
def test_rewritten_code_moves_tensors_to_the_cpu(target: str) -> None:
    _, names = _words(inspect.unwrap(_resolve(target)).__code__)
    assert "cuda" not in names and "cpu" in names

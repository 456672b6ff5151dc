"""Lets verl's Megatron engine run on a CPU: VERL_USE_EXTERNAL_MODULES=tests.plugins.verl_cpu VERL_PLATFORM=cpu. Tests only.

verl has no CPU platform of its own, and mbridge 0.15.1 builds models of transformer-engine's layers. What is here makes a platform,
gives mbridge this project's layer specs and translates its names of parameters.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

import mbridge.core.bridge as bridge  # noqa: E402
import mbridge.core.llm_bridge as llm_bridge  # noqa: E402
from verl.plugin.platform.platform_base import PlatformBase  # noqa: E402
from verl.plugin.platform.platform_manager import PlatformRegistry  # noqa: E402

from megatron_vp2o.config.schema import Implementation  # noqa: E402
from megatron_vp2o.megatron.model.attention import FusedCoreAttention  # noqa: E402
from megatron_vp2o.megatron.model.specs import layer_specs  # noqa: E402


def nothing(*args: Any, **kwargs: Any) -> None:
    """For what the CPU need not do."""


DEVICE = types.ModuleType("cpu_device")
DEVICE.__dict__.update(
    {
        name: nothing
        for name in (
            "empty_cache",
            "synchronize",
            "set_device",
            "reset_peak_memory_stats",
            "manual_seed",
            "manual_seed_all",
            "ipc_collect",
        )
    },
    **{
        name: lambda *args: 0
        for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    },
    current_device=lambda: "cpu",
    is_available=lambda: True,
    device_count=lambda: 1,
    mem_get_info=lambda *args: (1 << 30, 1 << 30),
    get_rng_state=lambda *args: torch.get_rng_state(),
    set_rng_state=lambda state, *args: torch.set_rng_state(state),
    get_device_name=lambda *args: "cpu",
    Stream=None,
)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """What verl asks of a device."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = DEVICE

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, index: int) -> None:
        pass

    def synchronize(self, index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, index: int = 0) -> tuple[None, None]:
        return (None, None)

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CPU_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, message: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, count: float) -> dict[str, float]:
        return {"num_cpus": count}

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def local_spec(self: Any, vp_stage: int | None = None) -> Any:
    self.has_vp_stage = True
    return layer_specs(self.config, Implementation.local)


llm_bridge.LLMBridge._get_transformer_layer_spec = local_spec
torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore # mbridge/core/util.py:151
torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore
torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore

_names = bridge.Bridge._weight_name_mapping_mcore_local_to_global


def transformer_engine_names(self: Any, model: Any, consider_ep: bool = True) -> dict[str, str]:
    """mbridge knows the names that transformer-engine's layers give; Megatron's local ones have others."""
    parallel = self.mpu.ep_size > 1 and consider_ep
    first = self.mpu.ep_rank * (self.config.num_moe_experts // self.mpu.ep_size) if parallel else 0
    found = {}
    for key, name in _names(self, model, False).items():
        name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
        found[key] = re.sub(
            r"experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight",
            lambda m: f"experts.{m[2]}.weight{int(m[1]) + first}",
            name,
        )
    return found


bridge.Bridge._weight_name_mapping_mcore_local_to_global = transformer_engine_names

_attention = FusedCoreAttention.forward


def causal(self: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
    """verl passes a [B, S] mask of what is no padding. Rows are padded on the right, so a causal mask is enough."""
    if mask is not None and mask.dim() == 2:
        mask = None
    return _attention(self, query, key, value, mask, *args, **kwargs)


FusedCoreAttention.forward = causal  # type: ignore

_init = torch.distributed.init_process_group


def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
    """verl asks for "cpu:gloo,cpu:gloo" (verl/utils/distributed.py)."""
    return _init("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)


torch.distributed.init_process_group = init_process_group

from verl.workers.engine import EngineRegistry, MegatronEngineWithLMHead  # noqa: E402

# verl registers its Megatron engine for "cuda" only: here it is also the one without the plug-in.
EngineRegistry.register(model_type="language_model", backend="megatron", device=["cpu"])(MegatronEngineWithLMHead)

"""What differs between the supported megatron-core versions; `prepare` also applies `repairs.py`.

Nothing here depends on the kind of device; that is `cpu.py`. Line numbers are of megatron/core in 0.16.1 and in 0.19.2.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.megatron.platform.repairs import REPAIRS

logger = logging.getLogger(__name__)

OLDEST, BEYOND = Version("0.16.1"), Version("0.20")


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

"""Runs a script of Megatron-LM's `pretrain()` on a CPU: `python -m tests.plugins.pretrain_on_cpu script.py arguments...`

megatron.training assumes CUDA in more places than megatron.core; what is changed for it is here, and only tests need it.
After the last step it writes losses and a checksum of the rank's weights to $PRETRAIN_RESULT.rank (JSON), and its weights before
the first and after the last step to $PRETRAIN_RESULT.rank.pt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import runpy
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

import megatron_vp2o
from megatron_vp2o.megatron.platform import cpu


def prepare() -> None:
    """Let megatron.training run without CUDA. Call before its first import."""
    cpu.PACKAGE = "megatron"
    cpu.enable_cpu()
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore
    import megatron.core.datasets.utils as dataset_utils
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("megatron.") and vars(module).get("torch") is torch:
            vars(module)["torch"] = cpu.TORCH
    nothing: dict[str, Any] = {
        name: lambda *args, **kwargs: 0
        for name in (
            "max_memory_allocated",
            "max_memory_reserved",
            "memory_allocated",
            "memory_reserved",
            "reset_peak_memory_stats",
        )
    }
    cpu.TORCH.cuda.__dict__.update(
        nothing,
        device_count=lambda: 1,
        memory_stats=lambda *args: {},
        get_device_properties=lambda *args: SimpleNamespace(major=9, total_memory=1),
    )
    training.initialize_megatron = partial(initialize.initialize_megatron, allow_no_cuda=True)
    dataset_utils.compile_helpers = lambda: None  # the wheel lacks the Makefile


def record() -> dict[str, Any]:
    """Keep what the training loop reports, and its model."""
    import megatron.training.training as training

    kept: dict[str, Any] = {"losses": [], "model": None}
    inner = training.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        kept["model"] = kwargs.get("model", args[2] if len(args) > 2 else None)
        if not kept["losses"]:
            kept["start"] = tensors(kept["model"])
        result = inner(*args, **kwargs)
        kept["losses"].append({name: float(value) for name, value in result[0].items()})
        return result

    training.train_step = train_step
    return kept


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """This rank's parameters by their names in the GPTModel."""
    chunk = model[0]
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return {name: parameter.detach().float().clone() for name, parameter in chunk.named_parameters()}


def main() -> None:
    script, sys.argv = sys.argv[1], sys.argv[1:]
    torch.set_num_threads(1)
    prepare()
    kept = record()
    dist.init_process_group("gloo")
    with contextlib.suppress(SystemExit):  # pretrain() exits once --exit-interval is reached
        runpy.run_path(script, run_name="__main__")
    digest, end, rank = hashlib.sha256(), tensors(kept["model"]), os.environ["RANK"]
    for name in sorted(end):
        digest.update(end[name].numpy().tobytes())
    torch.save({"start": kept["start"], "end": end}, f"{os.environ['PRETRAIN_RESULT']}.{rank}.pt")
    result = {"losses": kept["losses"], "weights": digest.hexdigest(), "package": megatron_vp2o.__file__}
    Path(f"{os.environ['PRETRAIN_RESULT']}.{rank}").write_text(json.dumps(result))


if __name__ == "__main__":
    main()

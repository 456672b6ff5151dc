"""verl's Megatron engine with the transform, the losses and the diagnostics in it.

Shape legend: B sequences of a micro-batch, S positions, T tokens as a MoE layer gets them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from verl.utils import tensordict_utils
from verl.workers.engine import MegatronEngineWithLMHead

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.megatron.platform.world import current_groups
from megatron_vp2o.plugins.hook import Plugged, plug_in
from megatron_vp2o.plugins.settings import read_settings

logger = logging.getLogger(__name__)

WHERE = "override_mcore_model_config.vp2o"
"""Where the settings stand in verl's tree, below its engine: `engine.` in SFT, `actor_rollout_ref.actor.megatron.` in PPO."""
STATE_FILE = "vp2o_stein.pt"
METRICS = "vp2o/"
"""Prefix of our metrics in verl's loggers."""


class VP2OEngine(MegatronEngineWithLMHead):
    """Registered under vendor "vp2o". With nothing switched on it does what its base class does."""

    def __init__(self, model_config: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
        given = engine_config.override_mcore_model_config or {}
        self.vp2o_config = read_settings(given.get("vp2o"), WHERE)
        self.plugged: Plugged | None = None
        super().__init__(model_config, engine_config, *args, **kwargs)
        if self.vp2o_config.active and self.engine_config.use_megatron_fsdp:
            raise ConfigError(
                "use_megatron_fsdp=True keeps no whole gradients to transform: set it to False, or vp2o off"
            )

        if self.vp2o_config.observes:
            _log_as_scalars()

    def _build_optimizer(self) -> Any:
        optimizer = super()._build_optimizer()
        self.plugged = plug_in(self.module, optimizer, self.vp2o_config, "verl")
        if self.plugged is None and dist.get_rank() == 0:
            print(f"megatron-vp2o is loaded in verl and switched off: set {WHERE}.stein.enabled=True", flush=True)
        return optimizer

    def train_batch(self, data: Any, loss_function: Callable[..., Any]) -> Any:
        """See the base class; the step's metrics come with verl's, under `vp2o/`."""
        if self.plugged is None:
            return super().train_batch(data, loss_function)
        self.plugged.before_step()
        outputs = super().train_batch(data, loss_function)
        self.plugged.after_step()
        if self.is_mp_src_rank_with_outputs():
            outputs["metrics"].update({f"{METRICS}{name}": value for name, value in self.plugged.metrics.items()})
        return outputs

    def forward_step(self, batch_iter: Iterator[Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        """See the base class. verl passes its padding to Megatron only in part; layers are told all of it."""
        if self.plugged is None or not torch.is_grad_enabled():
            return super().forward_step(batch_iter, model, *args, **kwargs)
        batch = next(batch_iter)
        self.plugged.count_only(self._valid_tokens(batch))
        return super().forward_step(iter([batch]), model, *args, **kwargs)

    def _valid_tokens(self, batch: Any) -> Tensor | None:
        """Which tokens of the coming micro-batch are no padding, [T]; None where there is none.

        Raises:
            ConfigError: for a layout in which it is not known.
        """
        length_B = batch["input_ids"].offsets().diff()
        ranks, context = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
        )
        settings = self.engine_config
        packed = bool(settings.use_remove_padding)
        longest = tensordict_utils.get_non_tensor_data(data=batch, key="forced_max_seqlen", default=None)
        if packed and context == 1 and ranks == 1 and not settings.pad_to_length and not self.tf_config.fp8:
            return None  # packed without a gap
        if context > 1 or self.tf_config.fp8 or settings.dynamic_context_parallel:
            raise ConfigError(
                f"context_parallel_size={context}, fp8={self.tf_config.fp8}: how verl pads then is not known to vp2o, and padding "
                "must not count in its statistics; set context_parallel_size=1 and no fp8, or vp2o off"
            )
        if (
            parallel_state.get_pipeline_model_parallel_world_size() > 1
            and self.tf_config.recompute_granularity == "full"
        ):
            raise ConfigError(
                "pipeline_model_parallel_size > 1 with recompute_granularity=full recomputes a micro-batch when another one's "
                "padding is known; set recompute_granularity=selective, or remove the padding (use_remove_padding=True at TP=1)"
            )
        valid = packed_mask if packed else padded_mask
        bucket = settings.pad_to_length_bucket if packed and settings.pad_to_length else None
        mask_T = valid(length_B, align=ranks, bucket=bucket, longest=longest)
        if self.tf_config.sequence_parallel and ranks > 1:
            mask_T = mask_T.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
        return mask_T

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """See the base class; the transform's state goes beside verl's files."""
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.plugged is not None and self.plugged.installed is not None:
            groups = current_groups()
            if groups.stage.rank() == 0:
                path = Path(local_path) / f"{STATE_FILE}.{groups.pp.rank()}"
                temporary = path.with_name(f".{path.name}")
                torch.save(self.plugged.installed.state_dict(), temporary)
                temporary.replace(path)
            dist.barrier()

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """See the base class."""
        state = None
        if self.plugged is not None and self.plugged.installed is not None and local_path is not None:
            state = _read_state(Path(local_path))  # before verl deletes the folder (del_local_after_load)
        super().load_checkpoint(local_path, *args, **kwargs)
        if self.plugged is None or self.plugged.installed is None or local_path is None:
            return
        if state is None:
            logger.warning(
                "%s has no state of the Stein transform (it is of a run without the plug-in): co-activation averages and "
                "prototypes start anew",
                local_path,
            )
            return
        self.plugged.installed.load_state_dict(state)


@functools.cache
def _log_as_scalars() -> None:
    """Let verl's workers hand our metrics on as numbers. They gather every metric over data-parallel ranks into a list, which the
    SFT trainers' loggers leave out and the PPO trainer flattens as if it held lists; ours are equal on all ranks.

    In a Ray actor the worker is of a class that `ray.remote` derives from TrainingWorker, and that has copies of its methods.
    """
    from verl.workers.engine_workers import TrainingWorker

    for kind in (TrainingWorker, *_derived(TrainingWorker)):
        if "_postprocess_output" in vars(kind):
            kind._postprocess_output = _with_scalars(kind._postprocess_output)


def _derived(kind: type) -> list[Any]:
    children: list[type] = kind.__subclasses__()
    return [*children, *(further for child in children for further in _derived(child))]


def _with_scalars(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def postprocess(self: Any, output: Any, **kwargs: Any) -> Any:
        result = inner(self, output, **kwargs)
        metrics = tensordict_utils.get(result, "metrics")
        for name, value in metrics.items():
            if name.startswith(METRICS) and isinstance(value, list):
                metrics[name] = value[0]
        return result

    return postprocess


def _read_state(folder: Path) -> dict[str, Any] | None:
    """The state of all stages' layers, from this rank's stage's first rank; None where the folder has none."""
    groups = current_groups()
    shared: list[Any] = [None]
    if groups.stage.rank() == 0:
        for path in sorted(folder.glob(f"{STATE_FILE}.*")):
            part = torch.load(path, map_location="cpu", weights_only=True)
            shared[0] = part if shared[0] is None else {**part, "layers": {**shared[0]["layers"], **part["layers"]}}
    if groups.stage.size() > 1:
        dist.broadcast_object_list(shared, group=groups.stage, group_src=0)
    found: dict[str, Any] | None = shared[0]
    return found


def padded_mask(length_B: Tensor, *, align: int, bucket: int | None = None, longest: int | None = None) -> Tensor:
    """Which tokens of a [B, S] micro-batch are no padding, in Megatron's order (position first), [T].

    Args:
        length_B: tokens of each sequence, which stand on the left.
        align: S is a multiple of it.
        longest: S before that, where it is more than the longest sequence.
    """
    width = int(length_B.max()) if longest is None else longest
    width = -(-width // align) * align
    return (torch.arange(width, device=length_B.device)[:, None] < length_B).flatten()


def packed_mask(length_B: Tensor, *, align: int, bucket: int | None = None, longest: int | None = None) -> Tensor:
    """Which tokens of sequences packed one after the other are no padding, [T].

    Args:
        length_B: tokens of each sequence.
        align: each sequence is padded to a multiple of it.
        bucket: the last one also until the total is a multiple of this.
    """
    padded_B = -(-length_B // align) * align
    if bucket is not None:
        padded_B[-1] += -padded_B.sum() % bucket
    total = int(padded_B.sum())
    start_B = padded_B.cumsum(0) - padded_B
    row_T = torch.repeat_interleave(torch.arange(len(length_B), device=length_B.device), padded_B, output_size=total)
    return torch.arange(total, device=length_B.device) - start_B[row_T] < length_B[row_T]

"""Our checkpoints and Hugging Face folders on the embedded engine: implements `model.Model` in the processes of the evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.export import CARRIED, hf_source, is_hf
from megatron_vp2o.config.names import CONFIG_FILE
from megatron_vp2o.config.schema import GRPOConfig, ParallelConfig, Precision, TrainConfig
from megatron_vp2o.config.store import load_config
from megatron_vp2o.config.validate import validate_layout
from megatron_vp2o.errors import CheckpointError, ConfigError
from megatron_vp2o.evaluation.engine_model import EngineModel
from megatron_vp2o.evaluation.run import step_of
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.settings import run_settings
from megatron_vp2o.hf.tensor_files import config_of
from megatron_vp2o.megatron.checkpoint import folder as files
from megatron_vp2o.megatron.stored import StoredModel
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl.interfaces import Tokenizer
from megatron_vp2o.tasks.tokenizer import load_tokenizer

BLOCKS, BLOCK = 64, 1 << 16
"""How many bytes of each file of weights tell one Hugging Face folder from another."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One stored model."""

    label: str
    folder: Path
    step: int


def checkpoints(label: str, place: str, steps: str) -> list[Checkpoint]:
    """What a place holds: a run's checkpoints, one checkpoint, or a Hugging Face folder.

    Args:
        steps: `every`, `last`, or numbers with commas; for runs only.

    Raises:
        CheckpointError: there is nothing, or not that step.
    """
    folder = Path(place)
    if is_hf(folder):
        return [Checkpoint(label, folder, step_of(folder))]
    last = files.resolve(folder)
    if last == folder or steps == "last":
        return [Checkpoint(label, last, step_of(last))]
    found = {step_of(path): path for path in sorted(last.parent.glob("step_*")) if (path / files.MANIFEST).is_file()}
    if steps == "every":
        return [Checkpoint(label, path, step) for step, path in sorted(found.items())]
    try:
        wanted = [int(step) for step in steps.split(",")]
    except ValueError:
        raise ConfigError(f"--steps {steps}: every, last, or numbers as in 80,160") from None
    if missing := [step for step in wanted if step not in found]:
        raise CheckpointError(
            f"{place} has no checkpoint of step {', '.join(map(str, missing))}, only of {', '.join(map(str, sorted(found)))}"
        )
    return [Checkpoint(label, found[step], step) for step in wanted]


def config_for(
    checkpoint: Checkpoint, parallel: ParallelConfig, batch: int, world_size: int, room: int | None = None
) -> TrainConfig:
    """Model settings of a checkpoint under the evaluation's layout.

    Args:
        room: tokens of the longest prompt with its answer; None for what the checkpoint says. Rotary positions have no
            weights, so that any number can be computed; beyond the checkpoint's the model was not trained.

    Raises:
        CheckpointError: nothing says which model it is, or it is none that the embedded engine runs.
        ConfigError: the layout does not fit.
    """
    folder = checkpoint.folder
    run = folder.parent.parent
    if is_hf(folder) or not (run / CONFIG_FILE).is_file():
        source = hf_source(folder)
        if source is None:
            raise CheckpointError(
                f"{folder} has no config.json, and {run} no {CONFIG_FILE}: nothing says which model this is"
            )
        config = _hf_config(source)
    else:
        config = load_config(run)
    config = dataclasses.replace(
        config, parallel=parallel, rollout=dataclasses.replace(config.rollout, max_batch_size=batch)
    )
    # how it was trained has no part in this, and its batches need not fit these processes
    config = dataclasses.replace(config, algorithm=_any_world(world_size))
    if room is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, max_sequence_length=room))
    validate_layout(config, world_size)
    return config


def _any_world(world_size: int) -> GRPOConfig:
    return GRPOConfig(prompts_per_step=world_size, group_size=1, minibatches=1)


def _hf_config(source: Path) -> TrainConfig:
    """Settings of a Hugging Face checkpoint's model; everything else as it is by default."""
    stored = config_of(source)
    settings = run_settings(architecture(stored))
    config = compose("train", [f"model.{name}={_word(value)}" for name, value in settings.items()])
    dtype = str(stored.get("dtype") or stored.get("torch_dtype") or "float32")
    precision = Precision.fp32 if dtype == "float32" else Precision.bf16
    longest = int(stored.get("max_position_embeddings") or config.model.max_sequence_length)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, precision=precision, max_sequence_length=longest)
    )


def _word(value: Any) -> str:
    """As an override says it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer beside the weights; raises ConfigError where there is none."""
    for folder in (checkpoint.folder, checkpoint.folder / CARRIED):
        if any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
            return load_tokenizer(folder)
    return load_tokenizer(checkpoint.folder)


def identity_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells these weights from others."""
    if not is_hf(checkpoint.folder):
        manifest = (checkpoint.folder / files.MANIFEST).read_bytes()
        return {"kind": "megatron", "checkpoint": hashlib.sha256(manifest).hexdigest()[:16]}
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for block in range(BLOCKS):
                file.seek(max(0, size - BLOCK) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return {"kind": "hf", "weights": digest.hexdigest()[:16]}


class Loader:
    """Checkpoints one after the other; a model that the next one shares is kept."""

    def __init__(
        self, groups: Groups, parallel: ParallelConfig, batch: int, thinking: bool | None, room: int | None = None
    ) -> None:
        self._groups, self._parallel, self._batch, self._thinking, self._room = groups, parallel, batch, thinking, room
        self._stored: StoredModel | None = None
        self._made_of: Any = None

    def load(self, checkpoint: Checkpoint) -> Embedded:
        """The model with these weights; the one before must not be used any more. Collective."""
        config = config_for(checkpoint, self._parallel, self._batch, self._groups.world_size, self._room)
        tokenizer = tokenizer_of(checkpoint)
        made_of = (config.model, tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.pad_id)
        if self._stored is None or self._made_of != made_of:
            self._stored = None  # before the next one takes memory
            self._stored = StoredModel(
                config,
                self._groups,
                vocab_size=tokenizer.vocab_size,
                eos_ids=tokenizer.eos_ids,
                pad_id=tokenizer.pad_id,
            )
            self._made_of = made_of
        for sentence in self._stored.load(checkpoint.folder, checkpoint.step):
            logger.info(sentence)
        return Embedded(checkpoint, config, self._stored, tokenizer, self._thinking)


class Embedded(EngineModel):
    """One checkpoint on the embedded engine."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: TrainConfig,
        stored: StoredModel,
        tokenizer: Tokenizer,
        thinking: bool | None,
    ) -> None:
        super().__init__(
            checkpoint.label,
            checkpoint.step,
            {**identity_of(checkpoint), "precision": config.model.precision.value},
            engine=stored.engine,
            groups=stored.groups,
            tokenizer=tokenizer,
            room=config.model.max_sequence_length,
            thinking=thinking,
            where=str(checkpoint.folder),
        )


def models(loader: Loader, found: Sequence[Checkpoint]) -> Iterator[Embedded]:
    """Each when its turn comes."""
    for checkpoint in found:
        yield loader.load(checkpoint)

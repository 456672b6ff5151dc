"""How a run starts from a checkpoint, Megatron's or Hugging Face's, and what it is exported as at the end."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_vp2o.config.export import hf_source, is_hf, plain
from megatron_vp2o.config.schema import SupervisedConfig, TrainConfig
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.hf import source as hf_files
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.output import COMPARED
from megatron_vp2o.hf.settings import hf_config, run_settings
from megatron_vp2o.hf.tensor_files import config_of
from megatron_vp2o.megatron.checkpoint import checkpointer as checkpoint
from megatron_vp2o.megatron.hf.compare import compare_live
from megatron_vp2o.megatron.hf.export import export_hf
from megatron_vp2o.megatron.hf.load import load_hf
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.parallel.groups import Groups, first_rank_says
from megatron_vp2o.rl.interfaces import Tokenizer

logger = logging.getLogger(__name__)


def with_own_tokenizer(config: TrainConfig) -> TrainConfig:
    """The configuration with the tokenizer of the checkpoint that the run starts from, where it has one and none is named."""
    if config.init_from is None or config.task.tokenizer is not None:
        return config
    source = hf_source(Path(config.init_from))
    if source is None or not hf_files.has_tokenizer(source):
        return config
    logger.info("task.tokenizer=%s: the tokenizer of the checkpoint that the run starts from", source)
    return dataclasses.replace(config, task=dataclasses.replace(config.task, tokenizer=str(source)))


def check_model(config: TrainConfig) -> None:
    """Refuse to start from a Hugging Face checkpoint of another model than the settings'.

    Raises:
        ConfigError: with all settings that differ, and what to set.
        CheckpointError: the checkpoint's model cannot be trained here.
    """
    if config.init_from is None or not is_hf(Path(config.init_from)):
        return
    wanted = run_settings(architecture(config_of(Path(config.init_from))))
    here = {name: plain(getattr(config.model, name)) for name in wanted}
    differing = [name for name, value in wanted.items() if here[name] != value]
    if differing:
        values = ", ".join(f"model.{name} is {wanted[name]} there and {here[name]} here" for name in differing)
        fix = " ".join(f"model.{name}={_word(wanted[name])}" for name in differing)
        raise ConfigError(f"init_from={config.init_from} is of another model ({values}): set {fix}")


def _word(value: Any) -> str:
    """As an override says it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def start(config: TrainConfig, policy: MegatronPolicy, tokenizer: Tokenizer, groups: Groups) -> None:
    """Take the weights that the run starts from, and keep what a Hugging Face checkpoint has beside them. Collective.

    Raises:
        CheckpointError: they are damaged, of another model, or compute something else than transformers.
    """
    if config.init_from is None:
        return
    origin = Path(config.init_from)
    if is_hf(origin):
        for sentence in load_hf(policy.model, origin, groups):
            logger.info(sentence)
        policy.optimizer.reload_model_params()  # where it has a float32 copy
        said = "logits were not compared with transformers': checkpoint.compare_logits=false"
        if config.checkpoint.compare_logits:
            said = compare_live(policy.model, origin, groups)
        logger.info("init_from=%s: %s", origin, said)
    else:
        # One rank's answer: whoever writes there may add a newer checkpoint at any moment.
        folder = first_rank_says(checkpoint.resolve(origin), groups.world)
        checkpoint.load_weights(folder, policy)
        if (folder / COMPARED).is_file():
            logger.info("init_from=%s: when it was converted, %s", origin, (folder / COMPARED).read_text().strip())
        elif hf_source(folder) is not None:
            logger.info("init_from=%s: logits were not compared with transformers': its weights are not here", origin)
    source = hf_source(origin)
    if groups.rank == 0 and source is not None:
        _keep(source, config, tokenizer)


def _keep(source: Path, config: TrainConfig, tokenizer: Tokenizer) -> None:
    named = _tokenizer_folder(config)
    if named is not None and named.resolve() == source.resolve():
        hf_files.keep(source, Path(config.run_dir))
        return
    save: Callable[[Path], None] = tokenizer.save
    if named is not None:
        save = lambda folder: hf_files.copy_files(named, folder, hf_files.TOKENIZER_FILES)  # noqa: E731
    ids = {"eos_token_id": _ends(tokenizer), "pad_token_id": tokenizer.pad_id}
    hf_files.keep(source, Path(config.run_dir), save_tokenizer=save, ids=ids)


def _tokenizer_folder(config: TrainConfig) -> Path | None:
    algorithm = config.algorithm
    named = algorithm.data.tokenizer if isinstance(algorithm, SupervisedConfig) else None
    named = named or config.task.tokenizer
    return None if named is None else Path(named)


def _ends(tokenizer: Tokenizer) -> int | list[int]:
    ends = list(tokenizer.eos_ids)
    return ends if len(ends) > 1 else tokenizer.eos_id


def export(config: TrainConfig, policy: MegatronPolicy, tokenizer: Tokenizer, groups: Groups, target: Path) -> None:
    """Write the policy as a Hugging Face checkpoint: of the model that the run started from, with that one's files unchanged, or
    of the family that has the model. Collective.

    Raises:
        CheckpointError: as `export_hf`; or no family has the model.
    """
    policy.gather_parameters()
    settings, save = described(config, policy, tokenizer)
    export_hf(policy.model, settings, groups, target, save_tokenizer=save, overwrite=True)


def described(
    config: TrainConfig, policy: MegatronPolicy, tokenizer: Tokenizer
) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """What the policy's config.json is as a Hugging Face checkpoint, and what writes the files beside it to a folder.

    Raises:
        CheckpointError: no family has the model.
    """
    kept = hf_files.kept(Path(config.run_dir))
    if kept is None:
        settings = hf_config(config.model, policy.model_vocab, eos_id=_ends(tokenizer), pad_id=tokenizer.pad_id)
        return settings, tokenizer.save
    dtype = "bfloat16" if policy.model.config.params_dtype is torch.bfloat16 else "float32"
    return hf_files.exported_config(kept, dtype), lambda folder: hf_files.copy_files(kept, folder)

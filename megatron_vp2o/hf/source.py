"""What a run keeps of the Hugging Face checkpoint that it started from, and gives to what it exports: config.json, tokenizer,
chat template, generation settings, everything but the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vp2o.config.export import SOURCE
from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf import tensor_files
from megatron_vp2o.hf.output import companions
from megatron_vp2o.hf.tensor_files import config_of

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files that belong to a tokenizer and its ids."""


def keep(
    source: Path,
    run_dir: Path,
    *,
    save_tokenizer: Callable[[Path], None] | None = None,
    ids: Mapping[str, Any] | None = None,
) -> None:
    """Copy the files beside the weights into the run's folder, unless it has them. One process.

    Args:
        save_tokenizer: writes the files of the run's own tokenizer, where that is not the source's.
        ids: fields of config.json that are the run's then.

    Raises:
        CheckpointError: they cannot be written.
    """
    target, part = run_dir / SOURCE, run_dir / f".{SOURCE}"
    if target.exists():
        return
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for path in companions(source):
            if path.name != tensor_files.INDEX and (save_tokenizer is None or path.name not in TOKENIZER_FILES):
                shutil.copyfile(path, part / path.name)
        if save_tokenizer is not None:
            save_tokenizer(part)
            text = json.dumps({**config_of(source), **(ids or {})}, indent=2)
            (part / "config.json").write_text(text + "\n", encoding="utf-8")
        part.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written ({error}): make room or correct the permissions") from error


def kept(run_dir: Path) -> Path | None:
    """The folder of these files in a run's folder; None for a run that started otherwise."""
    return run_dir / SOURCE if (run_dir / SOURCE / "config.json").is_file() else None


def exported_config(source: Path, dtype: str) -> dict[str, Any]:
    """The source's config.json for weights of another dtype."""
    config = config_of(source)
    config.pop("torch_dtype", None)  # the name before transformers 5
    return {**config, "dtype": dtype}


def copy_files(source: Path, folder: Path, names: Sequence[str] | None = None) -> None:
    """Copy all files but config.json, or those of these names that are there, unchanged."""
    for path in companions(source):
        if path.name in names if names is not None else path.name != "config.json":
            shutil.copyfile(path, folder / path.name)


def has_tokenizer(source: Path) -> bool:
    """Whether there is a tokenizer that transformers reads."""
    return any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))

"""A converted checkpoint as a training checkpoint of this program, so that a run can start from it (`init_from`)."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_vp2o.hf.mapping import Architecture
from megatron_vp2o.hf.settings import manifest_model
from megatron_vp2o.megatron.checkpoint import folder as files
from megatron_vp2o.megatron.platform.compat import megatron_version


def make_training_checkpoint(folder: Path, model: Architecture) -> None:
    """Write the manifest that `checkpoint.load_weights` asks for. The weights have no optimizer state with them."""
    files.write_json(folder / files.STATE, {})
    manifest = {
        "step": 0,
        "parts": ["model"],
        "model": manifest_model(model),
        "optimizer": {},
        "layout": {},
        "versions": {"megatron-core": str(megatron_version()), "torch": torch.__version__},
        "files": {name: files.describe(folder / name) for name in files.files_of(folder) if name not in LOOSE},
    }
    files.write_manifest(folder, json.loads(json.dumps(manifest)))


LOOSE = ("journal.jsonl", "lock")
"""Files of a conversion at work, gone when it is done."""

"""Tensors of a Hugging Face checkpoint that are not part of the model, as transformers sees it: they are left out, and said.

Rotary frequencies are computed from config.json; an output projection beside tied embeddings is the embedding once more;
layers for multi-token prediction are after those that config.json counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.mapping import Architecture
from megatron_vp2o.hf.tensor_files import INDEX, SINGLE, Entry, TensorFiles, bytes_of

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_ROWS = 2**20
"""Numbers of the two matrices of tied embeddings that are compared at once."""


def without_extras(files: TensorFiles, model: Architecture) -> tuple[TensorFiles, list[str]]:
    """The files with the model's tensors only, and sentences about what is left out.

    Raises:
        CheckpointError: the output projection is not the embedding that config.json ties it to.
    """
    kinds: list[tuple[str, Callable[[str], bool]]] = [
        ("rotary frequencies, which are computed from config.json", lambda name: "rotary_emb.inv_freq" in name),
        (
            "layers for multi-token prediction, which training and verification do not use",
            lambda name: _beyond(name, model),
        ),
        (
            f"the output projection: it is {_EMBEDDING}, and config.json ties the two",
            lambda name: model.tied and name == _OUTPUT,
        ),
    ]
    kept, said = dict(files.entries), []
    for what, belongs in kinds:
        names = [name for name in kept if belongs(name)]
        if names == [_OUTPUT]:
            _check_tied(files)
        for name in names:
            del kept[name]
        if names:
            said.append(
                f"{names[0] if len(names) == 1 else f'{len(names)} tensors such as {names[0]}'} left out: {what}"
            )
    if files.ignored_index:
        said.append(f"{INDEX} left out: there is a {SINGLE}, which transformers reads instead of what the index names")
    return replace(files, entries=kept), said


def _beyond(name: str, model: Architecture) -> bool:
    found = _LAYER.match(name)
    last = model.num_layers + model.prediction_layers
    return found is not None and model.num_layers <= int(found.group(1)) < last


def _check_tied(files: TensorFiles) -> None:
    output, embedding = files.entries[_OUTPUT], files.entries.get(_EMBEDDING)
    if embedding is None:
        return  # what is missing is listed later, with all else
    if (output.dtype, output.shape) != (embedding.dtype, embedding.shape) or not _same(files, output, embedding):
        raise CheckpointError(
            f"{files.folder}: config.json has tie_word_embeddings=true, and {_OUTPUT} is not {_EMBEDDING}: set it to false to "
            f"keep both, or remove {_OUTPUT}"
        )


def _same(files: TensorFiles, one: Entry, other: Entry) -> bool:
    width = max(1, one.size // max(1, one.rows) // one.dtype.itemsize)
    most = max(1, _ROWS // width)
    for first in range(0, one.rows, most):
        count = min(most, one.rows - first)
        if not torch.equal(*(bytes_of(files.read(entry, first, count)) for entry in (one, other))):
            return False
    return True

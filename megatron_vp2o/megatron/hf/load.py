"""A Hugging Face checkpoint loaded into a live, sharded model as it is: every rank reads what is its own, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_vp2o.hf.convert import read_piece, suspicion
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.left_out import without_extras
from megatron_vp2o.hf.mapping import Rule, fill
from megatron_vp2o.hf.plan import check_hf, make_plan, piece_of
from megatron_vp2o.hf.tensor_files import TensorFiles, config_of, open_folder
from megatron_vp2o.megatron.hf.weights import agree, local_tensors
from megatron_vp2o.parallel.groups import Groups


@torch.no_grad()
def load_hf(gpt: GPTModel, source: Path, groups: Groups) -> list[str]:
    """Fill this rank's part of the model. Collective; the extra memory is a few times the largest tensor.

    Args:
        gpt: this rank's GPTModel, without wrappers.

    Returns:
        Sentences about tensors of the folder that are no part of the model.

    Raises:
        CheckpointError: on all ranks: the folder is damaged, of another model than `gpt`, or has weights that are no numbers.
    """
    model = architecture(config_of(source))
    files, left_out = without_extras(open_folder(source), model)
    check_hf(make_plan(model), files.entries, str(source))
    local = local_tensors(gpt, model, groups)
    problems: list[str] = []
    for rule, layer, expert in model.instances():
        name = fill(rule.megatron, layer, expert)
        if name in local:
            problems += _fill(local[name], rule, layer, expert, files, gpt, groups)
    agree(problems, model, groups)
    return left_out


def _fill(
    target: Tensor,
    rule: Rule,
    layer: int | None,
    expert: int | None,
    files: TensorFiles,
    gpt: GPTModel,
    groups: Groups,
) -> list[str]:
    """Copy one tensor's part. Returns what is wrong with it."""
    parts = []
    for part in rule.parts:
        parts.append(read_piece(files, piece_of(part, layer, expert)))
        if (wrong := suspicion(parts[-1])) is not None:
            return [f"{fill(part.name, layer, expert)} {wrong}"]
    whole = rule.operation.to_megatron(parts)
    if rule.vocabulary:
        padding = whole.new_zeros((int(gpt.vocab_size) - whole.shape[0], *whole.shape[1:]))
        whole = torch.cat([whole, padding])
    mine = _part(whole, rule, tuple(target.shape), groups)
    if mine.shape != target.shape:
        return [
            f"{fill(rule.megatron, layer, expert)} is {list(target.shape)}, and the checkpoint makes it {list(mine.shape)}"
        ]
    target.copy_(mine)
    return []


def _part(whole: Tensor, rule: Rule, shape: tuple[int, ...], groups: Groups) -> Tensor:
    """What this rank has of a tensor: all of it where the layer spec does not split it."""
    axis = rule.split
    if axis is None or tuple(whole.shape) == shape:
        return whole
    group = groups.etp if rule.per_expert else groups.tp
    halves = whole.chunk(2) if rule.halves else (whole,)  # gate and up are split separately
    return torch.cat([half.chunk(group.size(), dim=axis)[group.rank()] for half in halves])

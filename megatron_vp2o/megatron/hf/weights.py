"""The weights of a live, sharded model as Hugging Face tensors: for weight synchronisation and for export.

Works bucket by bucket: the shards of some tensors are gathered over tensor (or expert tensor) parallelism, an expert's also
over expert parallelism, and all of them over pipeline parallelism. The extra memory is a few times the bucket, or one
Hugging Face tensor where that holds all experts, whatever the size of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.mapping import Architecture, Rule, fill
from megatron_vp2o.hf.tensor_files import listed
from megatron_vp2o.megatron.model.build import global_parameter_name
from megatron_vp2o.parallel.groups import Groups, gather_rows

BUCKET = 64 * 2**20


@dataclass(frozen=True)
class _Wanted:
    """A Megatron tensor, with its padding, and who has it."""

    rule: Rule
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    stage: int
    expert_rank: int

    @property
    def name(self) -> str:
        return fill(self.rule.megatron, self.layer, self.expert)

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def source(self) -> tuple[Any, ...]:
        """Equal for those that travel together."""
        return self.stage, self.rule.per_expert, self.expert_rank, self.dtype


def hf_tensors(
    gpt: GPTModel, model: Architecture, groups: Groups, *, bucket_bytes: int = BUCKET
) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor once, as (name, tensor), on every rank, in an order that is the same for all layouts.

    Collective: all ranks must take all tensors. A tensor is the caller's: it shares no memory with the model.

    Args:
        gpt: this rank's GPTModel, without wrappers.
        model: what it is; see `hf.families.architecture`.
        bucket_bytes: of Megatron tensors gathered together (at least one is).

    Raises:
        CheckpointError: the model's parameters are not those of `model` (on all ranks, before the first tensor).
    """
    local = local_tensors(gpt, model, groups)
    wanted = _wanted(gpt, model, groups, local)
    stacks: dict[str, Tensor] = {}
    left: dict[str, int] = {}
    for bucket in _buckets(wanted, bucket_bytes):
        for item, tensor in zip(bucket, _gather(bucket, local, groups), strict=True):
            if item.rule.vocabulary:
                tensor = tensor[: model.vocab_size]
            for part, value in zip(item.rule.parts, item.rule.operation.to_hf(tensor), strict=True):
                name = fill(part.name, item.layer, item.expert)
                if not part.stacked:
                    yield name, value.clone(memory_format=torch.contiguous_format)
                    continue
                if name not in stacks:
                    stacks[name] = value.new_empty((model.num_experts, *part.shape))
                    left[name] = model.num_experts
                stacks[name][item.expert] = value
                left[name] -= 1
                if left[name] == 0:
                    yield name, stacks.pop(name)


def local_tensors(gpt: GPTModel, model: Architecture, groups: Groups) -> dict[str, Tensor]:
    """Global name in the local spec -> this rank's part, detached."""
    named = {**dict(gpt.named_parameters()), **dict(gpt.named_buffers())}
    known: dict[str, str] = {}
    for rule, layer, expert in model.instances():
        for name in (rule.megatron, *rule.stored):
            known.setdefault(fill(name, layer, expert), fill(rule.megatron, layer, expert))
    found: dict[str, Tensor] = {}
    unknown = []
    parameters = {name for name, _ in gpt.named_parameters()}
    for name, tensor in named.items():
        global_name = known.get(global_parameter_name(name, gpt, groups))
        if global_name is not None:
            found[global_name] = tensor.detach()
        elif name in parameters:
            unknown.append(f"unknown: {name} {list(tensor.shape)}")
    agree(unknown, model, groups)
    return found


def _wanted(gpt: GPTModel, model: Architecture, groups: Groups, local: dict[str, Tensor]) -> list[_Wanted]:
    """All tensors of the model in order, with who has them: every rank says what it has, rule by rule."""
    rules = {id(rule): number for number, rule in enumerate(model.rules)}
    mine: dict[tuple[int, int | None], str] = {}
    for rule, layer, expert in model.instances():
        tensor = local.get(fill(rule.megatron, layer, expert))
        if tensor is not None:
            mine[rules[id(rule)], layer] = str(tensor.dtype).removeprefix("torch.")
    held: list[Any] = [(groups.pp.rank(), mine)] * groups.world_size
    if groups.world_size > 1:
        dist.all_gather_object(held, held[0], group=groups.world)
    owners: dict[tuple[int, int | None], tuple[int, str]] = {}
    for stage, theirs in sorted(held, key=lambda item: item[0]):
        for key, dtype in theirs.items():
            owners.setdefault(key, (stage, dtype))
    each = model.num_experts // groups.ep.size()
    found, problems = [], []
    for rule, layer, expert in model.instances():
        owner = owners.get((rules[id(rule)], layer))
        if owner is None:
            problems.append(f"missing: {fill(rule.megatron, layer, expert)}")
            continue
        shape = rule.shape
        if rule.vocabulary:
            shape = (int(gpt.vocab_size), *shape[1:])
        dtype = getattr(torch, owner[1])
        found.append(_Wanted(rule, layer, expert, shape, dtype, owner[0], 0 if expert is None else expert // each))
    agree(problems, model, groups)
    agree(_misshapen(found, local, groups), model, groups)
    return found


def _misshapen(wanted: Sequence[_Wanted], local: dict[str, Tensor], groups: Groups) -> list[str]:
    return [
        f"wrong shape: {item.name} is {list(local[item.name].shape)} of {list(item.shape)}"
        for item in wanted
        if item.name in local and tuple(local[item.name].shape) != _shard_shape(item, groups, local[item.name])
    ]


def _ways(item: _Wanted, groups: Groups) -> int:
    if item.rule.split is None:
        return 1
    return groups.etp.size() if item.rule.per_expert else groups.tp.size()


def _shard_shape(item: _Wanted, groups: Groups, tensor: Tensor) -> tuple[int, ...]:
    """Shape of this rank's part: whole where the layer spec does not split it."""
    if item.rule.split is None or tuple(tensor.shape) == item.shape:
        return item.shape
    shape = list(item.shape)
    shape[item.rule.split] //= _ways(item, groups)
    return tuple(shape)


def agree(problems: list[str], model: Architecture, groups: Groups) -> None:
    """Raise CheckpointError on all ranks, with what any of them found. Collective."""
    everyone: list[Any] = [problems] * groups.world_size
    if groups.world_size > 1:
        dist.all_gather_object(everyone, problems, group=groups.world)
    together = sorted({problem for some in everyone for problem in some})
    if together:
        raise CheckpointError(listed(f"this is no {model.family} model of the given configuration", together))


def _buckets(wanted: Sequence[_Wanted], most: int) -> Iterator[list[_Wanted]]:
    bucket: list[_Wanted] = []
    for item in wanted:
        if bucket and (item.source != bucket[0].source or sum(other.size for other in bucket) + item.size > most):
            yield bucket
            bucket = []
        bucket.append(item)
    if bucket:
        yield bucket


def _gather(bucket: Sequence[_Wanted], local: dict[str, Tensor], groups: Groups) -> list[Tensor]:
    """The whole tensors of a bucket, on every rank."""
    first = bucket[0]
    expert = first.rule.per_expert
    total = sum(math.prod(item.shape) for item in bucket)
    whole = torch.empty(total, dtype=first.dtype, device=groups.device)
    if groups.pp.rank() == first.stage:
        if not expert or groups.ep.rank() == first.expert_rank:
            _gather_shards(bucket, local, groups.etp if expert else groups.tp, whole)
        if expert and groups.ep.size() > 1:
            dist.broadcast(whole, group=groups.ep, group_src=first.expert_rank)
    if groups.pp.size() > 1:
        dist.broadcast(whole, group=groups.pp, group_src=first.stage)
    sizes = [math.prod(item.shape) for item in bucket]
    return [flat.view(item.shape) for item, flat in zip(bucket, whole.split(sizes), strict=True)]


def _gather_shards(
    bucket: Sequence[_Wanted], local: dict[str, Tensor], group: dist.ProcessGroup, whole: Tensor
) -> None:
    """Fill `whole` with the tensors of a bucket, one after another."""
    shards = [local[item.name] for item in bucket]
    split = [tuple(shard.shape) != item.shape for item, shard in zip(bucket, shards, strict=True)]
    sent = [shard.reshape(-1) for shard, cut in zip(shards, split, strict=True) if cut]
    received = gather_rows(torch.cat(sent)[None], group) if sent else whole.new_empty((group.size(), 0))
    start = at = 0
    for item, shard, cut in zip(bucket, shards, split, strict=True):
        target = whole[start : start + math.prod(item.shape)].view(item.shape)
        start += target.numel()
        if not cut:
            target.copy_(shard)
            continue
        parts = [row[at : at + shard.numel()].view(shard.shape) for row in received]
        at += shard.numel()
        _join(item, parts, target)


def _join(item: _Wanted, parts: Sequence[Tensor], target: Tensor) -> None:
    """Shards in order of rank -> the whole tensor; of a gate-up tensor each has its part of both halves."""
    axis = item.rule.split
    assert axis is not None  # only what is split is gathered
    if not item.rule.halves:
        torch.cat(list(parts), dim=axis, out=target)
        return
    for half, pieces in zip(target.chunk(2), zip(*(part.chunk(2) for part in parts), strict=True), strict=True):
        half.copy_(torch.cat(pieces))

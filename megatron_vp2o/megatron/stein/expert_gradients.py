"""Where the reduced gradients of expert parameters lie, and the exchange over them.

Megatron's DistributedDataParallel keeps gradients in flat buffers. After reduction every replica holds all of its experts'
gradients; under the distributed optimizer each replica holds only its share of every bucket, and the rest of its buffer is
left over from before the reduction. Shares do not follow rows.

Shape legend: L MoE layers of this pipeline stage, E experts, e local experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.megatron.stein.expert_weights import ExpertWeights, OutputGradients, Row
from megatron_vp2o.parallel.exchange import ExpertExchange, Interval, Members, Unit
from megatron_vp2o.parallel.groups import Groups, gather_places
from megatron_vp2o.parallel.strided import matrix_of


class ExpertGradients:
    """The expert gradients of one pipeline stage.

    Args:
        chunks: DistributedDataParallel modules.
        layers: their experts.
        experts: E.
        chunk_bytes: bound of the exchange's workspace.

    Raises:
        ConfigError: where gradients are not in Megatron's buffers, or are sharded in a way not known here.
    """

    def __init__(
        self, chunks: Sequence[Any], layers: Sequence[ExpertWeights], groups: Groups, experts: int, chunk_bytes: int
    ) -> None:
        self.groups, self.experts = groups, experts
        self._layers, self._chunk_bytes = layers, chunk_bytes
        self._places = _places(chunks)
        self._sharded = any(place[0].ddp_config.use_distributed_optimizer for place in self._places.values())
        self._shards = groups.expert_dp.size() if self._sharded else 1
        self._members = _members(groups, self._shards)
        self._build()

    def of(self, parameter: Parameter) -> Tensor:
        """The reduced gradient, shaped like the parameter."""
        return parameter.main_grad  # type: ignore[attr-defined, no-any-return]

    @property
    def exchange(self) -> ExpertExchange:
        """Mixes the gradients of all experts."""
        return self._present()._exchange

    @property
    def outputs(self) -> list[OutputGradients]:
        """The output projections' gradients, one entry a layer."""
        return self._present()._outputs

    def mix(self, weights_LEE: Tensor) -> None:
        """Attraction, in place. A collective over the expert group (of all replicas, where they share the gradients)."""
        self.exchange.mix(weights_LEE)

    def norms(self) -> Tensor:
        """Norm of each expert's whole gradient, [L, E]. A collective over the stage's expert groups."""
        self._present()
        squares_LE = torch.zeros(len(self._layers), self.experts, device=self.groups.device)
        norms = [torch.linalg.vector_norm(rows_eP, dim=1).float() for rows_eP in self._whole]
        if self._pieces:
            norms.append(torch.stack(torch._foreach_norm(self._pieces)).float())
        if norms:
            squares_LE.view(-1).index_add_(0, self._owners, torch.cat(norms).square())
        for group in (self._members.group, self.groups.etp):
            if group.size() > 1:
                dist.all_reduce(squares_LE, group=group)
        return squares_LE.sqrt()

    def _present(self) -> ExpertGradients:
        """This, with views of where the gradients lie now: buffers may have been offloaded, and come back elsewhere."""
        if self._storage() != self._built_on:
            self._build()
        return self

    def _build(self) -> None:
        placed: list[tuple[int, Unit]] = []
        whole: list[Tensor] = []
        pieces: list[Tensor] = []
        owners_of_whole: list[int] = []
        owners_of_pieces: list[int] = []
        shard = self._members.shard[self._members.rank]
        for index, weights in enumerate(self._layers):
            first = index * self.experts + weights.first
            for rows in weights.parts.values():
                unit = Unit(
                    index, [row.of(self.of(row.parameter)) for row in rows], [self._intervals(row) for row in rows]
                )
                placed.append((self._places[rows[0].parameter][1] + rows[0].start, unit))
                if self._shards == 1 and (found := matrix_of(unit.rows)) is not None:  # one norm for all experts
                    order = range(len(rows))
                    whole.append(found[0])
                    owners_of_whole += [first + e for e in (reversed(order) if found[1] else order)]
                    continue
                for e, (flat, intervals) in enumerate(zip(unit.rows, unit.owned, strict=True)):
                    start, stop = intervals[shard]
                    if stop > start:
                        pieces.append(flat[start:stop])
                        owners_of_pieces.append(first + e)
        self._whole, self._pieces = whole, pieces
        self._owners = torch.tensor(owners_of_whole + owners_of_pieces, dtype=torch.long, device=self.groups.device)
        self._outputs = [weights.output_gradients(self.of) for weights in self._layers]
        units = [unit for _, unit in sorted(placed, key=lambda place: place[0])]  # in the order of the buffer
        rounded = all(parameter.dtype is torch.bfloat16 for parameter in self._parameters())
        self._exchange = ExpertExchange(units, self._members, self.experts, self._chunk_bytes, tf32=rounded)
        self._built_on = self._storage()

    def _parameters(self) -> Iterator[Parameter]:
        """One of each part of each layer."""
        return (rows[0].parameter for weights in self._layers for rows in weights.parts.values())

    def _storage(self) -> list[int]:
        return [self.of(parameter).data_ptr() for parameter in self._parameters()]

    def _intervals(self, row: Row) -> list[Interval]:
        """Which columns of a row each replica owns."""
        if self._shards == 1:
            return [(0, row.numel)]
        buffer, position, bucket = self._places[row.parameter]
        start = position + row.start
        data = buffer.buckets[bucket]
        share = data.grad_data.numel() // self._shards
        result = []
        for shard in range(self._shards):
            low = data.offset + shard * share - start
            result.append((min(max(low, 0), row.numel), min(max(low + share, 0), row.numel)))
        return result


def _places(chunks: Sequence[Any]) -> dict[Parameter, tuple[Any, int, int]]:
    """Parameter -> (buffer, position in it, bucket), for all expert parameters."""
    places: dict[Parameter, tuple[Any, int, int]] = {}
    for chunk in chunks:
        if not hasattr(chunk, "expert_parallel_buffers"):
            raise ConfigError(
                f"the Stein transform needs gradients in the buffers of Megatron's DistributedDataParallel, and the model is a "
                f"{type(chunk).__name__}: wrap it (FSDP is not supported)"
            )
        if chunk.ddp_config.num_distributed_optimizer_instances > 1:
            raise ConfigError(
                f"num_distributed_optimizer_instances={chunk.ddp_config.num_distributed_optimizer_instances}: the Stein "
                "hook supports 1"
            )
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            for parameter, (start, _, bucket) in buffer.param_index_map.items():
                places[parameter] = (buffer, start, bucket)
    return places


def _members(groups: Groups, shards: int) -> Members:
    """The group that exchanges: the expert-parallel ranks, and their replicas where these share the gradients."""
    if shards == 1:
        group = groups.ep
    elif groups.ep.size() == 1:
        group = groups.expert_dp
    elif groups.etp.size() == 1:
        group = groups.stage
    else:
        group = _same_part(groups)
    places = gather_places(groups, group)
    return Members(group, [place.ep for place in places], [place.expert_dp if shards > 1 else 0 for place in places])


def _same_part(groups: Groups) -> dist.ProcessGroup:
    """All ranks of the stage that hold the same part of each expert's width; made here, since Megatron has no such group."""
    places = gather_places(groups, groups.stage)
    ranks = sorted(place.rank for place in places if place.etp == groups.etp.rank())
    group = dist.new_group(ranks, timeout=groups.timeout, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group

"""One view over the routed experts of a Megatron MoE layer, whatever module holds them.

SequentialMLP has a module an expert, TEGroupedMLP one parameter an expert (`weight0`, `weight1`, ...), the older GroupedMLP one
parameter for all. Here they are rows: for each parameter of an expert (fc1, fc2, biases), each local expert's part of it.

Shape legend: E local experts, D hidden size, F expert intermediate size (this rank's shard).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.parallel.strided import matrix_of


@dataclass(frozen=True)
class Row:
    """One expert's part of a parameter."""

    parameter: Parameter
    start: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """The row of a tensor shaped like the parameter (its weight, its gradient), flat; a view."""
        return tensor.view(-1)[self.start : self.start + self.numel]


class _Stacked:
    """Rows of parameters as one matrix [E, P]. How they lie is found out once, and again where they have been moved; no view is
    kept, so that weights which a host loop offloads are not held here."""

    def __init__(self) -> None:
        self._where: tuple[int, int] | None = None
        self._beside = False

    def of(self, rows: Sequence[Row]) -> Tensor:
        """A view where the rows lie side by side in order, else a copy."""
        first, size = rows[0], rows[0].numel
        where = first.parameter.data_ptr(), rows[-1].parameter.data_ptr()
        if where != self._where:
            found = matrix_of([row.of(row.parameter.detach()) for row in rows])
            self._beside = found is not None and not found[1] and found[0].stride(0) == size
            self._where = where
        if not self._beside:
            return torch.stack([row.of(row.parameter.detach()) for row in rows])
        flat = first.parameter.detach()
        return flat.as_strided((len(rows), size), (size, 1), flat.storage_offset() + first.start)


@dataclass(frozen=True)
class ExpertWeights:
    """The routed experts of one layer on this rank.

    Attributes:
        layer: the layer's global number, from 1.
        first: global index of the first local expert.
        parts: parameter name -> one row a local expert, in order of expert.
        output: name of the output projection among the parts.
        transposed: True where the output projection lies as [F, D] (GroupedMLP) and not as torch's [D, F].
    """

    layer: int
    first: int
    parts: dict[str, list[Row]]
    output: str
    hidden: int
    transposed: bool = False
    _outputs: _Stacked = field(default_factory=_Stacked, repr=False, compare=False)

    @property
    def experts(self) -> int:
        return len(self.parts[self.output])

    def output_projection(self) -> Tensor:
        """W^T of all local experts, [E, D, F] float32: a copy, or a view where they lie side by side in float32."""
        stacked = self._outputs.of(self.parts[self.output])
        if self.transposed:
            return stacked.view(self.experts, -1, self.hidden).transpose(1, 2).float()
        return stacked.view(self.experts, self.hidden, -1).float()

    def output_gradients(self, of: Callable[[Parameter], Tensor]) -> OutputGradients:
        """Where the output projections' gradients lie; `of` gives a parameter's gradient, of its shape."""
        return OutputGradients([row.of(of(row.parameter)) for row in self.parts[self.output]], self.transposed)


class OutputGradients:
    """The gradients of one layer's output projections. Where they lie is found out once: a layer may have hundreds of experts.

    Args:
        rows: one a local expert, flat (`Row.of`); views that stay valid. Where they lie at equal distances, one product serves all.
        transposed: as `ExpertWeights.transposed`.
    """

    def __init__(self, rows: Sequence[Tensor], transposed: bool) -> None:
        self._rows, self._transposed = rows, transposed
        self._matrix = matrix_of(rows)

    def add(self, left_ED2: Tensor, right_E2F: Tensor) -> None:
        """Add left right, of rank two, to each expert's gradient."""
        dtype = self._rows[0].dtype
        first, second = left_ED2.to(dtype), right_E2F.to(dtype)
        if self._transposed:
            first, second = second.transpose(1, 2), first.transpose(1, 2)
        shape = first.shape[1], second.shape[2]
        if self._matrix is not None:
            matrix, reverse = self._matrix
            if reverse:
                first, second = first.flip(0), second.flip(0)
            strides = (matrix.stride(0), shape[1], 1)
            matrix.as_strided((len(self._rows), *shape), strides, matrix.storage_offset()).baddbmm_(first, second)
            return
        for flat, one, other in zip(self._rows, first, second, strict=True):
            flat.view(shape).addmm_(one, other)


class OutputProjections(Sequence[Tensor]):
    """`output_projection` of each layer, made anew whenever it is asked for."""

    def __init__(self, layers: Sequence[ExpertWeights]) -> None:
        self._layers = layers

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        return self._layers[index].output_projection()


def expert_weights(layer: Any) -> ExpertWeights:
    """The view for a MoELayer.

    Raises:
        ConfigError: for experts of a kind that is not known here.
    """
    module, hidden = layer.experts, int(layer.config.moe_latent_size or layer.config.hidden_size)
    first = int(layer.local_expert_indices[0])
    if hasattr(module, "local_experts"):
        parts: dict[str, list[Row]] = {}
        for expert in module.local_experts:
            for name, parameter in expert.named_parameters():
                parts.setdefault(name, []).append(Row(parameter, 0, parameter.numel()))
        return ExpertWeights(layer.layer_number, first, parts, "linear_fc2.weight", hidden)
    names = dict(module.named_parameters())
    if {"weight1", "weight2"} <= names.keys():
        parts = {name: _slices(parameter, module.num_local_experts) for name, parameter in names.items()}
        return ExpertWeights(layer.layer_number, first, parts, "weight2", hidden, transposed=True)
    parts, numbered = {}, re.compile(r"(.*(?:weight|bias))(\d+)$")
    for name, parameter in sorted(names.items(), key=lambda item: _order(item[0])):
        if match := numbered.match(name):
            parts.setdefault(match[1], []).append(Row(parameter, 0, parameter.numel()))
        elif name.endswith(("weight", "bias")):  # moe_single_grouped_weight: all experts in one
            parts[name] = _slices(parameter, module.num_local_experts)
    if "linear_fc2.weight" not in parts:
        raise ConfigError(
            f"experts of type {type(module).__name__} in layer {layer.layer_number}: the Stein transform knows "
            "SequentialMLP, GroupedMLP and TEGroupedMLP; choose one of them in the layer spec"
        )
    return ExpertWeights(layer.layer_number, first, parts, "linear_fc2.weight", hidden)


def _slices(parameter: Parameter, experts: int) -> list[Row]:
    size = parameter.numel() // experts
    return [Row(parameter, e * size, size) for e in range(experts)]


def _order(name: str) -> tuple[str, int]:
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)

"""How tensors of a Hugging Face checkpoint and of a Megatron model correspond: rules, as plain data.

A `Rule` says: this Megatron tensor is made of these Hugging Face tensors by that operation. It is read in both directions,
so there is one place where a name or a layout can be wrong. A family (`families/`) is a list of rules and the settings of
Megatron that make the same model.

Names are templates with {l}, the layer, and {e}, the expert, both counted over the whole model. Megatron's are those of
GPTModel's parameters; `stored` are the names in a distributed checkpoint where these differ.

Shape legend: n query heads, g key/value heads, d head width, D hidden, F intermediate, E experts.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Operation(Protocol):
    """A bijection between the tensors of a rule's parts and one Megatron tensor."""

    def shape(self, parts: Sequence[Shape]) -> Shape:
        """Shape of the Megatron tensor, computed by hand: meta tensors would make torch import 200 more modules."""
        ...

    def to_megatron(self, parts: Sequence[Tensor]) -> Tensor: ...

    def to_hf(self, tensor: Tensor) -> list[Tensor]: ...


@dataclass(frozen=True)
class Copy:
    """One tensor, as it is."""

    def shape(self, parts: Sequence[Shape]) -> Shape:
        return parts[0]

    def to_megatron(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


@dataclass(frozen=True)
class Transpose:
    """One matrix, transposed."""

    def shape(self, parts: Sequence[Shape]) -> Shape:
        return parts[0][::-1]

    def to_megatron(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].t()

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.t()]


@dataclass(frozen=True)
class GateUp:
    """Gate [F, D] and up [F, D] -> [2F, D], gate first (megatron/core/transformer/mlp.py, `glu`)."""

    def shape(self, parts: Sequence[Shape]) -> Shape:
        return _stacked(parts)

    def to_megatron(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.chunk(2))


@dataclass(frozen=True)
class InterleavedGateUp:
    """Columns g0 u0 g1 u1 ... ([D, 2F], or [2F] for a bias) -> [2F, D] (or [2F]), gate rows first."""

    def shape(self, parts: Sequence[Shape]) -> Shape:
        return parts[0][::-1]

    def to_megatron(self, parts: Sequence[Tensor]) -> Tensor:
        rows = parts[0].t() if parts[0].dim() == 2 else parts[0]
        return torch.cat([rows[0::2], rows[1::2]])

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        rows = torch.stack(tensor.chunk(2), dim=1).flatten(0, 1)
        return [rows.t() if rows.dim() == 2 else rows]


@dataclass(frozen=True)
class QKV:
    """q [n d, ...], k [g d, ...], v [g d, ...] -> one tensor, group by group: the group's queries, its key, its value
    (megatron/core/transformer/attention.py, `get_query_key_value_tensors`). Weights or biases."""

    groups: int
    width: int
    """d."""

    def shape(self, parts: Sequence[Shape]) -> Shape:
        return _stacked(parts)

    def to_megatron(self, parts: Sequence[Tensor]) -> Tensor:
        split = [part.reshape(self.groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(split, dim=1).flatten(0, 1)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        grouped = tensor.reshape(self.groups, -1, *tensor.shape[1:])
        parts = grouped.split([grouped.shape[1] - 2 * self.width, self.width, self.width], dim=1)
        return [part.flatten(0, 1) for part in parts]


def _stacked(parts: Sequence[Shape]) -> Shape:
    return (sum(part[0] for part in parts), *parts[0][1:])


class Layers(enum.Enum):
    """Which layers have the tensors of a rule."""

    none = "none"  # the model has them, once
    all = "all"
    dense = "dense"
    moe = "moe"


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor, or with `stacked` the slice {e} of one that holds all experts in its first dimension.

    `shape` is that of the tensor or of the slice.
    """

    name: str
    shape: tuple[int, ...]
    stacked: bool = False


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor (for each layer and expert) and the Hugging Face tensors that it is made of."""

    megatron: str
    parts: tuple[Part, ...]
    operation: Operation = Copy()
    layers: Layers = Layers.all
    split: int | None = None
    """The dimension that tensor parallelism splits (for experts, expert tensor parallelism); the halves of a gate-up
    tensor are split separately."""
    stored: tuple[str, ...] = ()
    """Names in a distributed checkpoint: the local spec's, then transformer-engine's. Empty: as in the model."""
    vocabulary: bool = False
    """The first dimension is the vocabulary, which Megatron pads."""
    keeps_dtype: bool = False
    """Not cast with the weights: Megatron keeps it in float32."""

    @property
    def per_expert(self) -> bool:
        return "{e}" in self.megatron

    @property
    def halves(self) -> bool:
        """Whether the first dimension is gate and up."""
        return isinstance(self.operation, (GateUp, InterleavedGateUp))

    @cached_property
    def shape(self) -> Shape:
        """Shape of the Megatron tensor, without padding."""
        return self.operation.shape([part.shape for part in self.parts])


@dataclass(frozen=True)
class Architecture:
    """A model: what its tensors are on both sides, and the settings with which Megatron computes the same function.

    Attributes:
        family: name of the family.
        moe_layers: for each layer, whether its feed-forward block is a mixture of experts.
        settings: fields of megatron.core's TransformerConfig (of MLATransformerConfig if `latent_attention`), as plain
            values: the activation function by name.
        embedding: arguments of GPTModel about positions, and what YaRN needs.
    """

    family: str
    num_layers: int
    vocab_size: int
    num_experts: int
    tied: bool
    moe_layers: tuple[bool, ...]
    rules: tuple[Rule, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    embedding: dict[str, Any] = field(default_factory=dict)
    latent_attention: bool = False
    qk_norm_over_heads: bool = False
    """The norm of queries and keys is over all heads together."""
    latent_norm_epsilon: float | None = None
    """Epsilon of the norms inside latent attention, where that is not `layernorm_epsilon`; Megatron has no setting for it."""
    prediction_layers: int = 0
    """Layers for multi-token prediction that a file may have after the others."""

    @property
    def uniform(self) -> bool:
        """Whether a distributed checkpoint stacks the layers: Megatron does unless their kinds are listed."""
        return "moe_layer_freq" not in self.settings

    def experts_of(self, rule: Rule) -> Sequence[int | None]:
        return range(self.num_experts) if rule.per_expert else [None]

    def instances(self) -> Iterator[tuple[Rule, int | None, int | None]]:
        """(rule, layer, expert) of every Megatron tensor, in the order of a forward pass."""
        first = [rule for rule in self.rules if rule.layers is Layers.none]
        layered = [rule for rule in self.rules if rule.layers is not Layers.none]
        for rule in first[:1]:
            yield rule, None, None
        for layer in range(self.num_layers):
            for rule in layered:
                if self._has(layer, rule):
                    for expert in self.experts_of(rule):
                        yield rule, layer, expert
        for rule in first[1:]:
            yield rule, None, None

    def _has(self, layer: int, rule: Rule) -> bool:
        return rule.layers is Layers.all or self.moe_layers[layer] == (rule.layers is Layers.moe)

    def hf_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and whole shape of every Hugging Face tensor."""
        found: dict[str, tuple[int, ...]] = {}
        for rule, layer, expert in self.instances():
            for part in rule.parts:
                shape = (self.num_experts, *part.shape) if part.stacked else part.shape
                found[fill(part.name, layer, expert)] = shape
        return found


def fill(template: str, layer: int | None, expert: int | None) -> str:
    """The name of a layer's and expert's tensor."""
    return template.replace("{l}", str(layer)).replace("{e}", str(expert))

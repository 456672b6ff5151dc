"""Megatron's output layer, which can leave its product to whoever computes log-probabilities in chunks of tokens.

Shape legend: s positions, b sequences, D hidden size, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_vp2o.parallel.output_logprobs import output_log_probs_and_entropy


class OutputLayer(ColumnParallelLinear):
    """ColumnParallelLinear that returns its input while `deferred` is set.

    Attributes:
        deferred: the model then returns hidden states, [b, s, D], for `log_probs`.
        most_logits: logits of this rank that may exist at a time in training and scoring.
        add_to_main_grad: `log_probs` adds the weight's gradient to `weight.main_grad` itself; see `GroupedSequentialMLP`.
    """

    deferred = False
    most_logits = 0
    add_to_main_grad = False
    _used: tuple[Tensor, ...] = ()  # in a tuple, since a module registers a parameter that becomes its attribute

    def defer_for(self, tokens: int, *, always: bool = False) -> bool:
        """Set `deferred` for a forward pass over so many tokens: if their logits are more than may exist at a time, or `always`."""
        self.deferred = always or tokens * self.output_size_per_partition > self.most_logits
        return self.deferred

    def forward(self, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """See the base class."""
        if not self.deferred:
            return super().forward(input_, weight, *args, **kwargs)
        self._used = (self.weight if weight is None else weight,)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, group=self.tp_group), None
        return copy_to_tensor_model_parallel_region(input_, group=self.tp_group), None

    def log_probs(
        self, hidden_bsD: Tensor, targets_bs: Tensor, *, temperature: float, valid_vocab: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets and entropies, [b, s], from what the model returned while `deferred`."""
        (weight,), self._used = self._used, ()
        logprob_T, entropy_T = output_log_probs_and_entropy(
            hidden_bsD.flatten(0, 1),
            weight,
            targets_bs.flatten(),
            temperature=temperature,
            valid_vocab=valid_vocab,
            group=group,
            chunk_tokens=max(1, self.most_logits // self.output_size_per_partition),
            weight_sum_VD=getattr(weight, "main_grad", None) if self.add_to_main_grad else None,
        )
        return logprob_T.view(targets_bs.shape), entropy_T.view(targets_bs.shape)


def own_output_layer(gpt: GPTModel, chunk_mib: float) -> None:
    """Make the output layer of a model that is built an `OutputLayer`, if this pipeline stage has one."""
    layer: Any = getattr(gpt, "output_layer", None)
    if type(layer) is ColumnParallelLinear:
        layer.__class__ = OutputLayer
        layer.most_logits = int(chunk_mib * 2**20) // 4


def unwrapped(model: Any) -> Any:
    """The GPTModel under any wrappers (DistributedDataParallel, Float16Module)."""
    while not hasattr(model, "decoder"):
        model = model.module
    return model


def output_layer_of(model: Any) -> OutputLayer | None:
    """The `OutputLayer` under any wrappers; None on other pipeline stages and for other layers."""
    layer = getattr(unwrapped(model), "output_layer", None)
    return layer if isinstance(layer, OutputLayer) else None

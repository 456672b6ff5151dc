"""Watching a Hugging Face MoE model through forward hooks: nothing of the model is changed.

Shape legend: B sequences, S positions, T = B * S tokens, E experts, K experts of a token, D hidden size, F expert
intermediate size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from megatron_vp2o.diagnostics.routing import (
    OVERLAP_TOKENS,
    LayerRecorder,
    RoutingReport,
    report_of,
    settled_prototypes,
)
from megatron_vp2o.errors import ConfigError

KNOWN = ("Qwen3-MoE", "Mixtral", "OLMoE", "DeepSeek-V3", "GPT-OSS")
"""Families that the tests watch."""


@dataclass
class _Block:
    """One MoE layer: its router and its experts, as transformers 5 builds them."""

    name: str
    router: nn.Module
    experts: nn.Module
    recorder: LayerRecorder
    prototypes_ED: Tensor | None = None


def observe(model: nn.Module, *, count_padding: bool = False) -> Observation:
    """Record the routing of every forward pass from now on, until `remove` (or the end of the `with` block).

    Args:
        model: a transformers model, or a module around one, whose MoE layers are transformers 5's: a router module that returns
            (logits, weights, indices) beside a module of fused experts.
        count_padding: count every token and do not look at `attention_mask`.

    Raises:
        ConfigError: if no such layer is in the model, or layers differ in their number of experts.
    """
    blocks = _blocks(model)
    return Observation(model, blocks, count_padding)


class Observation:
    """Hooks in a model, and what they have seen. Usable as a context manager."""

    def __init__(self, model: nn.Module, blocks: list[_Block], count_padding: bool) -> None:
        self._blocks = blocks
        self._valid_T: Tensor | None = None
        self._passes = 0
        self._handles = [model.register_forward_pre_hook(self._start, with_kwargs=True)]
        self._count_padding = count_padding
        signature = inspect.signature(model.forward)
        self._arguments = signature.bind_partial
        for block in blocks:
            self._handles.append(block.router.register_forward_hook(self._router_hook(block), with_kwargs=True))
            self._handles.append(block.experts.register_forward_hook(self._experts_hook(block), with_kwargs=True))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the MoE layers."""
        return tuple(block.name for block in self._blocks)

    def take(self, *, prototypes: bool = True, reduce: Callable[[Tensor], Tensor] | None = None) -> RoutingReport:
        """What was seen since the last call.

        Args:
            prototypes: measure the experts' principal output directions too, which reads all output projections.
            reduce: adds a float64 CPU tensor up over the ranks of a data-parallel run and returns the sum.

        Raises:
            ConfigError: if the model ran and its routers did not (a fused kernel has taken their place), or if prototypes are
                asked for of experts whose output projection is no floating-point parameter.
        """
        measured = self._prototypes() if prototypes else None
        recorders = [block.recorder for block in self._blocks]
        report = report_of(self.layers, recorders, reduce=reduce, prototypes=measured)
        passes, self._passes = self._passes, 0
        if passes and not bool((report.tokens_L > 0).any()) and not self._only_padding:
            raise ConfigError(
                f"the model ran {passes} times and the routers of its MoE layers ({self.layers[0]}, ...) were never called: a "
                "fused kernel has replaced their block; load the model without it (use_kernels=False)"
            )
        return report

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # --- hooks --------------------------------------------------------------------------------------------------------

    _only_padding = False

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass of the whole model begins: which of its tokens count?"""
        self._valid_T, self._only_padding = None, False
        self._passes += not _recomputing()
        if self._count_padding:
            return
        given = self._arguments(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        mask = given.get("attention_mask")
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ConfigError(
                f"attention_mask ({shape}) does not say which tokens are padding; it needs to be [batch, positions]: pass such a "
                "mask, or observe(model, count_padding=True) to count every token"
            )
        inputs = given.get("input_ids", given.get("inputs_embeds"))
        length = (
            mask.shape[1] if inputs is None else inputs.shape[1]
        )  # with a KV cache the mask is longer than the input
        self._valid_T = mask[:, -length:].bool().reshape(-1)
        self._only_padding = not bool(self._valid_T.any())

    def _router_hook(self, block: _Block) -> Callable[..., None]:
        @torch.no_grad()
        def hook(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if _recomputing():
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            selected_TK = output[2].reshape(-1, output[2].shape[-1])
            block.recorder.add_routing(
                selected_TK, _scores(router, hidden.reshape(-1, hidden.shape[-1])), self._valid(len(selected_TK))
            )

        return hook

    def _experts_hook(self, block: _Block) -> Callable[..., None]:
        @torch.no_grad()
        def hook(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if _recomputing():
                return
            given = [*args, *kwargs.values()]
            hidden, selected_TK = given[0].reshape(-1, given[0].shape[-1]), given[1]
            stride = max(1, len(hidden) // OVERLAP_TOKENS)
            valid_T = self._valid(len(hidden))
            chosen_TK = selected_TK[::stride]
            # Each (token, expert) as a token of its own with one expert and gate 1: the module itself says what comes out,
            # whatever its activation, bias or precision.
            slots = chosen_TK.numel()
            single = (
                hidden[::stride].repeat_interleave(chosen_TK.shape[1], dim=0),
                chosen_TK.reshape(slots, 1),
                given[2].new_ones(slots, 1),
            )
            outputs = experts.forward(*single)
            present_TK = torch.ones_like(chosen_TK, dtype=torch.bool)
            if valid_T is not None:
                present_TK &= valid_T[::stride, None]
            block.recorder.add_outputs(outputs.view(*chosen_TK.shape, -1), present_TK)

        return hook

    def _valid(self, tokens: int) -> Tensor | None:
        valid_T = self._valid_T
        if valid_T is not None and len(valid_T) != tokens:
            raise ConfigError(
                f"the model's attention_mask speaks of {len(valid_T)} tokens and a MoE layer got {tokens}: the model packs its "
                "rows; use observe(model, count_padding=True), which counts every token that a layer gets"
            )
        return valid_T

    # --- prototypes ---------------------------------------------------------------------------------------------------

    def _prototypes(self) -> tuple[Tensor, Tensor]:
        """Prototypes [L, E, D] of all layers and their residuals [L, E], with one layer's weights in float32 at a time."""
        residuals = []
        for number, block in enumerate(self._blocks):
            weight_EDF = _output_projections(block)
            block.prototypes_ED, residual_E = settled_prototypes(weight_EDF, number, block.prototypes_ED)
            residuals.append(residual_E)
        vectors = [block.prototypes_ED for block in self._blocks if block.prototypes_ED is not None]
        return torch.stack(vectors), torch.stack(residuals)


def _blocks(model: nn.Module) -> list[_Block]:
    found, others = [], []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        router = getattr(module, "gate", getattr(module, "router", None))
        if not isinstance(experts, nn.Module) or not isinstance(router, nn.Module):
            continue
        fused = getattr(experts, "down_proj", None)
        weight_ED = getattr(router, "weight", None)
        if not isinstance(fused, Tensor) or not isinstance(weight_ED, Tensor) or isinstance(router, nn.Linear):
            others.append(f"{name} ({type(module).__name__})")
            continue
        found.append(_Block(name, router, experts, LayerRecorder(weight_ED.shape[0])))
    if not found:
        seen = f"; these layers have experts of another make: {', '.join(others[:3])}" if others else ""
        raise ConfigError(
            f"{type(model).__name__} has no MoE layer as transformers 5 builds them (a router beside fused experts){seen}. "
            f"Tried with {', '.join(KNOWN)}"
        )
    counts = {block.recorder.experts for block in found}
    if len(counts) > 1:
        raise ConfigError(f"layers with different numbers of experts ({sorted(counts)}) have no common metrics")
    return found


def _scores(router: nn.Module, hidden_TD: Tensor) -> Tensor:
    """The router's scores of all experts before any selection, float32 [T, E]: sigmoid where it has a correction bias, else
    softmax. Made from the weights: what routers return first differs between families and releases."""
    weight_ED: Any = router.weight
    bias_E: Any = getattr(router, "bias", None)
    sigmoid = hasattr(router, "e_score_correction_bias")
    dtype = torch.float32 if sigmoid else weight_ED.dtype
    logits_TE = nn.functional.linear(
        hidden_TD.to(dtype), weight_ED.to(dtype), None if bias_E is None else bias_E.to(dtype)
    ).float()
    return logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)


def _output_projections(block: _Block) -> Tensor:
    """[E, D, F], as torch stores a projection from F to D."""
    weight: Any = block.experts.down_proj
    if not weight.is_floating_point() or weight.is_meta:
        raise ConfigError(
            f"{block.name}.experts.down_proj is {weight.dtype} on {weight.device}: prototypes need the experts' weights as "
            "floating-point numbers; load the model without quantisation, or take(prototypes=False)"
        )
    return weight.transpose(1, 2) if getattr(block.experts, "is_transposed", False) else weight


def _recomputing() -> bool:
    """Whether a backward pass is running: activation checkpointing then runs layers a second time."""
    return torch._C._current_graph_task_id() != -1

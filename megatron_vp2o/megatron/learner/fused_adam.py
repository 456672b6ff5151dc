"""torch's fused AdamW as Megatron's optimizer: one kernel for many parameters, in place of some ten operations each.

Megatron takes the optimizer of transformer-engine or Apex where they are installed, else plain AdamW without the fused kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_vp2o.config.schema import Implementation
from megatron_vp2o.megatron.model.specs import resolved


class FusedAdamW(torch.optim.AdamW):
    """AdamW with the fused kernel. Its checkpoints are plain AdamW's, both ways: which kernel computes is no part of them."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings, fused=True)

    def state_dict(self) -> dict[str, Any]:
        """As plain AdamW's."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group["fused"] = None
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take any AdamW's state. The fused kernel wants each count of steps beside its parameter."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["fused"], group["foreach"] = True, None
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if "step" in state:
                    steps = torch.as_tensor(state["step"])
                    state["step"] = steps.to(parameter.device, torch.float32, non_blocking=True, copy=True)


@contextmanager
def adamw_for(implementation: Implementation) -> Iterator[None]:
    """Inside, Megatron makes the AdamW of this implementation of the model."""
    if resolved(implementation) is not Implementation.torch:
        yield
        return
    plain = torch.optim.AdamW
    torch.optim.AdamW = FusedAdamW  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.optim.AdamW = plain  # type: ignore[misc]

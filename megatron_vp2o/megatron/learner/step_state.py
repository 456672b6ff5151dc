"""What forward and backward passes change of a model besides gradients, to be restored where a step does not happen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_vp2o.megatron.model.orthogonality_weight import OrthogonalityWeight


@dataclass(frozen=True)
class StepState:
    """Buffers of a model (Megatron moves expert biases when it has reduced gradients), states of random generators, and the
    first value of the orthogonality loss."""

    buffers: list[tuple[Tensor, Tensor]]
    """Each buffer with its value."""
    generator: Tensor
    device_generator: Tensor | None
    tracked_generators: dict[str, Tensor]
    """Megatron's, by name."""
    orthogonality: OrthogonalityWeight | None
    first: float | None

    @classmethod
    @torch.no_grad()
    def of(cls, model: torch.nn.Module, orthogonality: OrthogonalityWeight | None) -> StepState:
        """The present state. Costs a copy of the buffers, which are small, and no synchronisation."""
        return cls(
            [(buffer, buffer.clone()) for buffer in model.buffers()],
            torch.get_rng_state(),
            torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            dict(get_cuda_rng_tracker().get_states()),
            orthogonality,
            None if orthogonality is None else orthogonality.first,
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Make all of it what it was."""
        for buffer, value in self.buffers:
            buffer.copy_(value)
        torch.set_rng_state(self.generator)
        if self.device_generator is not None:
            torch.cuda.set_rng_state(self.device_generator)
        get_cuda_rng_tracker().set_states(dict(self.tracked_generators))
        if self.orthogonality is not None:
            self.orthogonality.first = self.first

    @torch.no_grad()
    def halve(self) -> None:
        """Move floating-point buffers half of the way back, as a halved step moves parameters."""
        for buffer, value in self.buffers:
            if buffer.is_floating_point():
                buffer.copy_(torch.lerp(value, buffer, 0.5))

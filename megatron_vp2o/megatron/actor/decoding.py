"""How an actor computes the logits of the next tokens of a batch: through Megatron's modules, with `KVCache`.

On a CPU, most actors do it straight from their weights instead (`direct.DirectDecoder`).

Shape legend: P prompts, R sequences in the batch, S positions of the prompts without their last tokens, E experts, L MoE layers, K
experts of a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_vp2o.megatron.model.attention import KVCache
from megatron_vp2o.megatron.model.moe_layer import VP2OMoELayer
from megatron_vp2o.megatron.model.replay import ModelReplay
from megatron_vp2o.parallel.groups import Groups


class Decoder(Protocol):
    """Keys and values of one batch, and the forward pass over its new tokens: `prefill` where there is something before the last
    tokens of prompts, `begin` once, then `step` for each new token; `select` in between."""

    def prefill(self, tokens_PS: Tensor, length_P: Tensor) -> None:
        """All of the prompts but each one's last token; the rest of shorter rows is padding.

        Args:
            length_P: of the prompts, on the device.
        """
        ...

    def begin(self, rows_R: Tensor) -> None:
        """From now on the batch is these rows of the prompts, in this order."""
        ...

    def select(self, rows_R: Tensor) -> None:
        """Keep these rows of the batch."""
        ...

    def step(self, tokens_R: Tensor, position_R: Tensor, number: int, *, log: bool) -> Tensor | None:
        """Logits after one more token of each row, [R, V] (on the last pipeline stage, else None).

        Args:
            position_R: of the tokens in their sequences.
            number: of the step, from 0.
            log: `gates` will be asked for.
        """
        ...

    def routes(self) -> Tensor:
        """Experts of the tokens of the last forward pass, packed: [R, L, K], or of the prefill [P * S, L, K]."""
        ...

    def gates(self) -> Sequence[Tensor]:
        """Of the last step, for each layer [R, E]."""
        ...


class ModuleDecoder:
    """Implements `Decoder` through the actor's modules, under any layout.

    Args:
        rows: P.
        prefill: S.
        width: longest sequence.
        replay: of the actor, where `routes` will be asked for.
    """

    def __init__(
        self,
        actor: GPTModel,
        layers: Sequence[VP2OMoELayer],
        groups: Groups,
        rows: int,
        prefill: int,
        width: int,
        replay: ModelReplay | None,
    ) -> None:
        self.actor, self.groups = actor, groups
        self._layers, self._prefill, self._replay = layers, prefill, replay
        self._cache = KVCache(rows, width)
        self._seen: list[list[Tensor]] = []
        self._routes: Tensor | None = None

    def prefill(self, tokens_PS: Tensor, length_P: Tensor) -> None:
        """See `Decoder`. Rows shorter than the longest leave keys of padding behind, which decoding overwrites before it can see
        them."""
        prompts, width = tokens_PS.shape
        position_PS = torch.arange(width, device=tokens_PS.device).expand(prompts, -1)
        self._cache.start(position_PS, width, prefill=True)
        with self._recording():
            self._forward(tokens_PS, position_PS)
        if self._replay is not None:
            self._routes = self._replay.take().unflatten(0, (width, -1)).transpose(0, 1).flatten(0, 1)

    def begin(self, rows_R: Tensor) -> None:
        """See `Decoder`."""
        self._cache.select(rows_R)

    def select(self, rows_R: Tensor) -> None:
        """See `Decoder`."""
        self._cache.select(rows_R)

    def step(self, tokens_R: Tensor, position_R: Tensor, number: int, *, log: bool) -> Tensor | None:
        """See `Decoder`."""
        position_R1 = position_R[:, None]
        self._cache.start(position_R1, self._prefill + 1 + number, prefill=False)
        with self._logging(log), self._recording():
            logits_RV = self._forward(tokens_R[:, None], position_R1)
        if self._replay is not None:
            self._routes = self._replay.take()
        return logits_RV

    def routes(self) -> Tensor:
        """See `Decoder`."""
        assert self._routes is not None, "made without replay"
        return self._routes

    def gates(self) -> list[Tensor]:
        """See `Decoder`."""
        return [seen[0] for seen in self._seen]

    def _recording(self) -> AbstractContextManager[None]:
        return nullcontext() if self._replay is None else self._replay.recording()

    @contextmanager
    def _logging(self, log: bool) -> Iterator[None]:
        """Keeps what each layer's gates are inside, if they are to be logged."""
        layers = self._layers if log else []
        self._seen = [[] for _ in layers]
        for layer, seen in zip(layers, self._seen, strict=True):
            layer.gate_log = seen
        try:
            yield
        finally:
            for layer in layers:
                layer.gate_log = None

    def _forward(self, tokens_RS: Tensor, position_RS: Tensor) -> Tensor | None:
        """Run the actor over new tokens. Returns the last position's logits, [R, V], on the last pipeline stage, else None."""
        pp, config = self.groups.pp, self.actor.config
        if not self.groups.is_first_stage:
            rows, width = tokens_RS.shape
            hidden = torch.empty(width, rows, config.hidden_size, dtype=config.params_dtype, device=tokens_RS.device)
            dist.recv(hidden, group=pp, group_src=pp.rank() - 1)
            self.actor.set_input_tensor(hidden)
        out: Any = self.actor(tokens_RS, position_RS, None, inference_context=self._cache, runtime_gather_output=True)
        if not self.groups.is_last_stage:
            dist.send(out.contiguous(), group=pp, group_dst=pp.rank() + 1)
            return None
        return out[:, -1]  # type: ignore[no-any-return]

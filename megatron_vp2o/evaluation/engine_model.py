"""Any engine of this project as a model that is evaluated: implements `model.Model` in the processes that share the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.evaluation.model import Response, Sampling
from megatron_vp2o.evaluation.tokens import THINK, split, tokens_before
from megatron_vp2o.parallel.groups import Groups, gather_objects
from megatron_vp2o.rl.grading import response_text
from megatron_vp2o.rl.interfaces import RolloutEngine, Tokenizer
from megatron_vp2o.rl.types import SamplingParams
from megatron_vp2o.tasks.tokenizer import HuggingFaceTokenizer


class EngineModel:
    """The weights that an engine holds while it is asked."""

    own_numbers = True

    def __init__(
        self,
        label: str,
        step: int,
        identity: dict[str, Any],
        *,
        engine: RolloutEngine,
        groups: Groups,
        tokenizer: Tokenizer,
        room: int,
        thinking: bool | None,
        where: str,
    ) -> None:
        """
        Args:
            identity: what tells these weights from others; how prompts are written is added.
            room: tokens that a prompt and its answer may have together.
            thinking: handed to a chat template that knows enable_thinking; None: nothing is.
            where: what error messages call the model.

        Raises:
            ConfigError: `thinking` is given, and the tokenizer has no chat template.
        """
        self.label, self.step = label, step
        self._engine, self._groups, self._tokenizer = engine, groups, tokenizer
        self._room, self._thinking, self._where = room, thinking, where
        template = tokenizer.chat_template if isinstance(tokenizer, HuggingFaceTokenizer) else None
        self._chat = template is not None
        if thinking is not None and not self._chat:
            raise ConfigError(f"thinking={str(thinking).lower()} needs a chat template, and {where} has none")
        self.identity = {**identity, "chat": self._chat, "thinking": thinking}

    def check(self, prompts: Sequence[str], length: int) -> None:
        """Raises ConfigError for a prompt that the tokenizer refuses, or that leaves no room for the answer."""
        for prompt in prompts:
            count = len(self._encode(prompt)[0])
            if count + length > self._room:
                left = self._room - count
                raise ConfigError(
                    f"{self._where}: a prompt has {count} tokens, and with a length of {length} that exceeds the model's "
                    f"{self._room} (max_sequence_length, max_position_embeddings): "
                    + (
                        f"choose at most --lengths {left}"
                        if left > 0
                        else "no length leaves room for an answer; leave this benchmark out (--suite), or allow more "
                        "(--max-sequence-length)"
                    )
                    + f" (prompt: {prompt[:60]!r}...)"
                )

    def _encode(self, prompt: str) -> tuple[list[int], bool]:
        """Token ids, and whether they already open the thinking."""
        tokenizer = self._tokenizer
        try:
            if not isinstance(tokenizer, HuggingFaceTokenizer):
                return tokenizer.encode(prompt), False
            if not self._chat:
                return tokenizer.encode_start(prompt), False
            text = tokenizer.render([{"role": "user", "content": prompt}], enable_thinking=self._thinking)
            return tokenizer.encode(text), text.rstrip().endswith(THINK)
        except Exception as error:
            # tokenizers, in Rust, raises Exception itself for a character that a vocabulary without an unknown token lacks
            if type(error) is not Exception and not isinstance(error, ValueError | KeyError):
                raise
            raise ConfigError(
                f"{self._where}: its tokenizer refuses the prompt {prompt[:60]!r}... ({error})"
            ) from error

    def generate(self, prompts: Sequence[str], uids: Sequence[int], sampling: Sampling) -> list[Response]:
        """See `model.Model`; the data-parallel ranks share the prompts. Collective, the same on all ranks."""
        groups = self._groups
        mine = slice(groups.dp_rank, None, groups.dp_size)
        encoded = [self._encode(prompt) for prompt in prompts[mine]]
        rollouts = self._engine.generate(
            [ids for ids, _ in encoded],
            list(uids[mine]),
            SamplingParams(sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.seed),
        )
        own = [
            self._response(rollouts.response(n), bool(rollouts.finished_N[n]), opened)
            for n, (_, opened) in enumerate(encoded)
        ]
        shares = gather_objects(own, groups.dp)
        return [shares[n % groups.dp_size][n // groups.dp_size] for n in range(len(prompts))]

    def _response(self, ids: list[int], finished: bool, opened: bool) -> Response:
        if ids and ids[-1] in self._tokenizer.eos_ids:
            ids = ids[:-1]
        text = response_text(self._tokenizer, ids)
        parts = split(text, opened=opened)
        thinking = tokens_before(ids, parts.start, self._tokenizer.decode) if parts.start else 0
        return Response(text, parts.solution, thinking, len(ids) - thinking, not finished)

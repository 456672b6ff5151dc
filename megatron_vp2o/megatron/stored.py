"""A stored model that only answers: an actor whose weights come from a checkpoint, without optimizer or gradient buffers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch

from megatron_vp2o.config.export import is_hf
from megatron_vp2o.config.parameters import padded_vocab
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.megatron.actor.generation import MegatronEngine
from megatron_vp2o.megatron.checkpoint import checkpointer as checkpoint
from megatron_vp2o.megatron.hf.load import load_hf
from megatron_vp2o.parallel.groups import Groups, any_rank


class StoredModel:
    """What `MegatronEngine` and the loading of checkpoints ask of a learner, for a model that does not learn.

    Args:
        config: `model`, `parallel` and `rollout` count.
        vocab_size: ids of the tokenizer.
    """

    def __init__(
        self, config: TrainConfig, groups: Groups, *, vocab_size: int, eos_ids: Collection[int], pad_id: int
    ) -> None:
        self.groups = groups
        self.valid_vocab = vocab_size
        self.model_vocab = config.model.vocab_size or vocab_size
        self.padded_vocab = padded_vocab(self.model_vocab, config.parallel.tensor_parallel)
        self.engine = MegatronEngine(config, cast(Any, self), eos_ids=eos_ids, pad_id=pad_id)
        self.model = self.engine.actor

    def load(self, folder: Path, step: int) -> list[str]:
        """Take the weights of a checkpoint, ours or a Hugging Face folder. Collective.

        Returns:
            Sentences about tensors of a Hugging Face folder that are no part of the model.

        Raises:
            CheckpointError: on all ranks: it is damaged or of another model.
        """
        said: list[str] = []
        if is_hf(folder):
            said = load_hf(self.model, folder, self.groups)
        else:
            checkpoint.load_model(folder, cast(Any, self))
        self.engine.version = step
        return said

    @torch.no_grad()
    def weights_finite(self) -> bool:
        """Whether every weight and buffer is a finite number, on all ranks. Collective."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        finite = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
        return not any_rank(not bool(torch.stack(finite).all()), self.groups.world)

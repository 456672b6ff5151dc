"""The last check of a conversion: transformers and Megatron compute the same. Both models are in memory, one after the other."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_vp2o.config.schema import ParallelConfig
from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.distributed_files import StoredTensors
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.tensor_files import config_of
from megatron_vp2o.megatron.hf import model as hf_model
from megatron_vp2o.megatron.platform import world

TOLERANCE = 1e-5
"""Largest difference of float32 logits, as a share of their largest magnitude (at least 1)."""


def compare_logits(hf: Path, megatron: Path, *, rows: int = 2, length: int = 32, seed: int = 0) -> str:
    """Compare logits of random tokens, in float32. One process.

    Returns:
        What was compared, as a sentence.

    Raises:
        CheckpointError: they differ, or transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise CheckpointError("comparing logits needs transformers: pip install 'transformers>=5.17,<6'") from None
    model = architecture(config_of(hf))
    generator = torch.Generator().manual_seed(seed)
    tokens_bs = torch.randint(model.vocab_size, (rows, length), generator=generator)
    reference = AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
    )
    with torch.no_grad():
        expected = reference.eval()(input_ids=tokens_bs, use_cache=False).logits
    del reference
    parallel = ParallelConfig()
    groups = world.start(parallel, seed)
    try:
        vocab_rows = StoredTensors(megatron).shapes["embedding.word_embeddings.weight"][0]
        gpt = hf_model.build(model, parallel, groups, vocab_rows=vocab_rows, dtype=torch.float32)
        hf_model.load(gpt, megatron)
        found = hf_model.logits(gpt, tokens_bs, groups, model.vocab_size).cpu()
    finally:
        world.stop()
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    said = f"logits of {rows} x {length} random tokens differ by at most {difference:.2e} (they reach {largest:.2f})"
    if not difference <= TOLERANCE * max(1.0, largest):
        raise CheckpointError(f"{said}: more than rounding explains")
    return said

"""A tiny Qwen3-MoE with a word-level tokenizer in a folder: `python -m tests.hf.word_model FOLDER`."""

from __future__ import annotations

import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tools.tiny_qwen3_moe import tiny_config


def save(folder: str, *, seed: int = 1) -> None:
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(61))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    special_ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = tiny_config(len(words), **special_ids, initializer_range=0.08)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


if __name__ == "__main__":
    save(sys.argv[1])

"""Rows for verl's SFT trainer: numbers that count up, of different lengths. `data.custom_cls.path` names this file."""

from __future__ import annotations

from typing import Any

import torch


class Count(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """64 rows of 7 to 13 tokens."""

    def __init__(self, parquet_files: Any = None, tokenizer: Any = None, config: Any = None, **kwargs: Any) -> None:
        pass

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.tensor([1] + [3 + (index + j) % 60 for j in range(6 + index % 7)])
        return {
            "input_ids": row,
            "position_ids": torch.arange(len(row)),
            "loss_mask": torch.ones(len(row), dtype=torch.long),
        }

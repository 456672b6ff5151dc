"""Pretraining of a MoE model by Megatron-LM's own `pretrain()`, with the Stein transform and its diagnostics.

    torchrun --nproc-per-node 2 examples/pretrain_vp2o.py --vp2o stein.enabled=true stein.eta=0.01 \\
        --expert-model-parallel-size 2 --num-experts 8 ... (Megatron's own arguments; docs/plugins.md has a whole command)

All that is not Megatron's is `add_arguments` and the line with `post_wrap_hooks`. Data are numbers that count up: put your own
`pretrain_gpt.py`'s providers in their place.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_vp2o.plugins.megatron import post_wrap_hook


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("vp2o")
    group.add_argument("--vp2o", nargs="*", default=[], metavar="SETTING=VALUE", help="settings of docs/plugins.md")
    return parser


class CountingUp(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of consecutive numbers, each from another start."""

    def __init__(self, length: int, vocabulary: int) -> None:
        self.length, self.vocabulary = length, vocabulary

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(self.length + 1) + 7 * index) % self.vocabulary
        return {"tokens": row[:-1], "labels": row[1:]}


def datasets(samples: Any, vp_stage: int | None = None) -> tuple[CountingUp, None, None]:
    from megatron.training import get_args

    args = get_args()
    return CountingUp(args.seq_length, args.padded_vocab_size), None, None


datasets.is_distributed = True  # type: ignore[attr-defined]


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: Any, return_schedule_plan: bool = False) -> Any:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    batch = {name: value.to(device) for name, value in next(batches).items()}
    length = batch["tokens"].shape[1]
    positions = torch.arange(length, device=device).expand_as(batch["tokens"])
    causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)
    losses = model(batch["tokens"], positions, causal, labels=batch["labels"])

    def loss(losses: torch.Tensor) -> Any:
        total = losses.float().sum()
        count = torch.tensor(losses.numel(), dtype=torch.int, device=device)
        return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

    return losses, loss


def main() -> None:
    args = parse_and_validate_args(extra_args_provider=add_arguments, args_defaults={"tokenizer_type": "NullTokenizer"})
    config = gpt_config_from_args(args)
    config.post_wrap_hooks.append(post_wrap_hook(args.vp2o))
    pretrain(pretrain_cfg_container_from_args(args, config), datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()

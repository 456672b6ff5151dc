"""`python -m megatron_vp2o.diagnostics`: a Hugging Face model on texts, or a file of recorded rollouts; prints JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_vp2o.diagnostics.rollouts import metrics_by_step, read_rollouts, rollout_metrics
from megatron_vp2o.diagnostics.transformers_moe import observe
from megatron_vp2o.errors import ConfigError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m megatron_vp2o.diagnostics", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    rollouts = commands.add_parser("rollouts", help="right and distinct answers, mismatch, of a JSONL file")
    rollouts.add_argument("file", type=Path)
    rollouts.add_argument("--right-from", type=float, default=1.0, help="score from which a response is right")
    rollouts.add_argument(
        "--name", action="append", default=[], metavar="FIELD=NAME", help="what the file calls a field"
    )
    rollouts.add_argument("--by-step", action="store_true", help="one object a step")
    model = commands.add_parser("model", help="routing and prototypes of a transformers MoE model on texts")
    model.add_argument("folder", type=Path, help="folder with config.json, weights and tokenizer files")
    model.add_argument("--texts", type=Path, required=True, help="one text a line")
    model.add_argument("--rows", type=int, default=8, help="texts of one forward pass")
    model.add_argument("--length", type=int, default=512, help="most tokens of a text")
    model.add_argument("--by-layer", action="store_true", help="one list with a number a layer of each metric")
    options = parser.parse_args(arguments)
    try:
        found = _rollouts(options) if options.command == "rollouts" else _model(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1))
    return 0


def _rollouts(options: argparse.Namespace) -> object:
    names = {}
    for given in options.name:
        key, separator, value = given.partition("=")
        if not separator:
            raise ConfigError(f"--name {given!r}: write FIELD=NAME, such as answer=pred")
        names[key] = value
    groups = read_rollouts(options.file, right_from=options.right_from, names=names)
    return metrics_by_step(groups) if options.by_step else rollout_metrics(groups)


def _model(options: argparse.Namespace) -> object:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = [line for line in options.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ConfigError(f"{options.texts} has no text")
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.folder).eval()
    with observe(model) as seen, torch.no_grad():
        for start in range(0, len(texts), options.rows):
            batch = tokenizer(
                texts[start : start + options.rows],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=options.length,
            )
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        report = seen.take()
    return report.by_layer if options.by_layer else report.metrics


if __name__ == "__main__":
    sys.exit(main())

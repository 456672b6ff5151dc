"""`python -m megatron_vp2o.diagnostics`: a Hugging Face model on texts, or a file of recorded rollouts; prints JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_vp2o.diagnostics.rollouts import metrics_by_step, read_rollouts, rollout_metrics
from megatron_vp2o.diagnostics.transformers_moe import observe
from megatron_vp2o.errors import ConfigError, DataError, UserError


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
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or _first_line(error)}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {_first_line(error)}", file=sys.stderr)
        return 2
    lost: list[str] = []
    print(json.dumps(_plain(found, lost), indent=1, allow_nan=False))
    if lost:
        print(f"warning: not finite, written as null: {', '.join(sorted(set(lost)))}", file=sys.stderr)
    return 0


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _plain(value: Any, lost: list[str], name: str = "") -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: _plain(one, lost, str(key)) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one, lost, name) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(name)
        return None
    return value


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
    for name in ("rows", "length"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)} must be at least 1")
    texts = _texts(options.texts)
    tokenizer, model = _load(options.folder)
    with observe(model) as seen, torch.no_grad():
        for start in range(0, len(texts), options.rows):
            batch = tokenizer(
                texts[start : start + options.rows],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=options.length,
            )
            _check_ids(batch["input_ids"], model, options.folder)
            try:
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            except UserError:
                raise
            except _UNUSABLE as error:
                raise ConfigError(f"{options.folder}: the model cannot run ({_first_line(error)})") from error
        report = seen.take()
    return report.by_layer if options.by_layer else report.metrics


def _texts(path: Path) -> list[str]:
    try:
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not texts:
        raise DataError(f"{path} has no text")
    return texts


def _load(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model of a folder; nothing is fetched from a network.

    Raises:
        ConfigError: for what is not there or cannot be read, naming the folder.
    """
    try:
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ConfigError(f"reading a model needs transformers ({error}): pip install transformers") from None
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is no folder of a model: it has no config.json")
    what = "tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        what = "model"
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    except (*_UNUSABLE, OSError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise ConfigError(f"{folder}: transformers cannot read the {what} ({_first_line(error)})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"{folder}: the tokenizer has neither a padding token nor one for the end; give it a pad_token"
        )
    config = model.config
    experts = next((n for key in _EXPERTS if (n := getattr(config, key, None)) is not None), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    if experts is not None and chosen is not None and not 1 <= chosen <= experts:
        raise ConfigError(f"{folder}: num_experts_per_tok={chosen} must be between 1 and the {experts} experts")
    return tokenizer, model


_UNUSABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
"""What transformers and torch raise for a configuration that makes no sense."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _check_ids(tokens: torch.Tensor, model: Any, folder: Path) -> None:
    if not tokens.numel():
        raise DataError(f"{folder}: its tokenizer gives the texts no token: are the tokenizer's files there?")
    rows, largest = model.get_input_embeddings().weight.shape[0], int(tokens.max())
    if largest >= rows:
        raise ConfigError(
            f"{folder}: the tokenizer gives token {largest} and the model has {rows}: the two do not belong together"
        )


if __name__ == "__main__":
    sys.exit(main())

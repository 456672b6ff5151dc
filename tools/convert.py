"""Convert checkpoints between Hugging Face and Megatron, and check that they are the same.

    python tools/convert.py to-megatron HF OUT [--tp 2 --pp 1 --ep 4 --etp 1]
    python tools/convert.py to-hf MEGATRON OUT [--like HF]
    python tools/convert.py verify HF MEGATRON [--logits]

MEGATRON is a distributed checkpoint, or the folder of a run. docs/conversion.md has the rest.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vp2o.errors import UserError

DTYPES = ("bf16", "fp32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where checkpoints differ or are damaged, 2 for a wrong command line."""
    options = _parser().parse_args(arguments)
    import torch  # after the command line is known to make sense

    torch.set_num_threads(1)  # the conversion's own threads share the cores
    try:
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    to_megatron = commands.add_parser("to-megatron", help="Hugging Face -> Megatron distributed checkpoint")
    to_megatron.add_argument("source", type=Path, metavar="HF", help="folder with config.json and safetensors")
    to_megatron.set_defaults(run=_to_megatron)
    to_megatron.add_argument(
        "--no-compare",
        action="store_true",
        help="do not compare logits with transformers' before the result gets its name",
    )
    for name, what in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert"), ("etp", "expert tensor")):
        to_megatron.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"{what} parallelism to cut for")

    to_hf = commands.add_parser("to-hf", help="Megatron distributed checkpoint, or a run's -> Hugging Face")
    to_hf.add_argument("source", type=Path, metavar="MEGATRON")
    to_hf.add_argument("--like", type=Path, metavar="HF", help="take config, tokenizer and files from this folder")
    to_hf.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="largest file, if not as in HF")
    to_hf.set_defaults(run=_to_hf)

    for command in (to_megatron, to_hf):
        command.add_argument("target", type=Path, metavar="OUT", help="new folder")
        command.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as they are)")
        command.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in OUT")
        command.add_argument(
            "--suspect", action="store_true", help="take NaN, infinity and matrices of zeros as they are"
        )
        command.add_argument("--no-read-back", action="store_true", help="do not read again what was written")

    verify = commands.add_parser("verify", help="compare a Hugging Face and a Megatron checkpoint")
    verify.add_argument("source", type=Path, metavar="HF")
    verify.add_argument("target", type=Path, metavar="MEGATRON")
    verify.add_argument(
        "--logits", action="store_true", help="also run both models (transformers and Megatron, in memory)"
    )
    verify.set_defaults(run=_verify)
    for command in (to_megatron, to_hf, verify):
        command.add_argument(
            "--workers", type=int, default=2, metavar="N", help="threads that read and write (default 2)"
        )
    return parser


def _options(options: argparse.Namespace) -> Any:
    import torch

    from megatron_vp2o.hf.convert import Options

    return Options(
        dtype={None: None, "bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype],
        workers=max(1, options.workers),
        overwrite=options.overwrite,
        suspect=options.suspect,
        read_back=not options.no_read_back,
        progress=Bar(),
    )


def _to_megatron(options: argparse.Namespace) -> int:
    from megatron_vp2o.megatron.platform.cpu import enable_cpu

    enable_cpu()
    from megatron_vp2o.errors import CheckpointError
    from megatron_vp2o.hf.convert import to_megatron
    from megatron_vp2o.hf.families import architecture
    from megatron_vp2o.hf.mapping import Architecture
    from megatron_vp2o.hf.output import COMPARED
    from megatron_vp2o.hf.plan import Layout
    from megatron_vp2o.hf.settings import run_settings
    from megatron_vp2o.hf.tensor_files import config_of
    from megatron_vp2o.megatron.hf.training_checkpoint import make_training_checkpoint

    layout = Layout(options.tp, options.pp, options.ep, options.etp)
    said: list[str] = []

    def finish(folder: Path, model: Architecture) -> None:
        said.append(_compared(options, folder))
        (folder / COMPARED).write_text(said[0] + "\n", encoding="utf-8")
        make_training_checkpoint(folder, model)

    report = to_megatron(options.source, options.target, layout=layout, options=_options(options), finish=finish)
    _say(report)
    print(said[0])
    try:
        settings = run_settings(architecture(config_of(options.source)))
    except CheckpointError as error:
        print(error)
        return 0
    words = [f"model.{name}={'null' if value is None else value}" for name, value in settings.items()]
    print(f"to train it: init_from={options.target} {' '.join(words)}")
    return 0


def _compared(options: argparse.Namespace, folder: Path) -> str:
    """Compare a sample of a finished conversion, unless that is switched off. Returns what to say of it."""
    if options.no_compare:
        return "logits were not compared with transformers': --no-compare was given"
    from megatron_vp2o.megatron.hf.compare import compare_sample

    return compare_sample(options.source, folder)


def _to_hf(options: argparse.Namespace) -> int:
    from megatron_vp2o.config.export import hf_source
    from megatron_vp2o.hf.convert import to_hf

    like = options.like or hf_source(options.source)  # of what a run started from, its files beside the weights
    source, config = _checkpoint(options.source, wanted=like is None)
    report = to_hf(
        source,
        options.target,
        like=like,
        config=config,
        shard_bytes=int(options.shard_gb * 1e9),
        options=_options(options),
    )
    _say(report)
    return 0


def _checkpoint(path: Path, *, wanted: bool) -> tuple[Path, dict[str, Any] | None]:
    """The checkpoint that a path means and, for one of a run, the config.json of its model."""
    from megatron_vp2o.config.names import CONFIG_FILE
    from megatron_vp2o.config.store import load_config
    from megatron_vp2o.hf.distributed_files import METADATA
    from megatron_vp2o.hf.settings import hf_config
    from megatron_vp2o.megatron.checkpoint import folder as checkpoint_folder

    source = path if (path / METADATA).is_file() else checkpoint_folder.resolve(path)
    if (source / checkpoint_folder.MANIFEST).is_file():
        checkpoint_folder.check_files(source, checkpoint_folder.read_manifest(source))
    run = source.parent.parent
    if not wanted or not (run / CONFIG_FILE).is_file():
        return source, None
    manifest = checkpoint_folder.read_manifest(source)
    ids = _special_ids(source)
    return source, hf_config(load_config(run).model, manifest["model"]["vocab_size"], **ids)


def _special_ids(folder: Path) -> dict[str, Any]:
    """Ids of the end-of-sequence and padding tokens of the tokenizer in a folder."""
    import json

    from megatron_vp2o.tasks.tokenizer import ends_in

    ids: dict[str, Any] = {"eos_id": None, "pad_id": None}
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ids
    for name in ("eos", "pad"):
        token = settings.get(f"{name}_token")
        text = token["content"] if isinstance(token, dict) else token
        ids[f"{name}_id"] = None if text is None else tokenizer.token_to_id(text)
    ids["pad_id"] = ids["eos_id"] if ids["pad_id"] is None else ids["pad_id"]  # as a run pads
    if len(ends := ends_in(folder)) > 1:
        ids["eos_id"] = ends
    return ids


def _verify(options: argparse.Namespace) -> int:
    from megatron_vp2o.hf.verify import verify

    source, _ = _checkpoint(options.target, wanted=False)
    count = verify(options.source, source, workers=max(1, options.workers), progress=Bar())
    print(f"{count} tensors are the same")
    if options.logits:
        from megatron_vp2o.megatron.platform.cpu import enable_cpu

        enable_cpu()
        from megatron_vp2o.megatron.hf.compare import compare_logits

        print(compare_logits(options.source, source))
    return 0


def _say(report: Any) -> None:
    for sentence in report.left_out:
        print(sentence)
    rate = (report.size - report.resumed_bytes) / 1e9 / max(report.seconds, 1e-9)
    print(
        f"{report.target}: {report.tensors} tensors, {report.size / 1e9:.3f} GB in {report.seconds:.1f} s "
        f"({rate:.2f} GB/s); peak memory {report.peak_bytes / 2**20:.0f} MiB, of which "
        f"{report.start_bytes / 2**20:.0f} MiB before the conversion began"
    )


class Bar:
    """Progress on standard error: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._start = self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        finished = done >= total
        if not finished and now - self._said < (0.2 if terminal else 10.0):
            return
        self._said = now
        share = done / max(total, 1)
        left = (now - self._start) * (1 - share) / max(share, 1e-9)
        text = f"{share:6.1%}, {left:.0f} s left"
        if terminal:
            filled = int(40 * share)
            print(f"\r[{'#' * filled}{'.' * (40 - filled)}] {text}   ", end="\n" if finished else "", file=sys.stderr)
        elif not finished:
            print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

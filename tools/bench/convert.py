"""Conversion of a synthetic checkpoint with the tensor names of Qwen3-30B-A3B (48 layers, 128 experts) and smaller shapes:
seconds a GB, memory, and what that means for 33B parameters. `python -m tools.bench convert [--gb 4] [--workers 2]`."""

from __future__ import annotations

import argparse
import filecmp
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAYERS, EXPERTS, VOCAB, HIDDEN = 48, 128, 151936, 512
LARGE_GB = 66.0  # 33e9 bfloat16 parameters
LEAST_GB = 0.8


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where the way back is not the same to the byte."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench convert", description=__doc__)
    parser.add_argument("--gb", type=float, default=4.0, help=f"size of the checkpoint (default 4, least {LEAST_GB})")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="where to work; three times the size is written (default: a temporary folder)")
    parser.add_argument("--child", nargs=3, metavar=("DIRECTION", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return _child(*options.child, workers=options.workers)
    with tempfile.TemporaryDirectory(prefix="convert-", dir=options.folder) as folder:
        return _measure(Path(folder), max(options.gb, LEAST_GB), options.workers)


def _measure(folder: Path, gigabytes: float, workers: int) -> int:
    """Two sizes with the same tensors: what a tensor costs, and what a byte costs."""
    status = 0
    found: dict[str, list[dict[str, Any]]] = {"to_megatron": [], "to_hf": []}
    for size in sorted({LEAST_GB, gigabytes}):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            status |= _both_ways(Path(name), size, workers, found)
    for direction, reports in found.items():
        small, large = reports[0], reports[-1]
        if small is large:
            continue
        for kind in ("seconds", "cpu_seconds"):
            slope = (large[kind] - small[kind]) / (large["size"] - small["size"])
            fixed = small[kind] - slope * small["size"]
            total = fixed + slope * LARGE_GB * 1e9
            print(
                f"{direction}: {kind} = {fixed * 1000 / small['tensors']:.2f} ms a tensor + {slope * 1e9:.2f} s/GB; "
                f"33B in bfloat16: {total / 60:.1f} min"
            )
    return status


def _both_ways(folder: Path, gigabytes: float, workers: int, found: dict[str, list[dict[str, Any]]]) -> int:
    hf, megatron, back = folder / "hf", folder / "megatron", folder / "back"
    size = make_checkpoint(hf, gigabytes)
    for direction, source, target in (("to_megatron", hf, megatron), ("to_hf", megatron, back)):
        command = [sys.executable, "-m", "tools.bench.convert", "--workers", str(workers)]
        output = subprocess.run(
            [*command, "--child", direction, str(source), str(target)], check=True, stdout=subprocess.PIPE
        ).stdout
        report: dict[str, Any] = json.loads(output.splitlines()[-1])
        found[direction].append(report)
        print(
            f"{size / 1e9:.2f} GB {direction}: {report['tensors']} tensors, {report['seconds']:.1f} s with {workers} "
            f"workers, {report['cpu_seconds']:.1f} CPU s; memory {(report['peak_bytes'] - report['start_bytes']) / 2**20:.0f} "
            f"MiB on top of {report['start_bytes'] / 2**20:.0f} MiB of Python and torch",
            flush=True,
        )
    names = [path.name for path in hf.iterdir()]
    _, different, missing = filecmp.cmpfiles(hf, back, names, shallow=False)
    print(
        "there and back: " + ("the same to the byte" if not different + missing else f"differ: {different + missing}")
    )
    return 1 if different + missing else 0


def _child(direction: str, source: str, target: str, *, workers: int) -> int:
    import torch

    from megatron_vp2o.hf import convert

    torch.set_num_threads(1)
    options = convert.Options(workers=workers)
    report = getattr(convert, direction)(Path(source), Path(target), options=options)
    print(json.dumps({**vars(report), "target": str(report.target)}))
    return 0


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write random bfloat16 weights under the names of Qwen3-30B-A3B. Returns the bytes of the tensors."""
    import torch

    from megatron_vp2o.hf import tensor_files
    from megatron_vp2o.hf.families import architecture

    fixed = 2 * VOCAB * HIDDEN * 2
    inner = max(8, round((gigabytes * 1e9 - fixed) / (LAYERS * EXPERTS * 3 * HIDDEN * 2) / 8) * 8)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * inner,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": inner,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    }
    shapes = architecture(config).hf_tensors()
    tensors = [(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    headers = tensor_files.shard(tensors, 10**9)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(2**24).normal_(0.0, 0.02, generator=generator).bfloat16().view(torch.uint8).numpy().tobytes()
    total = 0
    for name, header in headers.items():
        size = sum(entry.size for entry in tensor_files.entries_of({name: header}).values())
        with (folder / name).open("wb") as stream:
            stream.write(header)
            left = size
            while left:
                left -= stream.write(noise[: min(left, len(noise) - 2 * (left % 1021))])
        total += size
    (folder / tensor_files.INDEX).write_text(
        tensor_files.render_index(tensor_files.entries_of(headers)), encoding="utf-8"
    )
    return total


if __name__ == "__main__":
    sys.exit(main())

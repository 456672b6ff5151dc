"""The memory of a conversion, with the tensor names of Qwen3-30B-A3B: it depends on their number, not on their bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tools.bench.convert import LEAST_GB, make_checkpoint

MOST = 72 * 2**20  # the aim is 64 MiB (docs/conversion.md); allocators differ a little


def test_tables_and_buffers_stay_small(tmp_path: Path) -> None:
    hf, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    make_checkpoint(hf, LEAST_GB)
    for direction, source, target in (("to_megatron", hf, megatron), ("to_hf", megatron, back)):
        command = [sys.executable, "-m", "tools.bench.convert", "--child", direction, str(source), str(target)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=600).stdout
        report = json.loads(output.splitlines()[-1])
        assert report["tensors"] == 18867
        assert report["peak_bytes"] - report["start_bytes"] < MOST, direction

"""How long the command line takes to say something: `python -m megatron_vp2o.train --help` in fresh processes."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def main(argv: list[str]) -> int:
    """Print the median and the range."""
    parser = argparse.ArgumentParser(prog="tools.bench startup", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_known_args(argv)[0].repeat
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "megatron_vp2o.train", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    print(f"--help: {statistics.median(seconds):.2f} s (from {min(seconds):.2f} to {max(seconds):.2f}, {repeat} runs)")
    return 0

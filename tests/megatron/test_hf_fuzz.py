"""A small part of the conversion fuzz, with a fixed seed. `python -m tests.hf.fuzz` runs as much of it as is wanted."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from megatron_vp2o.hf.families import FAMILIES


@pytest.mark.slow
def test_random_configurations_agree_with_transformers_or_are_refused() -> None:
    command = [sys.executable, "-m", "tests.hf.fuzz", "--count", "8", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    agreed = re.findall(r"^(\w+): .*'agree': (\d+)", done.stdout, re.MULTILINE)
    assert {family for family, count in agreed if int(count) >= 2} == set(FAMILIES), done.stdout

"""The worked example of docs/stein_in_your_loop.md does what the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.distributed import ROOT, run_distributed

PAGE = ROOT / "docs" / "stein_in_your_loop.md"


def example() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


CHECK = """
import json, pathlib, sys
pathlib.Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps([
    reported[0]["loss"], stein.transform.steps, stein.metrics,
    config.finalize_model_grads_func is finalize_model_grads,
    [type(layer.mlp).__name__ for layer in model.decoder.layers],
]))
"""


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example_runs_and_learns(ranks: int, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example() + CHECK, encoding="utf-8")
    run_distributed(str(script), ranks, str(tmp_path), timeout=90)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    for loss, steps, metrics, restored, kinds in results:
        assert loss < 3.7  # from log 64 = 4.2
        assert steps == 15 and restored  # removed after that
        assert 0 < metrics["stein/self_weight"] < 1 and metrics["stein/repulsion_ratio"] > 0
        assert kinds == ["VP2OMoELayer", "VP2OMoELayer"]
    assert all(metrics == results[0][2] for _, _, metrics, _, _ in results)

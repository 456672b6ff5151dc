"""The registry of metrics, and the page made from it."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vp2o.config.schema import Algorithm
from megatron_vp2o.tracking.reference import reference
from megatron_vp2o.tracking.schema import SECTIONS, find_metric, schema_for

METRICS = [metric for section in SECTIONS for metric in section.metrics]


def test_the_document_is_current():
    document = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert document.read_text(encoding="utf-8") == reference(), (
        "run: python -m megatron_vp2o.tracking.reference > docs/metrics.md"
    )


def test_every_metric_is_in_the_document():
    text = reference()
    for metric in METRICS:
        assert f"| `{metric.key}` | {metric.unit} |" in text


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_metrics_are_documented(metric):
    assert metric.unit and metric.meaning and metric.when and metric.algorithms
    assert metric.key == metric.key.strip() and not metric.meaning.endswith(".")


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_keys_are_unique_and_begin_with_the_step(algorithm):
    keys = schema_for(algorithm, [1, 4, 16])
    assert keys[0] == "step"
    assert len(set(keys)) == len(keys)
    assert not any("{" in key for key in keys)


def test_pass_at_k_is_expanded_in_order_for_both_splits():
    keys = schema_for(Algorithm.grpo, [16, 1, 4, 4])
    assert [key for key in keys if key.startswith("eval/pass")] == ["eval/pass@1", "eval/pass@4", "eval/pass@16"]
    assert [key for key in keys if key.startswith("test/pass")] == ["test/pass@1", "test/pass@4", "test/pass@16"]


def test_an_algorithm_has_its_own_metrics_only():
    grpo, supervised = schema_for(Algorithm.grpo, [1]), schema_for(Algorithm.supervised, [1])
    assert "policy/clip_fraction" in grpo and "policy/clip_fraction" not in supervised
    assert "supervised/loss" in supervised and "supervised/loss" not in grpo
    assert "eval/greedy_accuracy" in grpo and "eval/greedy_accuracy" in supervised


def test_recorded_keys_are_found_in_the_registry():
    for algorithm in Algorithm:
        for key in schema_for(algorithm, [1, 128]):
            assert find_metric(key) is not None
    assert find_metric("eval/pass@128") is find_metric("eval/pass@1")
    assert find_metric("eval/unheard_of") is None


def test_reading_records_needs_no_torch():
    code = (
        "from megatron_vp2o.tracking import schema, reference, record, runs, console, trackers\n"
        "from megatron_vp2o.report import health, svg, charts, report\n"
        "import sys; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

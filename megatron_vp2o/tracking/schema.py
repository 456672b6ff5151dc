"""Which metrics a run records, and what is known of a recorded key.

A new metric is one line in `SECTIONS` of `sections.py` (and `python -m megatron_vp2o.tracking.reference >
docs/metrics.md`): from then on every record of the algorithms it names has the key, and the report draws it. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_vp2o.config.schema import Algorithm
from megatron_vp2o.tracking.metric import Aggregate as Aggregate
from megatron_vp2o.tracking.metric import Metric as Metric
from megatron_vp2o.tracking.metric import Section as Section
from megatron_vp2o.tracking.sections import SECTIONS as SECTIONS

_BY_KEY = {metric.key: metric for section in SECTIONS for metric in section.metrics}


def schema_for(
    algorithm: Algorithm, pass_at: Sequence[int], parts: Sequence[str] = (), suites: Sequence[str] = ()
) -> tuple[str, ...]:
    """Keys of every line of a run's record, in order.

    Args:
        algorithm: the run's.
        pass_at: the k of its pass@k.
        parts: summands of its reward (`RewardConfig.parts`).
        suites: names of the benchmarks that it evaluates.
    """
    return tuple(
        key
        for section in SECTIONS
        for metric in section.metrics
        if algorithm in metric.algorithms
        for key in metric.keys(pass_at, parts, suites)
    )


def find_metric(key: str) -> Metric | None:
    """What the registry says of a recorded key (`eval/pass@16` is found under `eval/pass@{k}`); None if unknown."""
    general = re.sub(r"^reward/part/.*", "reward/part/{part}", re.sub(r"@\d+$", "@{k}", key))
    general = re.sub(r"^suite/[^/]+/", "suite/{suite}/", general)
    return _BY_KEY.get(key) or _BY_KEY.get(general)


def aggregate_of(key: str) -> Aggregate:
    """How a metric of optimizer steps becomes one of a training step; of those that it does not know, `policy/*`
    are means over tokens, as all sums of an objective are, and others plain means."""
    metric = find_metric(key)
    if metric is not None:
        return metric.aggregate
    return Aggregate.token_mean if key.startswith("policy/") else Aggregate.mean

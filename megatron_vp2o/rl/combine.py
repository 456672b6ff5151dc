"""The metrics of a step from those of its optimizer steps."""

from __future__ import annotations

from megatron_vp2o.tracking.schema import Aggregate, aggregate_of

_APART = ("tokens", "ratio", "logprob_mismatch")
"""Keys of an update that `combine` leaves out; the trainer reports `logprob_mismatch` itself."""


def combine(updates: list[dict[str, float]]) -> dict[str, float]:
    """One step's metrics from its optimizer steps', each as `tracking.schema` says that it aggregates.

    An update without a loss token measured nothing of its tokens: means over tokens and maxima of `policy/*` leave it out.
    """
    tokens = sum(update["tokens"] for update in updates)
    combined: dict[str, float] = {"tokens": tokens}
    for key in sorted({key for update in updates for key in update}.difference(_APART)):
        name = key if "/" in key else f"policy/{key}"
        having = [u for u in updates if key in u and (u["tokens"] > 0 or "/" in key)]
        if not having:
            continue
        values = [update[key] for update in having]
        aggregate = aggregate_of(name)
        if aggregate is Aggregate.maximum:
            combined[name] = max(values)
        elif aggregate is Aggregate.token_mean:
            combined[name] = sum(u[key] * u["tokens"] for u in having) / tokens
        else:
            combined[name] = sum(values) / len(values)
    return combined

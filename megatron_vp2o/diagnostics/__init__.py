"""What experts, router and rollouts look like, for any loop: needs torch and nothing of Megatron (docs/diagnostics.md)."""

from megatron_vp2o.diagnostics.rollouts import Group, Response, read_rollouts, rollout_metrics
from megatron_vp2o.diagnostics.routing import LayerRecorder, RoutingReport, report_of
from megatron_vp2o.diagnostics.transformers_moe import Observation, observe

__all__ = [
    "Group",
    "LayerRecorder",
    "Observation",
    "Response",
    "RoutingReport",
    "observe",
    "read_rollouts",
    "report_of",
    "rollout_metrics",
]

"""What a step showed, as metrics: each against a count in plain Python, and means over layers whatever stage holds them."""

from __future__ import annotations

import math
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.megatron.model.routing_statistics import SUMS, RoutingStatistics  # noqa: E402
from megatron_vp2o.megatron.stein import metrics  # noqa: E402
from megatron_vp2o.megatron.stein.metrics import METRICS, MeansOverLayers, StageObservation  # noqa: E402
from megatron_vp2o.megatron.stein.prototypes import PrototypeState  # noqa: E402
from megatron_vp2o.tracking.schema import find_metric  # noqa: E402

EXPERTS, TOKENS, HIDDEN = 5, 13, 3
CPU = torch.device("cpu")


def observed(seed: int, layers: int, tokens: int = TOKENS) -> tuple[StageObservation, dict[str, list[float]]]:
    """A drawn observation of some layers, and each layer's metrics by counting."""
    random = Random(seed)
    generator = torch.Generator().manual_seed(seed)
    totals, expected = [], {name: [] for name in METRICS}  # type: ignore[var-annotated]
    prototypes_LED = torch.nn.functional.normalize(torch.randn(layers, EXPERTS, HIDDEN, generator=generator), dim=-1)
    residual_LE = torch.rand(layers, EXPERTS, generator=generator)
    attraction_LEE = torch.rand(layers, EXPERTS, EXPERTS, generator=generator)
    repulsion_L = torch.rand(layers, generator=generator)
    active = []
    for layer in range(layers):
        chosen = [
            sorted(random.sample(range(EXPERTS - 1), 2)) for _ in range(tokens)
        ]  # the last expert is never chosen
        valid = [random.random() < 0.8 or t == 0 for t in range(tokens)]
        probabilities_TE = torch.rand(tokens, EXPERTS, generator=generator).softmax(-1)
        map_TE = torch.zeros(tokens, EXPERTS, dtype=torch.bool)
        for t, experts in enumerate(chosen):
            map_TE[t, experts] = True
        statistics = RoutingStatistics(EXPERTS)
        cut = random.randrange(tokens + 1)
        for span in (slice(0, cut), slice(cut, tokens)):  # two micro-batches
            statistics.add_routing(map_TE[span], probabilities_TE[span], torch.tensor(valid[span], dtype=torch.bool))
        drawn = {name: 10 * random.random() for name in ("output_overlap", "orthogonality", "variance")}
        drawn["output_pairs"] = float(random.randrange(1, 9))
        for name, value in drawn.items() if tokens else ():
            statistics.add(name, torch.tensor(value))
        totals.append(statistics.take(CPU))
        counted = [set(experts) for experts, counts in zip(chosen, valid, strict=True) if counts]
        loads = [sum(e in experts for experts in counted) for e in range(EXPERTS)]
        active.append([load > 0 for load in loads])
        if not counted:
            continue
        shares = [load / sum(loads) for load in loads if load]
        pairs = [(i, j) for i in range(EXPERTS) for j in range(EXPERTS) if i != j]
        overlaps = [float(prototypes_LED[layer, i] @ prototypes_LED[layer, j]) ** 2 for i, j in pairs]
        spectrum = torch.linalg.svdvals(prototypes_LED[layer].double()).square()  # of V, not of its Gram matrix
        directions = [float(value / spectrum.sum()) for value in spectrum]
        entropy = [-sum(float(p) * math.log(float(p)) for p in probabilities_TE[t]) for t in range(tokens) if valid[t]]
        self_weights = [float(attraction_LEE[layer, e, e]) for e in range(EXPERTS) if loads[e]]
        found = {
            "moe/effective_experts": math.exp(-sum(p * math.log(p) for p in shares)) / EXPERTS,
            "moe/expert_utilisation": sum(load > 0 for load in loads) / EXPERTS,
            "moe/load_violation": max(loads) / (sum(loads) / EXPERTS) - 1,
            "moe/orthogonality_loss": drawn["orthogonality"] / len(counted),
            "moe/output_overlap": drawn["output_overlap"] / drawn["output_pairs"],
            "moe/router_entropy": sum(entropy) / len(counted),
            "moe/variance_loss": drawn["variance"] / len(counted),
            "stein/coactivation_sparsity": sum(not any({i, j} <= s for s in counted) for i, j in pairs) / len(pairs),
            "stein/prototype_overlap": sum(overlaps) / len(pairs),
            "stein/prototype_overlap_max": max(overlaps),
            "stein/prototype_rank": math.exp(-sum(p * math.log(p) for p in directions if p > 1e-12)),
            "stein/prototype_residual": float(residual_LE[layer].double().mean()),
            "stein/repulsion_ratio": float(repulsion_L[layer]),
            "stein/self_weight": sum(self_weights) / len(self_weights),
        }
        for name, value in found.items():
            expected[name].append(value)
    seen = StageObservation(
        counts_LEE=torch.stack([total.counts_EE for total in totals]),
        sums_LS=torch.stack([total.sums for total in totals]),
        prototypes=PrototypeState(prototypes_LED, residual_LE),
        attraction_LEE=attraction_LEE,
        active_LE=torch.tensor(active),
        repulsion_ratio_L=repulsion_L,
    )
    return seen, expected


def means_over_layers(seen: StageObservation | None, layers: int, groups: Any) -> dict[str, float]:
    return MeansOverLayers(groups).of(seen, layers).read()


def groups_of(stages: int) -> Any:
    return SimpleNamespace(device=CPU, pp=SimpleNamespace(size=lambda: stages))


@pytest.mark.parametrize("seed", range(8))
def test_each_metric_is_the_mean_of_what_counting_gives(seed: int) -> None:
    layers = 1 + seed % 3
    seen, expected = observed(seed, layers)
    found = means_over_layers(seen, layers, groups_of(1))
    assert found.keys() == expected.keys() == METRICS.keys()
    for name, values in expected.items():
        assert len(values) == layers and METRICS[name](seen).tolist() == pytest.approx(values, rel=1e-5, abs=1e-6), name
        assert found[name] == pytest.approx(sum(values) / layers, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("sizes", [(1, 2), (2, 0), (0, 1)])
def test_stages_of_any_size_report_the_mean_over_all_layers(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer weighs the same, not each stage; a stage without MoE layers adds nothing."""
    stages = [observed(seed, size) if size else (None, {}) for seed, size in enumerate(sizes)]
    own: list[torch.Tensor] = []
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda sums, group: own.append(sums.clone()))
    for (seen, _), size in zip(stages, sizes, strict=True):
        means_over_layers(seen, size, groups_of(2))
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda sums, group: sums.copy_(own[0] + own[1]))
    reports = [means_over_layers(seen, size, groups_of(2)) for (seen, _), size in zip(stages, sizes, strict=True)]
    assert reports[0] == reports[1]
    for name, value in reports[0].items():
        values = [x for _, expected in stages for x in expected.get(name, [])]
        assert value == pytest.approx(sum(values) / len(values), rel=1e-5, abs=1e-6), name


def test_a_step_without_a_token_says_only_what_prototypes_are() -> None:
    seen, _ = observed(0, 2, tokens=0)
    found = means_over_layers(seen, 2, groups_of(1))
    assert found.keys() == {name for name in METRICS if name.startswith("stein/prototype_")}
    assert all(math.isfinite(value) for value in found.values()) and found["stein/prototype_rank"] > 1


def test_every_metric_is_documented() -> None:
    assert [name for name in METRICS if find_metric(name) is None] == []
    assert len(SUMS) == 6

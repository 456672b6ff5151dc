"""Expert weights as one matrix, wherever the parameters lie, against a loop over experts, as these move about."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.megatron.stein.expert_weights import ExpertWeights, OutputGradients, Row  # noqa: E402

HIDDEN, WIDTH = 3, 4
SIZE = HIDDEN * WIDTH


def placed(kind: str, experts: int, dtype: torch.dtype) -> list[Parameter]:
    """Parameters [D, F] of the experts: side by side, backwards, with gaps, each by itself."""
    step = SIZE + (2 if kind == "gaps" else 0)
    base = torch.randn(1 + experts * step).to(dtype)
    order = range(experts - 1, -1, -1) if kind == "backwards" else range(experts)
    views = [base[1 + i * step : 1 + i * step + SIZE].view(HIDDEN, WIDTH) for i in order]
    return [Parameter(view.clone() if kind == "apart" else view) for view in views]


KINDS = st.sampled_from(["beside", "backwards", "gaps", "apart"])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_projections_are_those_of_the_present_parameters(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    parameters = placed(data.draw(KINDS), experts, dtype)
    weights = ExpertWeights(1, 0, {"out": [Row(p, 0, SIZE) for p in parameters]}, "out", HIDDEN)
    for change in data.draw(st.lists(st.sampled_from(["step", "move", "nothing"]), min_size=1, max_size=4)):
        if change == "step":
            with torch.no_grad():
                for parameter in parameters:
                    parameter.add_(1.0)
        if change == "move":
            for parameter, there in zip(parameters, placed(data.draw(KINDS), experts, dtype), strict=True):
                parameter.data = there.data
        expected_EDF = torch.stack([parameter.detach().float() for parameter in parameters])
        assert torch.equal(weights.output_projection(), expected_EDF)


def test_one_parameter_of_all_experts_whichever_way_it_lies() -> None:
    for transposed in (False, True):
        whole = Parameter(torch.randn(2 * SIZE))
        rows = [Row(whole, e * SIZE, SIZE) for e in range(2)]
        found_EDF = ExpertWeights(1, 0, {"out": rows}, "out", HIDDEN, transposed).output_projection()
        for e in range(2):
            part = whole.detach()[e * SIZE : (e + 1) * SIZE]
            expected_DF = part.view(WIDTH, HIDDEN).t() if transposed else part.view(HIDDEN, WIDTH)
            assert torch.equal(found_EDF[e], expected_DF)


def test_weights_that_a_host_takes_away_are_not_held() -> None:
    (parameter,) = placed("apart", 1, torch.bfloat16)
    weights = ExpertWeights(1, 0, {"out": [Row(parameter, 0, SIZE)]}, "out", HIDDEN)
    weights.output_projection()
    storage: Any = weakref.ref(parameter.data.untyped_storage())
    kept = parameter.data.data_ptr()
    parameter.data = torch.zeros(HIDDEN, WIDTH, dtype=torch.bfloat16)
    gc.collect()
    assert storage() is None and parameter.data_ptr() != kept
    assert not weights.output_projection().any()


@settings(max_examples=40, deadline=None)
@given(kind=KINDS, experts=st.integers(1, 4), transposed=st.booleans(), seed=st.integers(0, 99))
def test_a_rank_two_term_is_added_to_each_experts_gradient(
    kind: str, experts: int, transposed: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    rows = [parameter.data.view(-1) for parameter in placed(kind, experts, torch.float32)]
    before = [row.clone() for row in rows]
    left_ED2, right_E2F = torch.randn(experts, HIDDEN, 2), torch.randn(experts, 2, WIDTH)
    OutputGradients(rows, transposed).add(left_ED2, right_E2F)
    for e, row in enumerate(rows):
        term_DF = left_ED2[e] @ right_E2F[e]
        torch.testing.assert_close(row - before[e], (term_DF.t() if transposed else term_DF).reshape(-1))

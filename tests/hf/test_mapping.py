"""Rules: each operation undoes itself and has the layout that Megatron's code reads; families cover their checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.families import FAMILIES, architecture
from megatron_vp2o.hf.mapping import QKV, Copy, GateUp, InterleavedGateUp, Layers, Operation, Transpose
from megatron_vp2o.hf.plan import Layout, make_plan

QWEN3 = {
    "model_type": "qwen3_moe",
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "norm_topk_prob": True,
}


def _numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        (Copy(), [(3, 4)]),
        (Transpose(), [(3, 4)]),
        (GateUp(), [(5, 4), (5, 4)]),
        (InterleavedGateUp(), [(4, 10)]),
        (InterleavedGateUp(), [(10,)]),
        (QKV(2, 3), [(12, 5), (6, 5), (6, 5)]),
        (QKV(2, 3), [(12,), (6,), (6,)]),
        (QKV(1, 3), [(3, 5), (3, 5), (3, 5)]),
    ],
)
def test_operations_are_bijections(operation: Operation, shapes: list[tuple[int, ...]]) -> None:
    parts = [_numbered(*shape) + 1000 * i for i, shape in enumerate(shapes)]
    merged = operation.to_megatron(parts)
    assert merged.shape == operation.shape(shapes)
    assert merged.numel() == sum(part.numel() for part in parts)
    assert sorted(merged.flatten().tolist()) == sorted(n for part in parts for n in part.flatten().tolist())
    for part, back in zip(parts, operation.to_hf(merged), strict=True):
        assert torch.equal(part, back)


def test_qkv_is_grouped_as_megatron_reads_it() -> None:
    """Megatron views the rows as [groups, queries of the group + key + value, width] (attention.py)."""
    groups, queries, width = 2, 3, 4
    q, k, v = _numbered(groups * queries * width), _numbered(groups * width) + 100, _numbered(groups * width) + 200
    rows = QKV(groups, width).to_megatron([q, k, v]).view(groups, queries + 2, width)
    for group in range(groups):
        assert rows[group, :queries].flatten().tolist() == list(range(group * 12, group * 12 + 12))
        assert rows[group, queries].tolist() == list(range(100 + group * 4, 104 + group * 4))
        assert rows[group, queries + 1].tolist() == list(range(200 + group * 4, 204 + group * 4))


def test_interleaved_columns_become_gate_rows_then_up_rows() -> None:
    columns = torch.tensor([[0, 10, 1, 11, 2, 12]])  # one input, gates 0 1 2, ups 10 11 12
    assert InterleavedGateUp().to_megatron([columns]).flatten().tolist() == [0, 1, 2, 10, 11, 12]


def test_every_row_of_every_tensor_is_in_one_step() -> None:
    model = architecture({**QWEN3, "mlp_only_layers": [0]})
    assert model.moe_layers == (False, True, True, True)
    plan = make_plan(model, layout=Layout(), padded_vocab=128)
    seen: dict[str, int] = {}
    for step in plan.steps:
        for piece in step.pieces:
            seen[piece.name] = seen.get(piece.name, 0) + piece.count
    assert seen == {name: shape[0] for name, shape in model.hf_tensors().items()}
    assert plan.shapes["embedding.word_embeddings.weight"] == (128, 16)
    assert plan.shapes["decoder.layers.2.mlp.experts.experts.linear_fc1.weight"] == (6, 24, 16)


def test_layers_are_stacked_where_all_are_alike() -> None:
    plan = make_plan(architecture(QWEN3))
    assert plan.shapes["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (4, 6, 24, 16)
    assert plan.aliases["decoder.layers.pre_mlp_layernorm.weight"] == "decoder.layers.mlp.linear_fc1.layer_norm_weight"


def test_large_matrices_are_moved_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vp2o.hf.plan.SLAB", 16 * 30)
    model = architecture(QWEN3)
    for tensor in (1, 2, 4):
        plan = make_plan(model, layout=Layout(tensor=tensor), padded_vocab=128)
        chunks = [
            region for step in plan.steps if step.region.key == "output_layer.weight" for region, _ in step.written()
        ]
        assert sum(region.sizes[0] for region in chunks) == 128
        assert [region.offsets[0] for region in chunks] == sorted({region.offsets[0] for region in chunks})
        assert max(region.sizes[0] for region in chunks) <= 30
        bounds = {region.offsets[0] for region in chunks}
        assert {128 // tensor * rank for rank in range(tensor)} <= bounds  # a rank's rows are chunks of their own


def test_a_layout_that_does_not_divide_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"tensor parallelism of 3"):
        make_plan(architecture(QWEN3), layout=Layout(tensor=3), padded_vocab=128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'.*qwen3_moe"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised .fp8.*Dequantise"),
    ],
)
def test_what_has_no_counterpart_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        architecture({**QWEN3, **change})


def test_what_a_config_lacks_has_the_value_of_transformers() -> None:
    for name, value in (("hidden_size", 2048), ("num_experts", 128), ("rope_theta", 10000.0)):
        model = architecture({key: kept for key, kept in QWEN3.items() if key != name})
        found = {**model.settings, **model.embedding, "num_experts": model.num_experts}
        assert found[{"rope_theta": "rotary_base"}.get(name, name)] == value


def test_rules_are_well_formed() -> None:
    model = architecture(QWEN3)
    assert set(FAMILIES) == {"qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss"}
    for rule in model.rules:
        assert dataclasses.is_dataclass(rule)
        assert ("{l}" in rule.megatron) == (rule.layers is not Layers.none)
        assert all(("{e}" in part.name) == rule.per_expert for part in rule.parts)
        assert rule.split is None or rule.split < len(rule.shape)

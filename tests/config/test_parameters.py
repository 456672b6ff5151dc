"""The count from settings against Megatron's own modules, built on the meta device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.parameters import count_on_rank, count_parameters
from megatron_vp2o.config.schema import Implementation, ModelConfig, ParallelConfig, SoftmaxType
from megatron_vp2o.megatron.model.build import build_model
from megatron_vp2o.megatron.platform import cpu, world
from megatron_vp2o.parallel.groups import Groups

QWEN_VOCABULARY = 151_936
TINY_VOCABULARY = 128


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    cpu.enable_cpu()
    bundle = world.start(ParallelConfig(), 0)
    try:
        yield dataclasses.replace(bundle, device=torch.device("meta"))
    finally:
        world.stop()


def built(model: ModelConfig, groups: Groups, vocab_size: int) -> tuple[int, int]:
    """All parameters and those of routed experts, of the real model. Nothing is allocated."""
    model = dataclasses.replace(model, implementation=Implementation.local)
    with torch.device("meta"):
        gpt = build_model(model, ParallelConfig(), groups, vocab_size=vocab_size, seed=0, inference=True)
    sizes = {name: parameter.numel() for name, parameter in gpt.named_parameters()}
    assert all(parameter.device.type == "meta" for parameter in gpt.parameters())
    return sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"moe_shared_expert_intermediate_size": 96},
        {"share_embeddings_and_output_weights": True},
        {"qk_layernorm": False},
        {"add_bias_linear": True, "softmax_type": SoftmaxType.learnable, "qk_layernorm": False},
        {"num_query_groups": 4, "num_moe_experts": 6, "moe_ffn_hidden_size": 24},
    ],
    ids=str,
)
def test_the_count_is_that_of_the_built_model(change: dict, groups: Groups) -> None:
    model = ModelConfig(**change)
    count = count_parameters(model, TINY_VOCABULARY)
    assert (count.total, count.experts) == built(model, groups, TINY_VOCABULARY)
    alone = count_on_rank(model, ParallelConfig(), TINY_VOCABULARY)
    assert (alone.dense, alone.expert) == (count.dense, count.experts)


def test_the_33b_shape_is_that_of_the_built_model(groups: Groups) -> None:
    """Its layers are all alike, so two of them and the difference between one and two say everything."""
    whole = compose("train", ["model=vp2o_33b_a4b"]).model
    one, two = (built(dataclasses.replace(whole, num_layers=n), groups, QWEN_VOCABULARY) for n in (1, 2))
    total, experts = (a + (whole.num_layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
    count = count_parameters(whole, QWEN_VOCABULARY)
    assert (count.total, count.experts) == (total, experts)


def test_the_33b_shape_is_of_the_papers_size() -> None:
    count = count_parameters(compose("train", ["model=vp2o_33b_a4b"]).model, QWEN_VOCABULARY)
    assert count.total == pytest.approx(33.0e9, rel=0.02)
    assert count.active == pytest.approx(4.0e9, rel=0.03)


def test_qwen3_30b_is_as_published() -> None:
    count = count_parameters(compose("train", ["model=qwen3_30b_a3b"]).model, QWEN_VOCABULARY)
    assert count.total == pytest.approx(30.5e9, rel=0.002)
    assert count.active == pytest.approx(3.3e9, rel=0.02)


def test_a_rank_by_hand() -> None:
    """Tiny: D 128, 4 heads of 32 and 2 groups, 16 experts of width 64, 4 layers; TP 2, PP 2, EP 4, ETP 2."""
    layout = ParallelConfig(tensor_parallel=2, pipeline_parallel=2, expert_parallel=4, expert_tensor_parallel=2)
    rank = count_on_rank(ModelConfig(), layout, TINY_VOCABULARY)
    attention = 128 * (128 + 64 + 64 + 128) // 2
    layer = attention + 16 * 128 + 2 * 128 + 2 * 32
    assert rank.dense == 2 * layer + 128 * 128 // 2 + 128
    assert rank.expert == 2 * (16 // 4) * (3 * 128 * 64 // 2)

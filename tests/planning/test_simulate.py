"""Ranks of worlds that are not here: every layout, every recipe, and what they send against the planner's arithmetic."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.parameters import count_on_rank, count_parameters
from megatron_vp2o.config.register import recipe_names
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.planning.hardware import Assumptions, hardware_of
from megatron_vp2o.planning.memory import static_memory
from megatron_vp2o.planning.servers import ranks_on
from megatron_vp2o.planning.simulate import (
    Trace,
    built_parameters,
    describe,
    disagreements,
    sample_ranks,
    trace,
)
from megatron_vp2o.planning.traffic import traffic
from megatron_vp2o.planning.workload import padded_vocabulary, workload

IDS = 104
WIDTH = 64


def shallow(config: TrainConfig, layers: int) -> TrainConfig:
    """The same with fewer layers, which are all alike."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=layers))


def traced(config: TrainConfig, ranks: list[int], gpus: int, width: int = WIDTH) -> dict[int, Trace]:
    return {rank: trace(config, rank, gpus, width=width, vocab_size=IDS) for rank in ranks}


LARGE = [name for name in recipe_names() if hardware_of(name)[0] > 1]
LONG = [name for name in LARGE if "_16k_" in name]


def built_differently(names: list[str]) -> list[str]:
    """The first recipe of those that build the same: tasks and rewards differ by none of what a rank holds."""
    first: dict[str, str] = {}
    for name in names:
        config = compose(name)
        parts = (config.model, config.parallel, config.algorithm, config.optimizer, config.rollout)
        first.setdefault(repr((ranks_on(config, hardware_of(name)[0]), parts)), name)
    return list(first.values())


@pytest.mark.parametrize("name", LONG)
def test_longer_responses_build_nothing_else(name: str) -> None:
    short, long = compose(name.replace("_16k_", "_8k_")), compose(name)
    long.rollout.sampling.max_new_tokens = short.rollout.sampling.max_new_tokens
    assert dataclasses.replace(long, name=short.name, run_dir=short.run_dir) == short


@pytest.mark.parametrize("name", built_differently([name for name in LARGE if name not in LONG]))
def test_every_large_recipe_is_built_and_steps(name: str) -> None:
    gpus = ranks_on(compose(name), hardware_of(name)[0])
    config = shallow(compose(name), 2)
    vocabulary = padded_vocabulary(config)
    traces = traced(config, [0, gpus - 1], gpus)
    assert disagreements(traces) == []
    for each in traces.values():
        rank = count_on_rank(config.model, config.parallel, vocabulary)
        assert (each.parameters, each.expert_parameters) == (rank.total, rank.expert)
        planned = static_memory(config, gpus, vocabulary)
        assert each.memory["weights"] == planned["weights"]
        for kind in ("gradients", "optimizer"):  # Megatron pads the shares of sharded buckets
            assert each.memory[kind] == pytest.approx(planned[kind], rel=1e-4)
        assert (each.stein is not None) == config.algorithm.stein.enabled
        assert each.stein is None or each.stein.workspace_bytes <= config.algorithm.stein.chunk_mib * 2**20


def test_all_groups_of_a_rank_agree() -> None:
    """First, middle and last of every group that rank 0 of the 33B recipe is in."""
    config = shallow(compose("vp2o_33b_a4b_countdown4_8k_64xh100"), 1)
    first = trace(config, 0, 64, width=WIDTH, vocab_size=IDS)
    assert {name: len(ranks) for name, ranks in first.groups.items()} == {
        "world": 64,
        "tp": 2,
        "cp": 1,
        "pp": 1,
        "dp": 32,
        "ep": 16,
        "etp": 1,
        "expert_dp": 4,
        "stage": 64,
    }
    others = {rank for group in first.groups.values() for rank in sample_ranks(group)} - {0}
    traces = {0: first, **traced(config, sorted(others), 64)}
    assert disagreements(traces) == []
    assert len(traces) >= 6
    assert "equal on all ranks that share a group" in describe(traces)


@pytest.mark.parametrize(
    "recipe",
    [
        "vp2o_33b_a4b_countdown4_16k_64xh100",
        "vp2o_mixtral_8x7b_countdown4_8k_64xh100",
        "vp2o_33b_a4b_countdown4_context2_64xh100",
    ],
)
def test_bytes_sent_are_the_planners(recipe: str) -> None:
    """One micro-batch at the recipe's full length."""
    config = shallow(compose(recipe), 2)
    work = workload(config, 64, Assumptions())
    found = trace(config, 3, 64, width=work.longest, vocab_size=IDS)
    one = dataclasses.replace(work, micro_batches=1, updates=1, tokens=float(work.longest))
    planned = traffic(config, 64, padded_vocabulary(config), one)
    sent = {
        name: sum(phase.get(name, 0) for phase in found.sent().values()) for name in ("all_gather", "reduce_scatter")
    }
    before = found.sent()["build"]
    measured = sum(sent.values()) - sum(before.get(name, 0) for name in sent)
    rings = ("gradients", "parameters", "tensor parallelism", "context parallelism", "expert tensor parallelism")
    expected = sum(stream.bytes for name, stream in planned.items() if name.startswith(rings))
    assert measured == pytest.approx(expected, rel=0.01)
    moved = found.sent()["forward_backward"]["all_to_all"]
    assert moved == pytest.approx(planned["expert parallelism"].bytes, rel=0.01)
    assert found.stein is not None
    assert found.stein.bytes_sent == found.sent()["stein"]["all_to_all"]
    assert 0.7 * planned["Stein exchange"].bytes < found.stein.bytes_sent <= planned["Stein exchange"].bytes * 1.05


def test_512_experts_on_64_ranks() -> None:
    overrides = ["model.num_moe_experts=512", "parallel.expert_parallel=64", "parallel.tensor_parallel=1"]
    config = shallow(compose("vp2o_33b_a4b_countdown4_8k_64xh100", overrides), 1)
    traces = traced(config, [0, 32, 63], 64)
    assert disagreements(traces) == []
    for each in traces.values():
        assert each.stein is not None and len(each.stein.ranks) == 64
        assert each.stein.workspace_bytes <= config.algorithm.stein.chunk_mib * 2**20
        mixed = [found for found in each.collectives if found.phase == "stein" and found.op == "all_to_all"]
        assert len(mixed) == 2 * each.stein.rounds > 2
        assert {len(found.sends) for found in mixed} == {64}


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        (["parallel.tensor_parallel=2", "parallel.expert_parallel=2", "parallel.pipeline_parallel=2"], 8),
        (["parallel.tensor_parallel=2", "parallel.expert_tensor_parallel=2", "parallel.expert_parallel=4"], 16),
        (
            [
                "parallel.expert_parallel=4",
                "model.moe_token_dispatcher_type=allgather",
                "algorithm.specialization.orthogonality_coef=0",
            ],
            4,
        ),
        (["parallel.expert_parallel=2", "parallel.distributed_optimizer=true", "model.precision=bf16"], 8),
        (["parallel.context_parallel=2", "parallel.tensor_parallel=2", "parallel.pipeline_parallel=2"], 8),
    ],
)
def test_other_layouts_of_the_tiny_model(overrides: list[str], gpus: int) -> None:
    config = shallow(compose("countdown_tiny_vp2o", overrides), 2)
    traces = traced(config, sorted({0, gpus // 2, gpus - 1}), gpus)
    assert disagreements(traces) == []


def test_a_disagreement_is_found() -> None:
    config = compose("countdown_tiny_grpo", ["parallel.expert_parallel=2", "model.num_layers=1"])
    ours = trace(config, 0, 2, width=WIDTH, vocab_size=IDS)
    theirs = trace(config, 1, 2, width=WIDTH, vocab_size=IDS)
    assert disagreements({0: ours, 1: theirs}) == []
    short = dataclasses.replace(theirs, collectives=theirs.collectives[:-1])
    assert "collectives" in disagreements({0: ours, 1: short})[0]
    longer = trace(config, 1, 2, width=WIDTH + 2, vocab_size=IDS)
    assert "elements are sent where" in disagreements({0: ours, 1: longer})[0]


@pytest.mark.parametrize("name", ["33b_a4b", "qwen3_30b_a3b", "gpt_oss_20b", "mixtral_8x7b"])
def test_the_count_is_that_of_the_built_model(name: str) -> None:
    """Layers are all alike, so two of them and the difference between one and two say everything."""
    (recipe,) = [found for found in recipe_names() if found.startswith(f"grpo_{name}_countdown4_8k")]
    config = compose(recipe)
    vocabulary = padded_vocabulary(config)
    one, two = (built_parameters(shallow(config, layers), vocabulary) for layers in (1, 2))
    found = tuple(a + (config.model.num_layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
    count = count_parameters(config.model, vocabulary)
    assert found == (count.total, count.experts)

"""The planner's predictions against the tiny model's real training on this CPU (the table in docs/planning.md)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.parameters import count_parameters
from megatron_vp2o.config.schema import ParallelConfig, TrainConfig
from megatron_vp2o.planning.compute import forward_flops, recomputing_flops, training_flops
from megatron_vp2o.planning.memory import static_memory as planned_memory
from megatron_vp2o.planning.simulate import static_memory
from megatron_vp2o.planning.workload import padded_vocabulary

from megatron_vp2o.megatron.platform import world  # isort: skip
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # isort: skip
from megatron_vp2o.parallel.groups import Groups  # isort: skip
from megatron_vp2o.rl.objectives import next_token  # isort: skip
from megatron_vp2o.rl.types import TrainBatch  # isort: skip

ROWS, WIDTH, IDS = 64, 32, 104


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    bundle = world.start(ParallelConfig(), 0)
    try:
        yield bundle
    finally:
        world.stop()


def batch(rows: int = ROWS) -> TrainBatch:
    tokens = torch.randint(IDS, (rows, WIDTH), generator=torch.Generator().manual_seed(0))
    return TrainBatch(tokens, torch.full((rows,), WIDTH), torch.ones(rows, WIDTH, dtype=torch.bool), 1.0)


def policy(config: TrainConfig, groups: Groups) -> MegatronPolicy:
    return MegatronPolicy(config, groups, vocab_size=IDS, optimizer_steps=100)


def _forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# torch's table of formulas has the attention of GPUs, not this one.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


@pytest.mark.parametrize("recompute", [False, True])
def test_operations_are_exact(recompute: bool, groups: Groups) -> None:
    config = compose("train", [f"model.recompute={str(recompute).lower()}"])
    real, vocabulary = policy(config, groups), padded_vocabulary(config)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        real.forward_backward(batch(), next_token, ROWS)
    expected = training_flops(config.model, ROWS, WIDTH, vocabulary) + recomputing_flops(config.model, ROWS, WIDTH)
    assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        real.log_probs(batch(), ROWS)
    assert counter.get_total_flops() == forward_flops(config.model, ROWS, WIDTH, vocabulary)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parameters_and_static_memory_are_exact(precision: str, groups: Groups) -> None:
    config = compose("train", [f"model.precision={precision}"])
    real, vocabulary = policy(config, groups), padded_vocabulary(config)
    real.forward_backward(batch(8), next_token, 8)
    assert not real.optimizer_step(1).skipped
    assert sum(p.numel() for p in real.model.parameters()) == count_parameters(config.model, vocabulary).total
    assert static_memory(real) == planned_memory(config, 1, vocabulary)


def test_step_time_follows_from_the_speed_of_products(groups: Groups, request: pytest.FixtureRequest) -> None:
    """Within a factor of four of what the machine's own speed at the model's shapes says; see docs/planning.md.

    On one thread: several that wait for cores on a busy machine burn the processor time that is measured.
    """
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    config = compose("train")
    real, vocabulary = policy(config, groups), padded_vocabulary(config)
    model = config.model
    rows = ROWS * WIDTH * model.moe_router_topk // model.num_moe_experts  # tokens of one expert
    left, right = torch.randn(rows, model.hidden_size), torch.randn(model.hidden_size, 2 * model.moe_ffn_hidden_size)
    speed = 2 * rows * model.hidden_size * 2 * model.moe_ffn_hidden_size / _best(lambda: left @ right, 200)
    flops = training_flops(model, ROWS, WIDTH, vocabulary)
    real.forward_backward(batch(), next_token, ROWS)
    measured = _best(lambda: real.forward_backward(batch(), next_token, ROWS), 8)
    predicted = flops / (0.5 * speed)
    print(f"predicted {predicted * 1e3:.1f} ms, measured {measured * 1e3:.1f} ms")
    assert predicted / 4 < measured < predicted * 4


def _best(call: Any, times: int) -> float:
    found = []
    for _ in range(times):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return min(found)

"""`model.implementation=torch` against `local`: values, gradients, steps and checkpoints, on the CPU.

tests/pretend/ has whole runs of both, on several ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.config.schema import Implementation, Precision  # noqa: E402
from megatron_vp2o.megatron.learner.fused_adam import FusedAdamW, adamw_for  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.model.experts import GroupedProductMLP  # noqa: E402
from megatron_vp2o.megatron.model.norm import FusedRMSNorm, RMSNorm  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.rl.objectives import next_token  # noqa: E402
from megatron_vp2o.rl.types import TrainBatch  # noqa: E402
from tests.distributed import run_distributed  # noqa: E402
from tests.megatron import policy_job  # noqa: E402

VOCAB = 64


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    yield
    world.stop()


@pytest.fixture(autouse=True)
def no_model() -> Iterator[None]:
    yield
    world.stop_model_parallel()


def batch_of(dice: random.Random) -> TrainBatch:
    rows, width = dice.randint(1, 7), dice.randint(2, 24)
    tokens_NS = torch.tensor([[dice.randrange(VOCAB) for _ in range(width)] for _ in range(rows)])
    length_N = torch.tensor([dice.randint(2, width) for _ in range(rows)])
    mask_NS = torch.arange(width) < length_N[:, None]
    mask_NS[:, 0] = False
    return TrainBatch(tokens_NS, length_N, mask_NS, temperature=dice.choice([1.0, 0.7]))


def trained(implementation: Implementation, draw: int, *, steps: int = 2, **changes: Any) -> dict[str, Any]:
    """Losses, gradients before each optimizer step, and the weights after the last."""
    dice = random.Random(draw)
    config = policy_job.small_config(distributed_optimizer=dice.random() < 0.5)
    config.model.implementation = implementation
    config.model.recompute = dice.random() < 0.3
    config.model.num_query_groups = dice.choice([config.model.num_attention_heads, 1])
    algorithm: Any = config.algorithm
    algorithm.micro_batch_tokens = dice.choice([None, 40])
    # so large an epsilon that gradients which are nothing but rounding do not become steps of full size
    config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.adam_eps = 3e-2, 0.1, 1e-2
    for name, value in changes.items():
        setattr(config.model, name, value)
    groups = world.start(config.parallel, config.seed)
    policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=10)
    found: dict[str, Any] = {"policy": policy, "losses": [], "gradients": []}
    for _ in range(steps):
        metrics = policy.forward_backward(batch_of(dice), next_token, 2)
        found["losses"].append(metrics["loss"])
        found["gradients"].append({n: p.main_grad.clone() for n, p in policy.model.named_parameters()})
        assert not policy.optimizer_step(int(metrics["tokens"])).skipped
    found["weights"] = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    return found


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float, **said: Any) -> None:
    """Each tensor to the bound times its largest value; one that is next to nothing, times a hundredth of the largest of all."""
    assert found.keys() == expected.keys()
    sizes = {name: float(value.float().abs().max()) for name, value in expected.items()}
    for name, value in expected.items():
        size = max(sizes[name], 1e-2 * max(sizes.values()))
        assert float((found[name] - value).float().abs().max()) <= bound * size, (name, said)


@pytest.mark.parametrize("draw", range(4))
def test_values_gradients_and_steps_in_float32(draw: int) -> None:
    """Rows padded or packed, with grouped heads or without, recomputed or not, gradients sharded or not."""
    local = trained(Implementation.local, draw)
    world.stop_model_parallel()
    torch_ = trained(Implementation.torch, draw)
    kinds = {type(module) for module in torch_["policy"].model.modules()}
    assert {GroupedProductMLP, FusedRMSNorm} <= kinds and RMSNorm not in kinds
    assert all(isinstance(one.optimizer, FusedAdamW) for one in torch_["policy"].optimizers())
    assert not any(isinstance(one.optimizer, FusedAdamW) for one in local["policy"].optimizers())
    assert torch_["losses"][0] == pytest.approx(local["losses"][0], rel=1e-5)
    assert torch_["losses"][1] == pytest.approx(local["losses"][1], rel=1e-5) != torch_["losses"][0]
    close(torch_["gradients"][0], local["gradients"][0], 2e-5, step=0)
    close(torch_["gradients"][1], local["gradients"][1], 2e-4, step=1)
    moved = [n for n, p in local["weights"].items() if float((p - torch_["weights"][n]).abs().max()) > 0]
    assert moved, "two implementations that agree to the last bit are the same one"
    close(torch_["weights"], local["weights"], 2e-4)


CONTEXT: dict[int, list[dict[str, Any]]] = {
    2: [{"context_parallel": 2}, {"context_parallel": 2, "expert_parallel": 2, "distributed_optimizer": True}],
    4: [{"context_parallel": 2, "tensor_parallel": 2}],
}


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    (results,) = run_distributed("tests.megatron.policy_job:run", 1, [{}], {"implementation": "local"})
    return dict(results[0])


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.smoke), 4])
def test_sequences_over_several_ranks(one_process: dict[str, Any], ranks: int) -> None:
    """Generation, scoring and four steps of training under context parallelism, against `local` in one process."""
    by_rank = run_distributed("tests.megatron.policy_job:run", ranks, CONTEXT[ranks], {"implementation": "torch"})
    for layout, *found in zip(CONTEXT[ranks], *by_rank, strict=True):
        for rank, ours in enumerate(found):
            where = f"{layout}, rank {rank}"
            assert ours["tokens"] == one_process["tokens"], where
            for key in ("loss", "entropy", "grad_norm"):
                assert ours[key] == pytest.approx(one_process[key], rel=1e-4, abs=1e-5), f"{key}: {where}"
            assert max(ours["mismatch"]) <= 1e-5, where
            final, expected = torch.tensor(ours["final"]), torch.tensor(one_process["final"])
            assert 0 < float((final - expected).abs().max()) <= 2e-4, where


@pytest.mark.parametrize("draw", [10])
def test_gradients_in_bfloat16(draw: int) -> None:
    """Both are as far from float32 as bfloat16 rounds."""
    exact = trained(Implementation.local, draw, steps=1)
    errors = []
    for implementation in (Implementation.local, Implementation.torch):
        world.stop_model_parallel()
        found = trained(implementation, draw, steps=1, precision=Precision.bf16)
        assert found["losses"] == pytest.approx(exact["losses"], rel=2e-2)
        pairs = [(found["gradients"][0][n].float(), g) for n, g in exact["gradients"][0].items()]
        errors.append(
            sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
        )
    assert errors[1] <= 2 * errors[0] + 1e-4, errors


def test_the_fused_optimizer_s_state_is_plain_adamw_s() -> None:
    """It goes from one kind to the other and back, and each goes on as if nothing had happened."""
    torch.manual_seed(3)
    start = [torch.randn(7, 5), torch.randn(3)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(6)]

    def make(kind: Any) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        return parameters, kind(parameters, lr=0.1, weight_decay=0.01, betas=(0.8, 0.9), eps=1e-8)

    def go(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: Any) -> None:
        for step in steps:
            for parameter, gradient in zip(parameters, gradients[step], strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()

    expected, plain = make(torch.optim.AdamW)
    go(expected, plain, range(6))
    for order in ([FusedAdamW, torch.optim.AdamW, FusedAdamW], [torch.optim.AdamW, FusedAdamW, torch.optim.AdamW]):
        parameters, optimizer = make(order[0])
        go(parameters, optimizer, [0, 1])
        for kind, steps in zip(order[1:], ([2, 3], [4, 5]), strict=True):
            values = [p.detach().clone() for p in parameters]
            state = optimizer.state_dict()
            assert all(not group["fused"] for group in state["param_groups"])
            parameters, optimizer = make(kind)
            for parameter, value in zip(parameters, values, strict=True):
                parameter.data.copy_(value)
            optimizer.load_state_dict(state)
            assert bool(optimizer.param_groups[0]["fused"]) == (kind is FusedAdamW)
            go(parameters, optimizer, steps)
        for found, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


def test_other_implementations_keep_their_optimizer() -> None:
    plain = torch.optim.AdamW
    for implementation in (Implementation.local, Implementation.auto):
        with adamw_for(implementation):
            assert torch.optim.AdamW is plain
    with adamw_for(Implementation.torch):
        assert torch.optim.AdamW is FusedAdamW
    assert torch.optim.AdamW is plain

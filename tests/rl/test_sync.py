"""A refresh that did not arrive is an error, not silent drift."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_vp2o.core.deferred import read
from megatron_vp2o.errors import SyncError
from megatron_vp2o.megatron.actor.generation import MegatronEngine
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.model.build import named_weight_tensors
from megatron_vp2o.megatron.platform import world
from megatron_vp2o.parallel import checksum
from megatron_vp2o.rl.sync import verify_sync
from tests.megatron.policy_job import VOCAB, small_config


@pytest.fixture(scope="module")
def learner() -> Iterator[tuple[Any, MegatronPolicy, MegatronEngine]]:
    config = small_config()
    groups = world.start(config.parallel, config.seed)
    policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=4)
    engine = MegatronEngine(config, policy, eos_ids=[1], pad_id=0)
    yield groups, policy, engine
    world.stop()


def weights_checksum(tensors: list[torch.Tensor]) -> int:
    return checksum.weights_checksum(tensors).read()


def move(policy: MegatronPolicy) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.01)


def test_a_sync_that_arrived(learner: Any) -> None:
    groups, policy, engine = learner
    move(policy)
    engine.refresh(3)
    verify_sync(policy, engine, 3, groups)
    with pytest.raises(SyncError, match="weights of version 4: it reports version 3"):
        verify_sync(policy, engine, 4, groups)


def test_an_engine_that_ignores_it(learner: Any) -> None:
    groups, policy, engine = learner
    engine.refresh(3)
    move(policy)
    engine.version = 4  # says so, and loaded nothing
    with pytest.raises(SyncError) as caught:
        verify_sync(policy, engine, 4, groups)
    for number in read(policy.checksum(), engine.checksum()):
        assert f"{number & (2**64 - 1):016x}" in str(caught.value)


def test_an_engine_that_loads_half(learner: Any) -> None:
    groups, policy, engine = learner
    engine.refresh(4)
    move(policy)
    pairs = list(zip(engine.actor.parameters(), policy.model.parameters(), strict=True))
    with torch.no_grad():
        for mine, learned in pairs[: len(pairs) // 2]:
            mine.copy_(learned)
    engine.version = 5
    with pytest.raises(SyncError, match="did not take the weights of version 5"):
        verify_sync(policy, engine, 5, groups)


def test_the_checksum_sees_one_bit_and_an_exchange() -> None:
    first, second = torch.randn(5, 7), torch.randn(5, 7)
    reference = weights_checksum([first, second])
    assert weights_checksum([first.clone(), second.clone()]) == reference
    assert weights_checksum([second, first]) != reference
    changed = first.clone()
    changed.view(torch.int32)[2, 3] ^= 1
    assert weights_checksum([changed, second]) != reference
    halves = [torch.ones(3, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.float64)]
    assert weights_checksum(halves) == weights_checksum([half.clone() for half in halves]) != 0
    assert weights_checksum([]) == weights_checksum([torch.zeros(0)]) == 0


@pytest.mark.parametrize("seed", range(4))
def test_tensors_of_equal_size_are_weighted_as_each_alone_would_be(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3,), (4096,), (64, 128), (2, 5000), (1, 4097), (4096 * 3,)]
    picked = torch.randint(len(shapes), (40,), generator=generator).tolist()
    dtypes = [(torch.float32, torch.bfloat16)[i] for i in torch.randint(2, (40,), generator=generator).tolist()]
    tensors = [torch.randn(shapes[i], generator=generator).to(dtype) for i, dtype in zip(picked, dtypes, strict=True)]
    tensors[7] = torch.randn(128, 64, generator=generator).t()  # not contiguous
    monkeypatch.setattr(checksum, "_ROWS", 5)  # so few that parts of equal tensors and long tensors are cut
    cpu = torch.device("cpu")
    column_W, row_R = checksum._odd(checksum._WIDTH, cpu), checksum._odd(4, cpu, 0x7A3D70A3D70A3D71)
    alone_N = torch.stack([checksum._weighted_sum(tensor, column_W, row_R) for tensor in tensors])
    wanted = int((alone_N * checksum._odd(40, torch.device("cpu"))).sum())
    assert max(map(len, checksum._alike(tensors))) > 1
    assert weights_checksum(tensors) == wanted
    assert weights_checksum(tensors[::-1]) != wanted


def test_weights_are_named_as_torch_names_them(learner: Any) -> None:
    _, policy, _ = learner
    model = policy.model
    kept = {f"{prefix}.{name}" for prefix, m in model.named_modules() for name in m._non_persistent_buffers_set}
    wanted = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n not in kept)]
    found = named_weight_tensors(model)
    assert [name for name, _ in found] == [name for name, _ in wanted] and len(found) > 20
    assert all(one is other for (_, one), (_, other) in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_checksum_depends_on_where_words_are(dtype: torch.dtype) -> None:
    """Stacked experts that changed places, rows, columns, single words, and values that moved from one word to another."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 30, 50), (3, 64, 128), (2, 7), (8, 4096), (2, 4096 * 257)):
        stacked = torch.randn(shape, generator=generator).to(dtype)
        reference = weights_checksum([stacked])
        flat = stacked.flatten()
        others = [stacked.flip(0), stacked.roll(1, -1), flat.roll(1), flat.flip(0)]
        for i, j in torch.randint(len(flat), (20, 2), generator=generator).tolist():
            swapped = flat.clone()
            swapped[i], swapped[j] = flat[j], flat[i]
            others += [swapped] if flat[i] != flat[j] else []
            changed = flat.clone()
            changed[i] = -changed[i]
            others.append(changed)
        assert all(weights_checksum([other.contiguous()]) != reference for other in others)
        assert weights_checksum([stacked.clone()]) == reference

"""Packed routes come back, whatever the number of experts."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vp2o.core.routes import FREE, pack_routes, packed_dtype, same_experts, sentinel, unpack_routes


@settings(deadline=None, max_examples=50)
@given(
    experts=st.sampled_from([2, 8, 128, 254, 255, 256, 257, 4096, 2**14]),
    tokens=st.integers(0, 40),
    topk=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_what_is_packed_comes_back(experts: int, tokens: int, topk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    routes = torch.randint(0, experts, (tokens, 3, topk), generator=generator)
    routes[:1] = experts - 1  # the largest id is no sentinel
    routes[torch.rand(tokens, generator=generator) < 0.3] = FREE
    packed = pack_routes(routes, experts)
    assert packed.dtype == packed_dtype(experts) == (torch.uint8 if experts < 256 else torch.int16)
    assert torch.equal(unpack_routes(packed), routes)
    assert torch.equal(packed == sentinel(packed.dtype), routes == FREE)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), topk=st.integers(1, 5))
def test_agreement_is_that_of_sets(seed: int, topk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.rand(20, 7, generator=generator).argsort(dim=1)[:, :topk] for _ in range(2))
    expected = [len(set(a) & set(b)) for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    assert same_experts(one, other).tolist() == expected
    one[::2] = FREE
    expected[::2] = [0] * 10
    assert same_experts(one, other).tolist() == expected

"""Plain data of the loop: parts of it keep together what belongs together."""

from __future__ import annotations

import itertools
from dataclasses import fields
from random import Random

import pytest
import torch

from megatron_vp2o.rl.types import Problem, RewardResult, TrainBatch, Verdict
from tests.rl.fakes import TOKENIZER, rollouts_of


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_rollouts_are_rollouts(seed: int) -> None:
    random = Random(seed)
    rollouts = rollouts_of(torch.Generator().manual_seed(seed), 9, version=seed, gates=True)
    chosen = [random.randrange(9) for _ in range(random.randrange(12))]
    some = rollouts.rows(torch.tensor(chosen, dtype=torch.int64))
    mask_NS = some.response_mask_NS()
    assert some.weight_version == seed and mask_NS.shape == some.tokens_NS.shape
    for row, n in enumerate(chosen):
        prompt, total = int(rollouts.prompt_len_N[n]), int(rollouts.total_len_N[n])
        assert some.response(row) == rollouts.response(n) == [3 + n] * (total - prompt)
        assert mask_NS[row].nonzero().squeeze(1).tolist() == list(range(prompt, total))
        assert torch.equal(some.model_logprobs_NS[row], rollouts.model_logprobs_NS[n])
        assert torch.equal(some.logprobs_NS[row], rollouts.logprobs_NS[n])
        assert some.finished_N[row] == rollouts.finished_N[n]
        # the log itself stays whole; each row says which of its sequences it is
        assert some.gates is not None and rollouts.gates is not None
        assert some.gates.row_N[row] == rollouts.gates.row_N[n]
        assert some.gates.gates_LMJE is rollouts.gates.gates_LMJE and some.gates.stride == rollouts.gates.stride


def whole_batch(rows: int, width: int) -> TrainBatch:
    """Every optional tensor is there, and holds its row's number."""
    row_N1 = torch.arange(rows)[:, None]
    tensors: dict[str, torch.Tensor] = {
        field.name: (row_N1.expand(rows, width) if field.name.endswith("_NS") else row_N1[:, 0]).clone()
        for field in fields(TrainBatch)
        if field.name != "temperature"
    }
    tensors["routes_NSLK"] = row_N1[:, :, None, None].expand(rows, width, 2, 3).to(torch.uint8)
    return TrainBatch(temperature=0.5, **tensors)


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_a_batch_keep_all_that_belongs_to_them(seed: int) -> None:
    random = Random(seed)
    batch = whole_batch(8, 5)
    chosen = random.sample(range(8), random.randrange(1, 8))
    part = batch.rows(torch.tensor(chosen))
    assert part.temperature == 0.5
    for field in fields(TrainBatch):
        value = getattr(part, field.name)
        if field.name != "temperature":
            flat = value if value.dim() == 1 else value.flatten(1)
            assert (value if value.dim() == 1 else flat[:, 0]).tolist() == chosen, field.name
            assert value.dim() == 1 or flat.eq(flat[:, :1]).all()
    bare = TrainBatch(batch.tokens_NS, batch.length_N, batch.loss_mask_NS).rows(torch.tensor(chosen))
    assert [name for name, value in vars(bare).items() if value is None] == [
        field.name for field in fields(TrainBatch)[4:]
    ]


def test_padding_belongs_to_no_document() -> None:
    seen: list[float] = []

    def widen(value_NS: torch.Tensor, padding: float) -> torch.Tensor:
        seen.append(padding)
        return torch.nn.functional.pad(value_NS, (0, 0) * (value_NS.dim() - 2) + (0, 2), value=padding)

    wide = whole_batch(3, 4).map(lambda value_N: value_N + 100, widen)
    assert wide.segment_NS is not None and wide.segment_NS[:, 4:].eq(-1).all()
    assert wide.tokens_NS[:, 4:].eq(0).all() and wide.tokens_NS.shape == (3, 6)
    assert wide.length_N.tolist() == [100, 101, 102]
    # no document; nothing; no route
    assert sorted(seen) == [-1.0, *[0.0] * (len(seen) - 2), 255.0] and len(seen) > 5
    assert wide.routes_NSLK is not None and wide.routes_NSLK[:, 4:].eq(255).all()


@pytest.mark.parametrize(
    ("reward", "correct"), list(itertools.product([-1.0, 0.0, 0.5, 1.0, 3.0], [None, False, True]))
)
@pytest.mark.parametrize("canonical", [None, "7"])
def test_a_reward_is_a_verdict(reward: float, correct: bool | None, canonical: str | None) -> None:
    """Its reward is what is trained on; it counts as right where it says so, else where it is the full reward."""
    verdict = RewardResult(reward, "why", canonical, correct, {"part": 2.0}).verdict()
    right = correct if correct is not None else reward in (1.0, 3.0)
    assert verdict.correct is right and verdict.reward == reward
    assert (verdict.reason, verdict.parts) == ("why", {"part": 2.0})
    assert verdict.canonical == ((canonical or "") if right else None)


def test_a_verdict_without_a_score_is_worth_what_it_says() -> None:
    assert Verdict(True, "x", "").reward == 1.0 and Verdict(False, None, "wrong").reward == 0.0
    assert Verdict(True, "x", "", score=0.0).reward == 0.0


def test_a_prompts_tokens_are_its_own_where_it_has_some() -> None:
    assert Problem(0, "1+1=", None, 1).prompt_tokens(TOKENIZER) == TOKENIZER.encode("1+1=")
    assert Problem(0, "1+1=", None, 1, tokens=(5, 6)).prompt_tokens(TOKENIZER) == [5, 6]

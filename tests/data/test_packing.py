"""Packing: nothing lost, nothing mixed, and the stream can be left and taken up anywhere.

Shape legend: N rows, S positions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vp2o.data.documents import Document
from megatron_vp2o.data.packing import PackedBatches
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.types import TrainBatch

PAD = 999_999_999
PLACES = 1000  # token id = document * PLACES + place in the document


@dataclass
class NumberedDocuments:
    """Documents whose every token says where it is from."""

    lengths: list[int]
    splittable: bool = True
    loss_start: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def get(self, index: int, epoch: int) -> Document:
        return Document(index * PLACES + np.arange(self.lengths[index], dtype=np.int64), self.loss_start)


def stream(documents, S=8, rows=4, pack=True, seed=0, **kw) -> PackedBatches:
    return PackedBatches(documents, sequence_length=S, rows=rows, pack=pack, seed=seed, pad_id=PAD, **kw)


def pieces(batch: TrainBatch) -> list[tuple[int, int, int, list[bool]]]:
    """(document, first place, length, loss mask) of every segment; checks the rows' form on the way."""
    found = []
    N, S = batch.tokens_NS.shape
    segment_NS = batch.segment_NS
    if segment_NS is None:
        segment_NS = torch.where(torch.arange(S) < batch.length_N[:, None], 0, -1)
    assert (batch.tokens_NS.dtype, batch.length_N.dtype, segment_NS.dtype) == (torch.int64,) * 3
    assert batch.loss_mask_NS.dtype is torch.bool
    for n in range(N):
        length = int(batch.length_N[n])
        assert (segment_NS[n, length:] == -1).all() and (batch.tokens_NS[n, length:] == PAD).all()
        assert not batch.loss_mask_NS[n, length:].any()
        segments = segment_NS[n, :length]
        assert segments.unique_consecutive().tolist() == list(range(len(segments.unique())))
        for segment in segments.unique().tolist():
            where = segments == segment
            ids = batch.tokens_NS[n, :length][where]
            assert torch.equal(ids, torch.arange(int(ids[0]), int(ids[0]) + len(ids))), (
                "a segment is one run of one document"
            )
            document, place = divmod(int(ids[0]), PLACES)
            found.append((document, place, len(ids), batch.loss_mask_NS[n, :length][where].tolist()))
    return found


def equal(a: TrainBatch, b: TrainBatch) -> bool:
    if (a.segment_NS is None) != (b.segment_NS is None):
        return False
    pairs = [(a.tokens_NS, b.tokens_NS), (a.length_N, b.length_N), (a.loss_mask_NS, b.loss_mask_NS)]
    if a.segment_NS is not None and b.segment_NS is not None:
        pairs.append((a.segment_NS, b.segment_NS))
    return all(torch.equal(x, y) for x, y in pairs)


collections = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@settings(max_examples=150, deadline=None)
@given(
    lengths=collections, S=st.integers(2, 12), rows=st.integers(1, 6), pack=st.booleans(), loss_start=st.integers(0, 5)
)
def test_every_token_once_an_epoch_and_no_segment_mixes(lengths, S, rows, pack, loss_start):
    batches = stream(NumberedDocuments(lengths, loss_start=loss_start), S, rows, pack)
    seen: Counter[tuple[int, int]] = Counter()
    while batches.position < 3 * len(lengths):
        for document, place, size, mask in pieces(next(batches)):
            assert place % S == 0 and size == min(S, lengths[document] - place), "cut into whole rows and a rest only"
            assert mask == [i > 0 and place + i >= loss_start for i in range(size)]
            seen.update((document, place + i) for i in range(size))
    counts = {seen[document, place] for document, length in enumerate(lengths) for place in range(length)}
    whole = batches.position // len(lengths)
    assert counts <= {whole, whole + 1}
    # the tokens beyond whole epochs are those of the documents at the front of the next one, as far as the state says
    state = batches.state_dict()
    order = np.random.default_rng((0, whole)).permutation(len(lengths))
    extra = sum(lengths[i] for i in order[: state["position"] % len(lengths)]) + state["offset"]
    assert seen.total() == whole * sum(lengths) + extra


@settings(max_examples=60, deadline=None)
@given(lengths=collections, S=st.integers(2, 12), rows=st.integers(1, 6), pack=st.booleans(), seed=st.integers(0, 5))
def test_resuming_anywhere_gives_the_same_continuation(lengths, S, rows, pack, seed):
    whole = stream(NumberedDocuments(lengths), S, rows, pack, seed)
    states, expected = [], []
    for _ in range(8):
        states.append(whole.state_dict())
        expected.append(next(whole))
    for start in (0, 3, 5):
        resumed = stream(NumberedDocuments(lengths), S, rows, pack, seed)
        next(resumed)  # whatever it has done before
        resumed.load_state_dict(states[start])
        for want in expected[start:]:
            assert equal(next(resumed), want)


@settings(max_examples=40, deadline=None)
@given(lengths=collections, S=st.integers(2, 12), dp_size=st.sampled_from([2, 4]), pack=st.booleans())
def test_the_global_batch_does_not_depend_on_data_parallelism(lengths, S, dp_size, pack):
    documents = NumberedDocuments(lengths)
    whole = stream(documents, S, 8, pack)
    ranks = [stream(documents, S, 8, pack, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for _ in range(4):
        want = next(whole)
        for rank, batches in enumerate(ranks):
            part = next(batches)
            rows = slice(rank, None, dp_size)
            segment_NS = None if want.segment_NS is None else want.segment_NS[rows]
            want_part = TrainBatch(
                want.tokens_NS[rows], want.length_N[rows], want.loss_mask_NS[rows], segment_NS=segment_NS
            )
            assert part.tokens_NS.is_contiguous()
            assert equal(part, want_part)
            assert batches.state_dict() == whole.state_dict()


def test_epochs_and_seeds_have_their_own_order():
    def order(seed: int, epoch: int) -> list[int]:
        batches = stream(NumberedDocuments([2] * 50), S=2, rows=50, seed=seed)
        batches.load_state_dict({"position": 50 * epoch, "offset": 0})
        return [document for document, *_ in pieces(next(batches))]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(sorted(one) == list(range(50)) for one in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert order(0, 1) == orders[1]


def test_rows_are_filled_well():
    lengths = np.random.default_rng(0).integers(12, 26, size=500).tolist()
    batches = stream(NumberedDocuments(lengths), S=64, rows=64)
    filled = np.mean([int(batch.length_N.sum()) / batch.tokens_NS.numel() for batch in islice(batches, 20)])
    assert filled > 0.85
    assert batches.epoch == batches.position / 500


@pytest.mark.parametrize("seed", range(8))
def test_empty_documents_are_passed_over_from_one_epoch_into_the_next(seed):
    batches = stream(NumberedDocuments([0, 0, 0, 2]), S=2, rows=1, seed=seed)
    assert [next(batches).tokens_NS.tolist() for _ in range(6)] == [[[3 * PLACES, 3 * PLACES + 1]]] * 6


def test_an_epoch_number_reaches_the_documents():
    class Epochs(NumberedDocuments):
        def get(self, index: int, epoch: int) -> Document:
            return Document(np.full(2, epoch), 0)

    batches = stream(Epochs([2] * 3), S=2, rows=3)
    assert [next(batches).tokens_NS.unique().tolist() for _ in range(3)] == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("documents", "kw", "message"),
    [
        (NumberedDocuments([3]), {"S": 1}, "sequence_length=1"),
        (NumberedDocuments([3]), {"rows": 6, "dp_size": 4}, "global_batch_size=6 .* multiple of 4"),
        (NumberedDocuments([3]), {"rows": 0}, "global_batch_size=0"),
        (NumberedDocuments([]), {}, "no documents"),
        (NumberedDocuments([0, 0]), {}, "none of the 2 documents"),
        (NumberedDocuments([9], splittable=False), {}, "document 0 .* 9 tokens .* has 8: .* at least 9"),
        (NumberedDocuments([3, 3]), {"vocab_size": 1000}, "document 1 .* id 1000, .* below 1000"),
    ],
)
def test_what_cannot_work_is_refused(documents, kw, message):
    with pytest.raises(ConfigError, match=message):
        next(stream(documents, **kw))

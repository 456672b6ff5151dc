"""Megatron's IndexedDataset as documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_vp2o.data.packing import PackedBatches
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.megatron.indexed import IndexedDocuments, write_indexed

DOCUMENTS = [[5, 6, 7], [], [1], list(range(40)), [9, 9]]


@pytest.mark.parametrize("vocab_size", [100, 200_000])
def test_what_is_written_is_read(tmp_path, vocab_size):
    documents = [*DOCUMENTS, [vocab_size - 1]]
    write_indexed(tmp_path / "data", documents, vocab_size)
    got = IndexedDocuments(tmp_path / "data")
    assert (len(got), got.splittable) == (6, True)
    for index in (5, 0, 3, 1, 2, 4):
        document = got.get(index, 0)
        assert document.tokens.dtype == np.int64
        assert document.tokens.tolist() == documents[index]
        assert document.loss_start == 0


def test_a_document_is_all_of_its_sequences(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.uint16)
    builder.add_document(np.arange(6), [1, 2, 3])
    builder.add_document(np.arange(6, 8), [2])
    builder.finalize(str(tmp_path / "data.idx"))
    documents = IndexedDocuments(tmp_path / "data")
    assert [documents.get(i, 0).tokens.tolist() for i in range(len(documents))] == [[0, 1, 2, 3, 4, 5], [6, 7]]


def test_documents_pack(tmp_path):
    write_indexed(tmp_path / "data", DOCUMENTS, 100)
    batches = PackedBatches(
        IndexedDocuments(tmp_path / "data"), sequence_length=16, rows=2, pack=True, seed=0, pad_id=99, vocab_size=99
    )
    tokens: list[int] = []
    while batches.position < len(DOCUMENTS):
        batch = next(batches)
        assert batch.segment_NS is not None
        tokens += batch.tokens_NS[batch.segment_NS >= 0].tolist()
    want = [token for document in DOCUMENTS for token in document]
    for token in set(want):
        assert want.count(token) <= tokens.count(token) <= 2 * want.count(token)


def damaged(folder: Path, what: str) -> Path:
    prefix = folder / "data"
    write_indexed(prefix, DOCUMENTS, 100)
    if what == "no bin":
        (folder / "data.bin").unlink()
    elif what == "no idx":
        (folder / "data.idx").unlink()
    elif what == "foreign idx":
        (folder / "data.idx").write_bytes(b"something else altogether, and long enough")
    else:
        path = folder / ("data.bin" if what == "short bin" else "data.idx")
        path.write_bytes(path.read_bytes()[:-3])
    return prefix


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Megatron's own __del__ of half-made readers
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no bin", "there is no IndexedDataset .*data.bin"),
        ("no idx", "there is no IndexedDataset .*data.idx"),
        ("foreign idx", "data.idx is no whole index"),
        ("short idx", "data.idx is no whole index"),
        ("short bin", "data.bin has .* bytes where its index speaks of"),
    ],
)
def test_damaged_data_is_refused(tmp_path, what, message):
    with pytest.raises(ConfigError, match=message):
        IndexedDocuments(damaged(tmp_path, what))

"""Megatron's IndexedDataset (.bin/.idx, already tokenised) as documents, and a writer.

Format: megatron/core/datasets/indexed_dataset.py, the same in megatron-core 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)

from megatron_vp2o.data.documents import Document
from megatron_vp2o.errors import ConfigError


class IndexedDocuments:
    """The documents of an IndexedDataset; memory-mapped, so nothing is read before its turn.

    A document of several sequences is their concatenation. Tokens are taken as they are: an end-of-document token is
    there only if the data was made with one.

    Raises:
        ConfigError: if either file is missing, is of another format, or they do not belong together.
    """

    splittable = True

    def __init__(self, prefix: str | Path) -> None:
        """prefix: path without `.bin` or `.idx`."""
        self.prefix = str(prefix)
        idx, bin_ = get_idx_path(self.prefix), get_bin_path(self.prefix)
        if not IndexedDataset.exists(self.prefix):
            raise ConfigError(
                f"there is no IndexedDataset {self.prefix}: both {idx} and {bin_} must exist; set algorithm.data.path "
                "to their common prefix, without .bin or .idx"
            )
        try:
            self._dataset = IndexedDataset(self.prefix)
        except (AssertionError, ValueError, IndexError) as error:  # that is how it refuses a file
            raise ConfigError(
                f"{idx} is no whole index of an IndexedDataset ({type(error).__name__}: {error}); write both files "
                "again with Megatron's preprocessing"
            ) from error
        self._bounds = self._dataset.document_indices
        size, wanted = Path(bin_).stat().st_size, self._bytes()
        if size != wanted:
            raise ConfigError(
                f"{bin_} has {size} bytes where its index speaks of {wanted}: one of the two files is cut short or "
                "belongs to another dataset; write both again"
            )

    def _bytes(self) -> int:
        """Size of the tokens, as the index has it: they lie one sequence after the other."""
        index = self._dataset.index
        if not len(index.sequence_lengths):
            return 0
        return int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * index.dtype_size

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def identity(self) -> str:
        """Sizes, and a checksum of the index: the tokens are not read for it."""
        index, tokens = Path(get_idx_path(self.prefix)), Path(get_bin_path(self.prefix))
        checksum = zlib.crc32(index.read_bytes())
        return f"{len(self)} documents, {tokens.stat().st_size} bytes, index of crc32 {checksum:08x}"

    def get(self, index: int, epoch: int) -> Document:
        first, end = int(self._bounds[index]), int(self._bounds[index + 1])
        sequences = [self._dataset.get(sequence).astype(np.int64) for sequence in range(first, end)]
        return Document(np.concatenate(sequences) if sequences else np.empty(0, dtype=np.int64), 0)


def write_indexed(prefix: str | Path, documents: Iterable[Sequence[int]], vocab_size: int) -> None:
    """Write documents of token ids below `vocab_size` as `prefix`.bin and `prefix`.idx, one sequence each."""
    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=dtype)
    for document in documents:
        builder.add_item(torch.tensor(document, dtype=torch.int64))
        builder.end_document()
    builder.finalize(get_idx_path(str(prefix)))

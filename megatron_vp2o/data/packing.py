"""Documents to batches: a deterministic, endless stream of rows that can be left and taken up anywhere.

Shape legend: R rows of the global batch, N rows of this data-parallel rank, S positions of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from megatron_vp2o.data.documents import Document, Documents
from megatron_vp2o.data.shuffle import Order, shuffled
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.types import TrainBatch


class PackedBatches(Iterator[TrainBatch]):
    """An endless stream of batches from documents, shuffled anew each epoch.

    Documents are taken in the order of the epoch's permutation and put into the first row of the batch that has room
    (first fit); the first one that finds none opens the next batch. So a batch is a run of consecutive documents, and
    where the stream stands is one position: documents consumed, and tokens of the next one if it was cut between two
    batches. Epochs follow each other without a seam; a batch may hold documents of two.

    A document longer than a row is cut into whole rows and a rest. Every rank packs the whole global batch and keeps
    its share (rows `dp_rank::dp_size`), so the global batch is the same whatever `dp_size`.

    Batches have `tokens_NS`, `length_N`, `loss_mask_NS` (never the first token of a piece: nothing predicts it) and,
    with `pack`, `segment_NS`; without it every row is one piece and `segment_NS` is None.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        sequence_length: int,
        rows: int,
        pack: bool,
        seed: int,
        pad_id: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        """
        Args:
            documents: any collection; not modified.
            sequence_length: S, tokens of a row.
            rows: R, rows of the global batch.
            pack: several documents in a row, told apart by `segment_NS`.
            seed: of the order of documents in each epoch.
            pad_id: fills rows up.
            dp_rank: this data-parallel rank.
            dp_size: data-parallel ranks; R must be divisible by it.
            vocab_size: ids must be below this; None leaves them unchecked.

        Raises:
            ConfigError: for sizes that don't work, and later for a document that does not.
        """
        if sequence_length < 2:
            raise ConfigError(
                f"algorithm.sequence_length={sequence_length} leaves nothing to predict: it must be at least 2"
            )
        if rows < 1 or rows % dp_size:
            raise ConfigError(
                f"algorithm.global_batch_size={rows} cannot be dealt to {dp_size} data-parallel ranks: make it a "
                f"positive multiple of {dp_size}"
            )
        if not len(documents):
            raise ConfigError("the training data has no documents")
        self.documents = documents
        self.sequence_length = sequence_length
        self.rows = rows
        self.pack = pack
        self.seed = seed
        self.pad_id = pad_id
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.vocab_size = vocab_size
        self._position = 0
        self._offset = 0
        self._order: tuple[int, Order] | None = None  # the permutation of the current epoch
        self._open: tuple[int, Document] | None = None  # the document at the current position

    @property
    def position(self) -> int:
        """Whole documents consumed since the start, over all epochs."""
        return self._position

    @property
    def epoch(self) -> float:
        """Passes over the documents so far, for display."""
        return self._position / len(self.documents)

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands; plain numbers, the same on all ranks and for any `dp_size`."""
        return {"position": self._position, "offset": self._offset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where `state_dict` was taken: the same batches follow as did then."""
        self._position = state["position"]
        self._offset = state["offset"]

    def __next__(self) -> TrainBatch:
        shape_RS = (self.rows, self.sequence_length)
        tokens_RS = np.full(shape_RS, self.pad_id, dtype=np.int64)
        counts_RS = np.zeros(shape_RS, dtype=bool)
        segment_RS = np.full(shape_RS, -1, dtype=np.int64)
        used_R = np.zeros(self.rows, dtype=np.int64)
        segments_R = np.zeros(self.rows, dtype=np.int64)
        while True:
            tokens, counts = self._next_piece()
            size = len(tokens)
            fits_R = used_R + size <= self.sequence_length if self.pack else used_R == 0
            row = int(fits_R.argmax())
            if not fits_R[row]:
                break
            span = slice(used_R[row], used_R[row] + size)
            tokens_RS[row, span] = tokens
            counts_RS[row, span] = counts
            segment_RS[row, span] = segments_R[row]
            used_R[row] += size
            segments_R[row] += 1
            self._consume(size)
        mine = slice(self.dp_rank, None, self.dp_size)

        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values[mine]))

        return TrainBatch(
            tokens_NS=tensor(tokens_RS),
            length_N=tensor(used_R),
            loss_mask_NS=tensor(counts_RS),
            segment_NS=tensor(segment_RS) if self.pack else None,
        )

    def _next_piece(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64) and loss mask (bool) of what comes next, without consuming it. Passes over empty documents."""
        for _ in range(2 * len(self.documents)):  # a run of empty ones may go on from one epoch into the next
            document = self._document()
            if len(document.tokens):
                break
            self._consume(0)
        else:
            raise ConfigError(f"none of the {len(self.documents)} documents of the training data has a token")
        span = slice(self._offset, self._offset + self.sequence_length)
        counts = np.arange(span.start, span.start + len(document.tokens[span])) >= document.loss_start
        counts[0] = False  # nothing in this row comes before it
        return document.tokens[span], counts

    def _consume(self, size: int) -> None:
        self._offset += size
        if self._offset == len(self._document().tokens):
            self._position += 1
            self._offset = 0

    def _document(self) -> Document:
        """The document at the current position; read once, however often it is asked for."""
        if self._open is None or self._open[0] != self._position:
            epoch, place = divmod(self._position, len(self.documents))
            if self._order is None or self._order[0] != epoch:
                self._order = (epoch, shuffled(len(self.documents), (self.seed & 0xFFFFFFFF, epoch)))
            index = int(self._order[1][place])
            document = self.documents.get(index, epoch)
            self._check(document, index)
            self._open = (self._position, document)
        return self._open[1]

    def _check(self, document: Document, index: int) -> None:
        length = len(document.tokens)
        if length > self.sequence_length and not self.documents.splittable:
            raise ConfigError(
                f"document {index} of the training data has {length} tokens and must not be cut, but a row has "
                f"{self.sequence_length}: set algorithm.sequence_length (and model.max_sequence_length) to at least "
                f"{length}"
            )
        if self.vocab_size is not None:
            bad = document.tokens[(document.tokens < 0) | (document.tokens >= self.vocab_size)]
            if len(bad):
                raise ConfigError(
                    f"document {index} of the training data has token id {bad[0]}, but ids must be below "
                    f"{self.vocab_size}: it was made with another tokenizer"
                )

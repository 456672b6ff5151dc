"""Which rows train, which are held out, and the order of an epoch over several files with weights.

Held out are the rows whose prompts have the smallest hashes (with the seed): the same ones whatever the order of the file, and a
prompt that stands in a file twice is never on both sides. Rows that cannot be used are left out by number.

Weights. In an epoch a file with weight w is gone through w times: with 2 each row comes twice, with 0.5 half of the rows come, and
the others in the next epoch. Within a file rows come in shuffled passes, whatever the weights; who asks for the places of an epoch
in another order mixes the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_vp2o.data.rows.index import Index
from megatron_vp2o.data.shuffle import Order, mixed, shuffled

CHUNK = 1 << 20  # rows whose keys are looked at together


class Kept:
    """The rows of one file but some: number i of the kept ones is found without a table of them."""

    def __init__(self, size: int, without: np.ndarray) -> None:
        """`without` are row numbers in any order."""
        left_out = np.unique(without).astype(np.int64)
        self.size = size - len(left_out)
        self._before = left_out - np.arange(len(left_out))  # kept rows before each that is left out

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> int:
        return i + int(np.searchsorted(self._before, i, side="right"))


class Training:
    """The training rows of several files, as (file, row) of each place of each epoch."""

    def __init__(self, kept: Sequence[Kept], weights: Sequence[float], seed: int) -> None:
        self.kept, self.seed = kept, seed
        self.drawn = [
            max(1, round(weight * len(rows))) if len(rows) and weight else 0
            for rows, weight in zip(kept, weights, strict=True)
        ]
        self._ends = np.cumsum(self.drawn)
        self._orders: dict[int, tuple[int, Order]] = {}  # of each file: the pass that was asked for last

    def __len__(self) -> int:
        return int(self._ends[-1])

    def at(self, place: int, epoch: int) -> tuple[int, int]:
        """File and row."""
        file = int(np.searchsorted(self._ends, place, side="right"))
        drawn, size = self.drawn[file], len(self.kept[file])
        turn, offset = divmod(epoch * drawn + place - (int(self._ends[file]) - drawn), size)
        if file not in self._orders or self._orders[file][0] != turn:
            self._orders[file] = (turn, shuffled(size, (self.seed, file, turn)))
        return file, self.kept[file][int(self._orders[file][1][offset])]


def smallest_keys(indexes: Sequence[Index], seed: int, count: int, dropped: Sequence[np.ndarray]) -> np.ndarray:
    """The `count` smallest distinct keys (see `seeded`) of rows that are not dropped, in order; fewer where there are fewer."""
    smallest = np.empty(0, np.uint64)
    if count:
        for file, first, keys in _keys(indexes):
            usable = np.ones(len(keys), bool)
            usable[_within(dropped[file], first, len(keys))] = False
            smallest = np.unique(np.concatenate([smallest, seeded(keys[usable], seed)]))[:count]
    return smallest


def rows_with(indexes: Sequence[Index], seed: int, wanted: np.ndarray) -> list[np.ndarray]:
    """Numbers of the rows, by file, whose (seeded) keys are among the `wanted` ones."""
    found: list[list[np.ndarray]] = [[] for _ in indexes]
    for file, first, keys in _keys(indexes):
        found[file].append(first + np.flatnonzero(np.isin(seeded(keys, seed), wanted)))
    return [np.concatenate(parts) if parts else np.empty(0, np.int64) for parts in found]


def repeated(indexes: Sequence[Index]) -> list[np.ndarray]:
    """Numbers of the rows, by file, whose prompt has come before, in that file or an earlier one."""
    keys = np.concatenate([np.asarray(index.entries["key"]) for index in indexes])
    order = np.argsort(keys, kind="stable")
    again = np.sort(order[1:][keys[order][1:] == keys[order][:-1]])
    ends = np.cumsum([len(index) for index in indexes])
    return [
        again[(again >= end - len(index)) & (again < end)] - (end - len(index))
        for index, end in zip(indexes, ends, strict=True)
    ]


def seeded(keys: np.ndarray, seed: int) -> np.ndarray:
    """Keys in another order, which the seed says."""
    return mixed(keys ^ mixed(np.array([seed + 1], np.uint64)))


def _keys(indexes: Sequence[Index]) -> Iterator[tuple[int, int, np.ndarray]]:
    for file, index in enumerate(indexes):
        for first in range(0, len(index), CHUNK):
            yield file, first, np.asarray(index.entries["key"][first : first + CHUNK])


def _within(numbers: np.ndarray, first: int, size: int) -> np.ndarray:
    return numbers[(numbers >= first) & (numbers < first + size)] - first

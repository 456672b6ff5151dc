"""Orders in which a collection is gone through: a permutation for each seed and epoch, of any size.

Shape legend: N positions asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

LARGEST_TABLE = 1 << 20  # items; a longer order is computed position by position instead of being kept (8 bytes each)
ROUNDS = 6


class Order(Protocol):
    """A permutation of range(size)."""

    def __getitem__(self, position: int, /) -> int: ...


def shuffled(size: int, seed: Sequence[int]) -> Order:
    """A permutation of range(size), the same for equal arguments; memory does not grow with `size` beyond 8 MiB."""
    if size <= LARGEST_TABLE:
        return np.random.default_rng(tuple(seed)).permutation(size)  # type: ignore[return-value]
    return Permutation(size, seed)


class Permutation:
    """A pseudo-random permutation without a table: a Feistel network on the smallest even number of bits that holds `size`,
    walked until the result is below `size` (at most 4 steps on average).

    References:
        Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002: cycle walking and generalised Feistel networks.
    """

    def __init__(self, size: int, seed: Sequence[int]) -> None:
        if size < 1:
            raise ValueError(f"a permutation of {size} items: there must be at least one")
        self.size = size
        self._half = np.uint64(max(1, (max(1, size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.random.default_rng(tuple(seed)).integers(0, 2**64, ROUNDS, dtype=np.uint64)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} of a permutation of {self.size} items")
        return int(self.at(np.array([position], dtype=np.uint64))[0])

    def at(self, position_N: np.ndarray) -> np.ndarray:
        """Items at several positions, uint64. Positions must be below `size`."""
        value_N = self._encrypt(position_N.astype(np.uint64))
        while (outside_N := value_N >= self.size).any():
            value_N[outside_N] = self._encrypt(value_N[outside_N])
        return value_N

    def _encrypt(self, value_N: np.ndarray) -> np.ndarray:
        left_N, right_N = value_N >> self._half, value_N & self._mask
        for key in self._keys:
            left_N, right_N = right_N, left_N ^ (mixed(right_N ^ key) & self._mask)
        return (left_N << self._half) | right_N


def mixed(value_N: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose results look random (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        value_N = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value_N ^ (value_N >> np.uint64(31))

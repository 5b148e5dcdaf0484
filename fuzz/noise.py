"""Noise: numbers that depend on a seed, a name and a place, and on nothing else.

Only the raw 64-bit words of NumPy's Philox4x64 counter generator are used; NumPy keeps those stable, but may change its
distributions. Each word becomes one number by integer arithmetic and at most one correctly rounded float32
multiplication. No logarithm or cosine takes part, so the bits are the same on every machine and library version.

The key of a stream is (seed, CRC-32 of the name); its counter starts at (head, sequence) and runs over the tokens. So a
head, a sequence or a first token keeps its numbers when heads, later sequences or later tokens are taken away, which is
what lets a failing case shrink without becoming another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar
from zlib import crc32

import numpy as np

Option = TypeVar("Option")

# Numbers converted at a time: small enough that the intermediate arrays stay in cache.
_BLOCK = 1 << 16

_LANES = np.uint64(0x3FF | 0x3FF << 20 | 0x3FF << 40)
_SUM = np.uint64(0xFFFFF)
# Variance of the integer formed in _normal: six uniforms of 1024 levels times 16, and one of 16 levels; doubled.
_INVERSE_DEVIATION = np.float32(1 / 23170.465791606348)


def _normal(words: np.ndarray) -> np.ndarray:
    """One nearly normal float32 per word: mean 0, variance 1, at most 4.24 in magnitude.

    Irwin-Hall: the sum of the word's six 10-bit fields, extended below by its top four bits so that the steps (1e-4)
    are finer than bf16 resolves near 0.01. The integer is exact; the scaling rounds once.
    """
    total = words & _LANES
    total += (words >> np.uint64(10)) & _LANES
    total += (total >> np.uint64(20)) + (total >> np.uint64(40))
    total &= _SUM
    total <<= np.uint64(4)
    total |= words >> np.uint64(60)
    centred = 2 * total.astype(np.int32) - (16 * 6 * 1023 + 15)
    return centred.astype(np.float32) * _INVERSE_DEVIATION


def _uniform(words: np.ndarray) -> np.ndarray:
    """One float32 in [0, 1) per word, a multiple of 2^-24: exact."""
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


@dataclass(frozen=True)
class Noise:
    """The noise of one case: `rows[n]` rows for sequence n, `heads` heads in each row.

    Every array is `[sum(rows), heads, width]`; two calls with one name give the same words.
    """

    seed: int
    rows: tuple[int, ...]
    heads: int

    @cached_property
    def sequence(self) -> np.ndarray:
        """int64 `[sum(rows)]`: which sequence a row belongs to."""
        return np.repeat(np.arange(len(self.rows)), self.rows)

    @cached_property
    def position(self) -> np.ndarray:
        """int64 `[sum(rows)]`: the row's place in its sequence."""
        return np.arange(sum(self.rows)) - self.start

    @cached_property
    def start(self) -> np.ndarray:
        """int64 `[sum(rows)]`: the first row of the row's sequence."""
        ends = np.cumsum(np.asarray(self.rows, dtype=np.int64))
        return (ends - self.rows)[self.sequence]

    def per_sequence(self) -> Noise:
        """One row a sequence."""
        return Noise(self.seed, (1,) * len(self.rows), self.heads)

    def per_head(self) -> Noise:
        """One row in all."""
        return Noise(self.seed, (1,), self.heads)

    def words(self, name: str, width: int) -> np.ndarray:
        """uint64 `[sum(rows), heads, width]`: raw Philox words."""
        key = np.array([self.seed, crc32(name.encode())], dtype=np.uint64)
        out = np.empty((sum(self.rows), self.heads, width), dtype=np.uint64)
        start = 0
        for sequence, length in enumerate(self.rows):
            if length == 0:
                continue
            for head in range(self.heads):
                # The lowest counter word counts blocks of four words inside the stream.
                counter = np.array([0, head, sequence, 0], dtype=np.uint64)
                stream = np.random.Philox(counter=counter, key=key)
                out[start : start + length, head] = stream.random_raw(length * width).reshape(length, width)
            start += length
        return out

    def normal(self, name: str, width: int) -> np.ndarray:
        """float32 `[sum(rows), heads, width]`: mean 0, variance 1, at most 4.24 in magnitude."""
        return self._convert(name, width, _normal)

    def uniform(self, name: str, width: int) -> np.ndarray:
        """float32 `[sum(rows), heads, width]` in [0, 1)."""
        return self._convert(name, width, _uniform)

    def integers(self, name: str, width: int, bound: int) -> np.ndarray:
        """int64 `[sum(rows), heads, width]` in [0, bound), bound at most 2^32."""
        words = self.words(name, width)
        return ((words >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)

    def choice(self, name: str, options: Sequence[Option]) -> Option:
        """One of the options for the whole case."""
        return options[int(Noise(self.seed, (1,), 1).integers(name, 1, len(options))[0, 0, 0])]

    def _convert(self, name: str, width: int, function) -> np.ndarray:
        words = self.words(name, width)
        flat = words.reshape(-1)
        out = np.empty(flat.shape, dtype=np.float32)
        for start in range(0, flat.size, _BLOCK):
            out[start : start + _BLOCK] = function(flat[start : start + _BLOCK])
        return out.reshape(words.shape)

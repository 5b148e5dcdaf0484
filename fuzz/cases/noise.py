"""Noise: numbers that depend on a seed, a name and a place, and on nothing else.

Only the raw 64-bit words of NumPy's Philox4x64 counter generator are used; NumPy keeps those stable, but may change its
distributions. Each word becomes one number by integer arithmetic and at most one correctly rounded float32
multiplication. No logarithm or cosine takes part, so the bits are the same on every machine and library version.

The key of a stream is (seed, CRC-32 of the name). Its counter starts at (head, sequence) and runs over the tokens. So a
head, a sequence or a first token keeps its numbers when other heads, later sequences or later tokens are removed. A
failing case can shrink without becoming another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar
from zlib import crc32

import numpy as np

Option = TypeVar("Option")

# Words converted at a time, or a little more: few enough that they stay in cache, enough that calls cost little.
_BLOCK = 1 << 13

_LANES = np.uint64(0x3FF | 0x3FF << 20 | 0x3FF << 40)
_ADD_LANES = np.uint64(1 | 1 << 20 | 1 << 40)  # times this, the upper lane is the sum of the three
_SUM = np.uint64(0xFFFFF << 4)
# Of the integer formed in _normal: six uniforms of 1024 levels times 16, and one of 16 levels.
_MEAN = np.float32((16 * 6 * 1023 + 15) / 2)
_INVERSE_DEVIATION = np.float32(1 / 11585.232895803174)


def _normal(words: np.ndarray) -> np.ndarray:
    """One nearly normal float32 per word: mean 0, variance 1, at most 4.24 in magnitude.

    Irwin-Hall: the sum of the word's six 10-bit fields, extended below by its top four bits so that the steps (1e-4)
    are finer than bf16 resolves near 0.01. The integer and its distance from the mean are exact; the scaling rounds
    once.
    """
    total = words >> np.uint64(10)
    total &= _LANES
    total += words & _LANES
    total *= _ADD_LANES
    total >>= np.uint64(36)
    total &= _SUM
    total |= words >> np.uint64(60)
    centred = total.astype(np.int32).astype(np.float32)
    centred -= _MEAN
    centred *= _INVERSE_DEVIATION
    return centred


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
        return self._convert(name, width, lambda words: words, np.uint64)

    def normal(self, name: str, width: int) -> np.ndarray:
        """float32 `[sum(rows), heads, width]`: mean 0, variance 1, at most 4.24 in magnitude."""
        return self._convert(name, width, _normal, np.float32)

    def uniform(self, name: str, width: int) -> np.ndarray:
        """float32 `[sum(rows), heads, width]` in [0, 1)."""
        return self._convert(name, width, _uniform, np.float32)

    def integers(self, name: str, width: int, bound: int) -> np.ndarray:
        """int64 `[sum(rows), heads, width]` in [0, bound), bound at most 2^32."""
        return self._convert(
            name, width, lambda words: (words >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32), np.int64
        )

    def choice(self, name: str, options: Sequence[Option]) -> Option:
        """One of the options for the whole case."""
        return options[int(Noise(self.seed, (1,), 1).integers(name, 1, len(options))[0, 0, 0])]

    def _convert(
        self, name: str, width: int, function: Callable[[np.ndarray], np.ndarray], dtype: type[np.generic]
    ) -> np.ndarray:
        """`[sum(rows), heads, width]`: what the function, which takes words one by one, makes of the name's words."""
        out = np.empty((sum(self.rows), self.heads, width), dtype)
        drawn: list[np.ndarray] = []
        places: list[tuple[slice, int]] = []  # where in `out` they go: rows and head

        def place() -> None:
            values = function(np.concatenate(drawn))
            start = 0
            for words, where in zip(drawn, places, strict=True):
                out[where] = values[start : start + words.size].reshape(-1, width)
                start += words.size
            drawn.clear()
            places.clear()

        # One generator for all streams, as a new one would first draw a seed from the system, five times as slow.
        generator = np.random.Philox(key=np.array([self.seed, crc32(name.encode())], dtype=np.uint64))
        state = generator.state
        most_rows = max(1, _BLOCK // width)
        waiting = start = 0
        for sequence, length in enumerate(self.rows):
            for head in range(self.heads if length else 0):
                # The lowest counter word counts blocks of four words inside the stream.
                state["state"]["counter"][:] = 0, head, sequence, 0
                generator.state = state
                for first in range(start, start + length, most_rows):
                    rows = slice(first, min(first + most_rows, start + length))
                    drawn.append(generator.random_raw((rows.stop - first) * width))
                    places.append((rows, head))
                    waiting += drawn[-1].size
                    if waiting >= _BLOCK:
                        place()
                        waiting = 0
            start += length
        if drawn:
            place()
        return out

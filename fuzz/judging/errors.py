"""Errors, measured where defects hide: on the whole tensor, per 16-token window, per state, per element.

Everything here is an absolute size per place, a place being (sequence, head) or (window, head). `fuzz.judging.bounds`
says what is large for a place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

WINDOW = 16  # tokens: the smallest tile of a tensor core instruction, so the smallest piece that goes wrong on its own


@dataclass(frozen=True)
class Grid:
    """Which sequence and which window each of R rows (tokens of all sequences, flattened) belongs to.

    Windows are counted from the start of each sequence; the last one of a sequence may be short.
    """

    sequences: int
    windows: int
    sequence_of_row: torch.Tensor  # [R] int64
    window_of_row: torch.Tensor  # [R] int64
    sequence_of_window: torch.Tensor  # [windows] int64
    rows_of_sequence: torch.Tensor  # [sequences] int64, how many there are
    rows_of_window: torch.Tensor  # [windows] int64

    @staticmethod
    def of(ranges: list[tuple[int, int]], device: torch.device | str = "cpu") -> Grid:
        """From the rows (start, end) of each sequence, in order and without gaps."""
        starts, ends = torch.tensor(ranges, dtype=torch.int64).reshape(-1, 2).unbind(1)
        lengths = ends - starts
        sequence = torch.repeat_interleave(torch.arange(len(ranges)), lengths)
        position = torch.arange(len(sequence)) - starts[sequence]
        counts = (lengths + WINDOW - 1) // WINDOW
        first = counts.cumsum(0) - counts
        window = first[sequence] + position // WINDOW
        return Grid(
            len(ranges),
            int(counts.sum()),
            sequence.to(device),
            window.to(device),
            torch.repeat_interleave(torch.arange(len(ranges)), counts).to(device),
            lengths.to(device),
            torch.bincount(window, minlength=int(counts.sum())).to(device),
        )


def pool(x: torch.Tensor, place_of_row: torch.Tensor, rows_of_place: torch.Tensor) -> torch.Tensor:
    """RMS of `x` [R, H, V] over each place, [places, H]; 0 where a place has no row."""
    rows = x.square().mean(-1)
    sums = rows.new_zeros(len(rows_of_place), x.shape[1]).index_add_(0, place_of_row, rows)
    return (sums / rows_of_place.clamp_min(1)[:, None]).sqrt()


def rms(x: torch.Tensor) -> torch.Tensor:
    """RMS over everything, a scalar tensor; 0 for no elements."""
    return x.square().mean().sqrt() if x.numel() else x.new_zeros(())


def difference(result: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """`result - exact` in float64, but 0 where `exact` is beyond the result's dtype and the result says so by infinity.

    A result that is not finite where it should be counts as 0 in its place; `not_written` reports it.
    """
    finite = result.nan_to_num(0.0, 0.0, 0.0)
    return (finite - exact).masked_fill_(overflowed(result, exact), 0.0)


def not_written(result: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Where `result` is NaN, or infinite although `exact` is not beyond its dtype: a bool tensor."""
    return ~(result.isfinite() | overflowed(result, exact))


def overflowed(result: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Where `exact` is beyond the range of the result's dtype, up to one rounding, and `result` is that infinity."""
    info = torch.finfo(result.dtype)
    largest = info.max * (1 - info.eps)
    return result.eq(torch.inf) & exact.gt(largest) | result.eq(-torch.inf) & exact.lt(-largest)

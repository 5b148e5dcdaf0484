"""The benchmark in the report of a campaign: its numbers and plots, which `fragment.html.j2` puts on the page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks import results as benchmark
from benchmarks.results import Row, by_length
from fuzz.reporting.plots import COLOURS, Drawing


@dataclass(frozen=True)
class Benchmark:
    """What `python -m benchmarks` and `python -m benchmarks.accuracy` left behind, ready to be shown."""

    file: Path
    results: dict
    rows: list[benchmark.Row]
    goals: list[benchmark.Goal]
    drawings: list[str]
    accuracy: list[dict]  # family and, for out and state, the medians and maxima of kernel and fla

    @property
    def problems(self) -> list[str]:
        return [f"{row.name}: {problem}" for row in self.rows for problem in row.problems]

    @property
    def mean(self) -> float | None:
        return benchmark.geometric_mean(self.rows)

    @property
    def above_fla(self) -> int:
        """Families in which an error of the kernel is above fla's."""
        return sum(row["out_above"] or row["state_above"] for row in self.accuracy)


def read_benchmark(run_folder: Path, speed: Path | None) -> Benchmark | None:
    """That in the file, or in the run folder when None is given; None when nobody has measured."""
    file = speed or run_folder / benchmark.SPEED_FILE
    if speed is None and not file.exists():
        return None
    results = benchmark.load(file)
    rows = benchmark.rows(results)
    accuracy = list(_accuracy(file.with_name(benchmark.ACCURACY_FILE)))
    return Benchmark(file, results, rows, benchmark.goals(results), drawings(rows), accuracy)


def _accuracy(file: Path) -> Iterator[dict]:
    if not file.exists():
        return
    try:
        families = json.loads(file.read_text())["families"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected the errors of benchmarks.accuracy, got another file: {error}") from error
    for family, errors in families.items():
        row = {"family": family}
        for quantity in ("out", "state"):
            # What raised, or is not finite, has no number: it is above everything, and nothing is above it.
            mine, theirs = (
                math.nan if (pair := errors.get(who, {}).get(quantity)) is None or pair[0] is None else pair[0]
                for who in ("kernel", "fla")
            )
            row |= {quantity: mine, f"{quantity}_fla": theirs, f"{quantity}_above": not mine <= _or_infinite(theirs)}
        yield row | {"with_fla": "fla" in errors}


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def drawings(rows: Sequence[Row]) -> list[str]:
    """All that can be drawn of what was measured."""
    measured = [row for row in rows if row.kernel_ms]
    found = []
    lengths = {f"H = {heads}": by_length(measured, heads) for heads in sorted({row.heads for row in measured})}
    one_length = [row for row in measured if row.sequences == 1 and row.tokens == 8192]
    equal = [row for row in measured if row.heads == 96 and row.tokens == 8192 and row.equal_lengths]
    for series, x, title, label in (
        (lengths, lambda row: row.tokens, "Time against length, one sequence", "tokens"),
        ({"8192 tokens": one_length}, lambda row: row.heads, "Time against heads, one sequence", "heads"),
        ({"H = 96": equal}, lambda row: row.sequences, "Time against sequences, 8192 tokens in all", "sequences"),
    ):
        series = {name: sorted(chosen, key=x) for name, chosen in series.items() if len(chosen) > 1}
        if series:
            found.append(scaling(series, x, title, label))
    return found


def scaling(series: Mapping[str, Sequence[Row]], x: Callable[[Row], int], title: str, label: str) -> str:
    """Milliseconds of the kernel as lines, its floor dashed, FlashKDA's published times as crosses."""
    with Drawing(title, height=3.0) as drawing:
        axes = drawing.axes
        for colour, rows in zip(COLOURS * 3, series.values(), strict=False):
            places = [x(row) for row in rows]
            axes.plot(places, [row.kernel_ms for row in rows], color=colour, linewidth=1.6, marker="o", ms=3)
            axes.plot(places, [row.floor_ms for row in rows], color=colour, linewidth=0.8, linestyle="--")
            peers = [row for row in rows if row.published_flashkda_ms]
            axes.plot(
                [x(row) for row in peers],
                [row.published_flashkda_ms for row in peers],
                color=colour,
                linestyle="none",
                marker="x",
                ms=5,
            )
        axes.set(xlabel=f"{label} (log)", ylabel="milliseconds (log)")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
        handles = [Line2D([], [], color=c, label=name) for c, name in zip(COLOURS * 3, series, strict=False)]
        handles.append(Line2D([], [], color="#323f4b", linewidth=0.8, linestyle="--", label="floor"))
        if any(row.published_flashkda_ms for rows in series.values() for row in rows):
            handles.append(Line2D([], [], color="#323f4b", linestyle="none", marker="x", label="FlashKDA"))
        drawing.legend(handles)
        return drawing.svg()

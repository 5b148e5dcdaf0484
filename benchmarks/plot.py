"""The plot of a benchmark for the README: the published cases side by side, and the cost of a token against length."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks import results as benchmark
from fuzz.reporting.plots import COLOURS, STYLE

KERNEL, FLA, FLASHKDA, FLOOR = COLOURS[0], COLOURS[1], COLOURS[2], "#9aa5b1"


def plot(results: dict, file: Path) -> list[Path]:
    """Writes FILE with .svg and .png in the place of .json, and returns their paths."""
    rows = benchmark.rows(results)
    # The same bytes from every run with the same numbers.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "flash_kda"}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        draw_times(left, [row for row in rows if row.group == "six" and row.kernel_ms])
        draw_lengths(right, rows)
        figure.suptitle(f"{results['environment']['device']['name']}, D = 128, fp32 states", fontsize=9)
        paths = [file.with_suffix(".svg"), file.with_suffix(".png")]
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=150, metadata={"Software": None})
    return paths


def draw_times(axes, rows: list[benchmark.Row]) -> None:
    """Four bars a case; above the kernel's how many times as fast as fla it is."""
    series = {
        fla_label(rows): (FLA, [row.fla_ms or row.published_fla_ms for row in rows]),
        "FlashKDA, published (H200)": (FLASHKDA, [row.published_flashkda_ms for row in rows]),
        "this kernel": (KERNEL, [row.kernel_ms for row in rows]),
        "floor": (FLOOR, [row.floor_ms for row in rows]),
    }
    for i, (label, (colour, times)) in enumerate(series.items()):
        places = [x + (i - 1.5) * 0.2 for x in range(len(rows))]
        axes.bar(places, [ms or 0.0 for ms in times], 0.19, color=colour, label=label)
        if label == "this kernel":
            for x, row in zip(places, rows, strict=True):
                if row.ratio:
                    axes.annotate(f"{row.ratio:.1f}x", (x, row.kernel_ms), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(rows)), [row.name for row in rows])
    axes.grid(False, axis="x")
    axes.set_ylabel("milliseconds")
    axes.set_title("8192 tokens, times as fast as fla")
    axes.legend()


def fla_label(rows: list[benchmark.Row]) -> str:
    return "fla" if any(row.fla_ms for row in rows) else "fla, published (H200)"


def draw_lengths(axes, rows: list[benchmark.Row]) -> None:
    """Microseconds for 1000 tokens of one sequence, a line for each number of heads."""
    heads = sorted({row.heads for row in rows if len(benchmark.by_length(rows, row.heads)) > 1})
    for colour, number in zip(COLOURS, heads, strict=False):
        chosen = benchmark.by_length(rows, number)
        tokens = [row.tokens for row in chosen]
        axes.plot(
            tokens,
            [1e6 * r.kernel_ms / r.tokens for r in chosen],
            color=colour,
            marker="o",
            ms=4,
            label=f"H = {number}",
        )
        peer = [row for row in chosen if row.published_flashkda_ms]
        costs = [1e6 * row.published_flashkda_ms / row.tokens for row in peer]
        axes.plot([row.tokens for row in peer], costs, color=colour, marker="x", ms=5, linestyle=":", linewidth=1)
    axes.set(
        xscale="log", yscale="log", xlabel="tokens of one sequence", title="Cost against length (dotted: FlashKDA)"
    )
    axes.set_ylabel("microseconds for 1000 tokens")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.tick_params(axis="x", labelrotation=45)
    if heads:
        axes.legend()

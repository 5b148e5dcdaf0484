"""The plots of the report, each one SVG drawing as text.

A drawing is narrow enough for a phone at its natural size. Text stays text: it is sharp and can be searched. Clouds of
points become a bitmap inside the drawing, which keeps the page of a long campaign small.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from fuzz.cases.families import FAMILIES

FIGURE_WIDTH = 4.6  # inches; 442 CSS pixels
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#9aa5b1",
    "grid.color": "#e4e7eb",
    "legend.frameon": False,
    "legend.fontsize": 8,
}
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d3b", "#7b5ea7", "#4d4d4d")  # safe for most eyes
BOUND = "#c1121f"
BOUND_BAND = Patch(facecolor=BOUND, alpha=0.3, label="bounds")
SMALLEST_DRAWN = 1e-9  # an error of zero has no logarithm; it is drawn here
LEGEND_LINE = 0.2  # inches
LONGEST_NAME = 42  # characters
LARGEST = 1e30  # and here what is larger; margins beyond the largest float have no place on an axis

PHASE_COLOURS = {"generate": "#9fb3c8", "oracle": "#486581", "target": "#e69f00", "judge": "#cc79a7", "tune": "#8a6d3b"}


@dataclass(frozen=True)
class Sample:
    """The accuracy of one judged (case, target): errors and bounds by metric, both relative."""

    target: str
    tokens: int  # of the longest sequence
    families: Mapping[str, str]  # "keys" -> "random"
    passed: bool
    errors: Mapping[str, float]
    bounds: Mapping[str, float]


def colours(targets: Iterable[str]) -> dict[str, str]:
    return {target: COLOURS[i % len(COLOURS)] for i, target in enumerate(targets)}


def short(name: str) -> str:
    """A name that leaves room for the plot: of a file in deep folders, with promises, only begin and end."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME // 3]}...{name[-LONGEST_NAME // 2 :]}"


def errors_by_target(samples: Sequence[Sample], metric: str, title: str, palette: Mapping[str, str]) -> str:
    """One row a target: the distribution of the errors, and the bounds they were held to."""
    with Drawing(title, height=0.55 + 0.5 * len(palette)) as drawing:
        for row, (target, colour) in enumerate(palette.items()):
            chosen = [sample for sample in samples if sample.target == target and metric in sample.errors]
            drawing.bound_band(row, [sample.bounds[metric] for sample in chosen if metric in sample.bounds])
            drawing.box(row, [sample.errors[metric] for sample in chosen], colour, 0.4)
        drawing.rows([short(target) for target in palette])
        drawing.error_axis("x", "relative error (log)")
        drawing.legend([Patch(color="#829ab1", label="error"), BOUND_BAND])
        return drawing.svg()


def errors_by_family(samples: Sequence[Sample], field: str, metric: str, title: str, palette: Mapping[str, str]) -> str:
    """One row a family with a box for each target, and the bounds."""
    met = {sample.families[field] for sample in samples if metric in sample.errors}
    families = [family for family in FAMILIES[field] if family in met]
    step = 0.8 / max(len(palette), 1)
    with Drawing(title, height=0.75 + max(0.34, 0.135 * len(palette) + 0.1) * max(len(families), 1)) as drawing:
        for row, family in enumerate(families):
            of_family = [s for s in samples if s.families[field] == family and metric in s.errors]
            for i, (target, colour) in enumerate(palette.items()):
                errors = [sample.errors[metric] for sample in of_family if sample.target == target]
                drawing.box(row - 0.4 + (i + 0.5) * step, errors, colour, 0.8 * step)
            drawing.bound_band(row, [sample.bounds[metric] for sample in of_family if metric in sample.bounds])
        drawing.rows(families)
        drawing.error_axis("x", "relative error (log)")
        handles = [Patch(color=colour, label=short(target)) for target, colour in palette.items()]
        drawing.legend([*handles, BOUND_BAND])
        return drawing.svg()


def errors_by_length(samples: Sequence[Sample], metric: str, title: str, palette: Mapping[str, str]) -> str:
    """Every sample as a point, the median of each power of two as a line, for each target; crosses are failures."""
    chosen = [sample for sample in samples if metric in sample.errors and sample.tokens > 0]
    with Drawing(title, height=3.1) as drawing:
        axes = drawing.axes
        for target, colour in palette.items():
            of_target = [sample for sample in chosen if sample.target == target]
            drawing.cloud(
                [s.tokens for s in of_target if s.passed],
                [s.errors[metric] for s in of_target if s.passed],
                colour,
                "o",
            )
            drawing.cloud(
                [s.tokens for s in of_target if not s.passed],
                [s.errors[metric] for s in of_target if not s.passed],
                colour,
                "x",
            )
            axes.plot(*medians(of_target, lambda s: s.errors[metric]), color=colour, linewidth=1.6, marker="o", ms=3)
        with_bound = [sample for sample in chosen if metric in sample.bounds]
        axes.plot(*medians(with_bound, lambda s: s.bounds[metric]), color=BOUND, linewidth=1.6, linestyle="--")
        axes.set_xscale("log", base=2)
        if not has_view(axes.xaxis):
            axes.set_xlim(1.0, 1024.0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:g}"))
        axes.set_xlabel("longest sequence, tokens (log)")
        drawing.error_axis("y", "relative error (log)")
        handles = [Line2D([], [], color=colour, label=short(target)) for target, colour in palette.items()]
        drawing.legend([*handles, Line2D([], [], color=BOUND, linestyle="--", label="bound (median)")])
        return drawing.svg()


def cases_per_second(edges: np.ndarray, cases: np.ndarray, results: np.ndarray) -> str:
    """edges [n + 1]: seconds since the start; cases, results [n]: how many were judged in each interval."""
    width = np.diff(edges)
    scale, unit = time_unit(edges[-1])
    with Drawing("Speed over time", height=2.3) as drawing:
        drawing.axes.stairs(results / width, edges / scale, color="#829ab1", label="judged (case, target)")
        drawing.axes.stairs(cases / width, edges / scale, color=COLOURS[0], linewidth=1.6, label="cases")
        drawing.axes.set_ylim(bottom=0)
        drawing.axes.set_ylabel("per second")
        drawing.axes.set_xlabel(f"time since the start, {unit}")
        drawing.legend(drawing.axes.get_legend_handles_labels()[0])
        return drawing.svg()


def time_by_phase(edges: np.ndarray, seconds: Mapping[str, np.ndarray]) -> str:
    """seconds: phase -> [n], the time spent in it in each interval, summed over the workers."""
    width = np.diff(edges)
    scale, unit = time_unit(edges[-1])
    with Drawing("Where the time goes", height=2.3) as drawing:
        below = np.zeros_like(width)
        for phase, colour in PHASE_COLOURS.items():
            if not np.any(seconds[phase]):
                continue
            above = below + seconds[phase] / width
            drawing.axes.stairs(above, edges / scale, baseline=below, fill=True, color=colour, label=phase)
            below = above
        drawing.axes.set_ylabel("busy workers")
        drawing.axes.set_xlabel(f"time since the start, {unit}")
        drawing.legend(drawing.axes.get_legend_handles_labels()[0])
        return drawing.svg()


def error_map(values: np.ndarray, title: str, salt: str, *, first: int = 0, step: int = 1, rows: str = "token") -> str:
    """Where the error sits. salt: keeps the names inside the drawing apart from those of another with the same title.

    values [rows, channels]: the absolute error, scaled by the RMS of what is right; NaN where it is not finite. A row
    stands for `step` tokens (or columns of the state: `rows` says of what), the first of them for those from `first`.
    """
    finite = np.isfinite(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithm = np.where(finite, np.log10(np.maximum(values, SMALLEST_DRAWN)), np.nan)
    with Drawing(title, height=2.6, salt=salt) as drawing:
        axes = drawing.axes
        axes.grid(False)
        axes.set_facecolor("#39c5e8")  # shows through where nothing is drawn; not a colour of the map
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        extent = (-0.5, values.shape[1] - 0.5, first + step * values.shape[0] - 0.5, first - 0.5)
        image = axes.imshow(logarithm, aspect="auto", interpolation="nearest", cmap="inferno", extent=extent)
        bar = drawing.figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("log10 of the error, relative")
        axes.set_xlabel("channel" + ("" if finite.all() else "   (light blue: not finite)"))
        axes.set_ylabel(rows + (f" ({step} a row, the worst)" if step > 1 else ""))
        return drawing.svg()


class Drawing:
    """A figure with one pair of axes and a title, in the style of the page."""

    def __init__(self, title: str, height: float, salt: str = ""):
        self.title = title
        # Names inside a drawing come from its title, not from chance: the same data gives the same page.
        self.style = matplotlib.rc_context({**STYLE, "svg.hashsalt": title + salt})
        self.height = height

    def __enter__(self) -> Drawing:
        self.style.__enter__()
        self.figure = Figure(figsize=(FIGURE_WIDTH, self.height), layout="constrained")
        self.axes = self.figure.add_subplot()
        self.axes.use_sticky_edges = False  # the edges of a bar are no limits of the axis
        self.axes.set_title(self.title)
        return self

    def __exit__(self, *exception) -> None:
        self.style.__exit__(*exception)

    def box(self, y: float, values: Iterable[float], colour: str, height: float) -> None:
        """Quartiles and median as a box, 5 % and 95 % as whiskers, the worst as a dot."""
        values = drawable(values)
        if not len(values):
            return
        low, first, median, third, high, worst = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95, 1.0])
        self.axes.plot([low, high], [y, y], color=colour, linewidth=1, solid_capstyle="butt")
        self.axes.barh(y, third - first, left=first, height=height, color=colour, alpha=0.75, linewidth=0)
        self.axes.plot([median, median], [y - height / 2, y + height / 2], color="white", linewidth=1.2)
        self.axes.plot([worst], [y], marker="o", markersize=2.6, color=colour, linestyle="none", clip_on=False)

    def bound_band(self, y: float, values: Iterable[float]) -> None:
        """The span from 5 % to 95 % as a band over the whole row, with the median as a line."""
        values = drawable(values)
        if not len(values):
            return
        low, median, high = np.quantile(values, [0.05, 0.5, 0.95])
        self.axes.barh(y, high - low, left=low, height=0.94, color=BOUND, alpha=0.16, linewidth=0)
        self.axes.plot([median, median], [y - 0.47, y + 0.47], color=BOUND, linewidth=1.6, solid_capstyle="butt")

    def cloud(self, x: Sequence[float], y: Sequence[float], colour: str, marker: str) -> None:
        x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        x, y = x[np.isfinite(y)], drawable(y)
        size, opacity = (16, 0.9) if marker == "x" else (5, 0.25)
        edge = {"linewidths": 1.2 if marker == "x" else 0}
        self.axes.scatter(x, y, s=size, color=colour, marker=marker, alpha=opacity, rasterized=True, **edge)

    def rows(self, labels: Sequence[str]) -> None:
        self.axes.set_yticks(range(len(labels)), labels)
        self.axes.set_ylim(max(len(labels), 1) - 0.5, -0.5)
        self.axes.grid(False, axis="y")
        self.axes.tick_params(axis="y", length=0)

    def error_axis(self, which: str, label: str) -> None:
        """Logarithmic, in whole decades."""
        axis = getattr(self.axes, f"{which}axis")
        self.axes.set(**{f"{which}scale": "log", f"{which}label": label})
        drawn = getattr(self.axes.dataLim, f"interval{which}")  # all that was drawn, whatever the axis would show of it
        decades = np.log10(
            drawn if has_view(axis) and np.all(np.isfinite(drawn)) and min(drawn) > 0 else [SMALLEST_DRAWN, 1.0]
        )
        self.axes.set(**{f"{which}lim": 10.0 ** np.array([np.floor(decades[0]) - 0.1, np.ceil(decades[1]) + 0.1])})
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"1e{np.log10(value):.0f}"))
        axis.set_minor_locator(NullLocator())

    def legend(self, handles: Sequence) -> None:
        longest = max((len(handle.get_label()) for handle in handles), default=0)
        columns = max(1, min(len(handles), 60 // (longest + 8)))
        lines = -(-len(handles) // columns)
        self.figure.set_figheight(self.height + LEGEND_LINE * max(lines - 1, 0))  # the first has its place
        self.figure.legend(handles=handles, loc="outside lower center", ncols=columns)

    def svg(self) -> str:
        file = io.StringIO()
        self.figure.savefig(file, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
        text = file.getvalue()
        text = text[text.index("<svg") :]  # inside a page there is no XML declaration
        text = re.sub(r' id="[A-Za-z]+[A-Za-z0-9.]*_\d+"', "", text)  # of groups; they would repeat from plot to plot
        return text.replace("<svg", '<svg role="img"', 1)


def has_view(axis: Axis) -> bool:
    """Whether a logarithmic axis has something to show; where nothing was drawn, its span has no logarithm."""
    view = axis.get_view_interval()
    return bool(np.all(np.isfinite(view)) and np.all(view > 0))


def medians(samples: Sequence[Sample], value) -> tuple[list[float], list[float]]:
    """x and y of the median of `value` in each power of two of the length, where that is finite."""
    classes: dict[int, list[Sample]] = {}
    for sample in samples:
        classes.setdefault(int(np.log2(sample.tokens)), []).append(sample)
    points = [
        (float(np.exp2(np.mean([np.log2(s.tokens) for s in classes[power]]))), y)
        for power in sorted(classes)
        for y in drawable([2 * np.median([value(s) / 2 for s in classes[power]])])  # the sum of two may overflow
    ]
    return [x for x, _ in points], [y for _, y in points]


def drawable(values: Iterable[float]) -> np.ndarray:
    """Without what is not finite, and with what is too small or too large moved to the last value that is drawn."""
    values = np.asarray(list(values), dtype=float)
    return np.clip(values[np.isfinite(values)], SMALLEST_DRAWN, LARGEST)


def time_unit(seconds: float) -> tuple[float, str]:
    return (3600.0, "hours") if seconds > 7200 else (60.0, "minutes") if seconds > 180 else (1.0, "seconds")

"""The report of a campaign: one HTML page with everything inside, readable on a phone and without a network.

It is made from the run folder alone (`campaign.sqlite` and `findings/`; `speed.json` and `accuracy.json` of a benchmark
where they are there), while the campaign runs or at any time later. Counts, coverage and worst errors are of all
results; the plots are of an even sample of SAMPLES of them.
"""

from __future__ import annotations

import math
import sqlite3
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from benchmarks import fragment
from benchmarks.fragment import Benchmark, read_benchmark
from fuzz.campaign import store
from fuzz.files import write_whole
from fuzz.reporting import plots
from fuzz.reporting.summary import PHASE_TITLES, Summary, gather
from fuzz.reporting.templates import flat, html_environment

REPORT_FILE = "report.html"

ERROR_MAPS = 20  # findings whose heat map is drawn; the folders hold the others

METRIC_TITLES = {
    "out": "output, relative RMS",
    "out_window": "output, worst window of 16 tokens",
    "out_element": "output, worst element",
    "state": "final state, relative RMS",
    "state_head": "final state, worst head",
    "state_element": "final state, worst element",
}

LENGTH_PLOTS = ("out", "out_window", "state", "state_head")

FAMILY_PLOTS = {"keys": "out", "gates": "out", "betas": "out", "values": "out", "queries": "out", "states": "state"}


def write_report(run_folder: Path, speed: Path | None = None) -> Path:
    """Writes `report.html` into the run folder, replacing an older one in one step, and returns its path.

    speed: the JSON of a benchmark; without it, that in the run folder, if there is one. The errors beside fla's are
    taken from the `accuracy.json` beside it. Raises FileNotFoundError when the folder holds no campaign, or the file is
    not there, and ValueError when one of them cannot be read.
    """
    run_folder = Path(run_folder)
    measured = read_benchmark(run_folder, speed)
    db = store.open_for_reading(run_folder)
    try:
        summary = gather(db, run_folder)
    except sqlite3.Error as error:
        raise ValueError(
            f"{run_folder / store.STORE_FILE}: expected the store of a campaign, got another file: {error}"
        ) from error
    finally:
        db.close()
    page = render(summary, run_folder, measured)
    path = run_folder / REPORT_FILE
    write_whole(path, page)
    return path


def render(summary: Summary, run_folder: Path, measured: Benchmark | None = None) -> str:
    palette = plots.colours(summary.by_target)
    judged = {target: palette[target] for target, counts in summary.by_target.items() if counts.judged}
    samples = summary.samples
    figures = {
        "by_target": [
            plots.errors_by_target(samples, metric, f"{metric}: {title}", judged)
            for metric, title in METRIC_TITLES.items()
            if any(metric in sample.errors for sample in samples)
        ],
        "by_family": [
            plots.errors_by_family(samples, name, metric, f"{name.capitalize()}: error of {metric}", judged)
            for name, metric in FAMILY_PLOTS.items()
            if any(metric in sample.errors for sample in samples)
        ],
        "by_length": [
            plots.errors_by_length(samples, metric, f"{metric}, by the length of the longest sequence", judged)
            for metric in LENGTH_PLOTS
            if any(metric in sample.errors for sample in samples)
        ],
        "speed": [
            plots.cases_per_second(summary.edges, summary.cases_over_time, summary.results_over_time),
            plots.time_by_phase(summary.edges, summary.seconds_over_time),
        ]
        if summary.results
        else [],
    }
    for finding in summary.findings[:ERROR_MAPS]:
        if error_map := finding["error_map"]:
            finding["figure"] = _error_map(error_map, finding)
    environment = html_environment(Path(__file__).parent, Path(fragment.__file__).parent)
    environment.filters.update(number=_number, error=_error, share=_share, time=_time, duration=_duration, fixed=_fixed)
    template = environment.get_template("report.html.j2")
    return template.render(
        summary=summary,
        campaign=summary.campaign,
        palette=palette,
        figures=figures,
        metrics=METRIC_TITLES,
        environment=list(flat(summary.campaign.get("environment") or {})),
        settings=list(flat(summary.campaign.get("config") or {})),
        folder=str(run_folder),
        benchmark=measured,
        phases=PHASE_TITLES,
    )


def _error_map(error_map: dict, finding: dict) -> str:
    """As `fuzz.judging.error_map` made it."""
    values = np.array(error_map["values"], dtype=float)  # None, which is not finite, becomes NaN
    of = error_map.get("of", "out")
    title = f"{finding['target']}: {of}, sequence {error_map['sequence']}, head {error_map['head']}"
    return plots.error_map(
        values,
        title,
        finding["id"],
        first=error_map.get("first_token", 0),
        step=error_map.get("tokens_per_row", 1),
        rows="token" if of == "out" else "column of the values",
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _error(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-3 or value >= 100 else f"{value:.3g}"


def _share(value: float) -> str:
    """Error over bound."""
    return "not finite" if not math.isfinite(value) else f"{100 * value:.0f} %" if value < 10 else f"{value:.0f} times"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return (
        f"{hours:.1f} hours" if hours >= 2 else f"{minutes:.1f} minutes" if minutes >= 2 else f"{seconds:.0f} seconds"
    )

"""The report of a campaign: one HTML page with everything inside, readable on a phone and without a network.

It is made from the run folder alone (`campaign.sqlite` and `findings/`; `speed.json` and `accuracy.json` of a benchmark
where they are there), while the campaign runs or at any time later. Counts, coverage and worst errors are of all
results; the plots are of an even sample of SAMPLES of them.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import jinja2
import numpy as np

from benchmarks import fragment as benchmark_plots
from benchmarks import results as benchmark
from fuzz.campaign import findings, store
from fuzz.campaign.replay import is_smaller
from fuzz.cases.case import Case
from fuzz.cases.families import FAMILIES
from fuzz.reporting import plots
from fuzz.reporting.plots import Sample

FILE = "report.html"
SAMPLES = 20_000
INTERVALS = 60  # of the plots over time
ERROR_MAPS = 20  # findings whose heat map is drawn; the folders hold the others

METRICS = {
    "out": "output, relative RMS",
    "out_window": "output, worst window of 16 tokens",
    "out_element": "output, worst element",
    "state": "final state, relative RMS",
    "state_head": "final state, worst head",
    "state_element": "final state, worst element",
}
LENGTH_PLOTS = ("out", "out_window", "state", "state_head")
FAMILY_PLOTS = {"keys": "out", "gates": "out", "betas": "out", "values": "out", "queries": "out", "states": "state"}
STAGES = {
    "generate": "making the inputs",
    "oracle": "oracle",
    "target": "targets",
    "judge": "judging",
    "tune": "Triton's choice among configurations",
}


@dataclass
class Tally:
    """What became of one target's cases."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    findings: int = 0
    seconds: float = 0.0
    worst: dict[str, float] = field(default_factory=dict)  # metric -> error of the accuracy check
    share: dict[str, float] = field(default_factory=dict)  # metric -> error over its bound

    @property
    def judged(self) -> int:
        return self.passed + self.failed

    @property
    def milliseconds(self) -> float:
        return 1e3 * self.seconds / max(self.judged, 1)


@dataclass
class CheckTally:
    passed: int = 0
    failed: int = 0


@dataclass
class Summary:
    """Everything that the page shows, gathered in one pass over the results."""

    campaign: dict[str, object]
    tallies: dict[str, Tally] = field(default_factory=dict)
    checks: dict[str, dict[str, CheckTally]] = field(default_factory=dict)  # check -> target -> counts
    skips: Counter[tuple[str, str]] = field(default_factory=Counter)  # (target, reason)
    coverage: dict[str, dict[str, int]] = field(default_factory=dict)  # aspect -> class -> cases
    cases: int = 0
    samples: list[Sample] = field(default_factory=list)
    edges: np.ndarray = field(default_factory=lambda: np.zeros(2))  # of the intervals, seconds since the start
    cases_over_time: np.ndarray = field(default_factory=lambda: np.zeros(1))
    results_over_time: np.ndarray = field(default_factory=lambda: np.zeros(1))
    seconds_over_time: dict[str, np.ndarray] = field(default_factory=dict)  # stage -> seconds
    places: Counter[str] = field(default_factory=Counter)  # machine or device -> judgements
    findings: list[dict] = field(default_factory=list)
    replays: list[dict] = field(default_factory=list)  # of findings of earlier campaigns

    @property
    def results(self) -> int:
        """Judged (case, target)."""
        return sum(tally.judged for tally in self.tallies.values())

    @property
    def failed(self) -> int:
        return sum(tally.failed for tally in self.tallies.values())

    @property
    def seconds(self) -> float:
        """That the campaign ran, without the pauses between an interruption and its resumption."""
        return float(self.campaign.get("elapsed") or self.edges[-1])

    @property
    def stage_seconds(self) -> dict[str, float]:
        return {stage: float(seconds.sum()) for stage, seconds in self.seconds_over_time.items() if seconds.any()}

    @property
    def unavailable(self) -> list[dict]:
        """Targets that could not run: name and reason."""
        every = [*self.campaign.get("targets", []), *self.campaign.get("unavailable", [])]
        return [target for target in every if target["unavailable"] is not None]


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
        raise ValueError(f"{run_folder / store.FILE}: cannot be read as a campaign: {error}") from error
    finally:
        db.close()
    page = render(summary, run_folder, measured)
    path, new = run_folder / FILE, run_folder / f".new-{FILE}"
    new.write_text(page, encoding="utf-8")
    os.replace(new, path)
    return path


# -------------------------------------------------------------------------------------------------------------- gather


def gather(db: sqlite3.Connection, run_folder: Path) -> Summary:
    summary = Summary({key: json.loads(value) for key, value in db.execute("SELECT key, value FROM campaign")})
    _gather_results(db, summary)
    _gather_coverage(db, summary)
    summary.findings = list(_findings(db, run_folder))
    summary.replays = list(_replays(db, summary.findings))
    for finding in summary.findings:
        summary.tallies.setdefault(finding["target"], Tally()).findings += 1
    return summary


def _gather_results(db: sqlite3.Connection, summary: Summary) -> None:
    total, first, last = db.execute("SELECT count(*), min(at), max(at) FROM results").fetchone()
    start = summary.campaign.get("started", first)
    span = max(last - start, 1e-3) if total else 1.0
    summary.edges = np.linspace(0.0, span, INTERVALS + 1)
    summary.cases_over_time = np.zeros(INTERVALS)
    summary.results_over_time = np.zeros(INTERVALS)
    summary.seconds_over_time = {stage: np.zeros(INTERVALS) for stage in STAGES}
    for target in summary.campaign.get("targets", []):
        if target["unavailable"] is None:
            summary.tallies[target["name"]] = Tally()

    def interval(at: float) -> int:
        return min(max(int((at - start) / span * INTERVALS), 0), INTERVALS - 1)

    stages = ", ".join(f"seconds_{stage}" for stage in STAGES)
    query = "SELECT id, case_json, target, outcome, reason, verdict_json, at, place"
    for row in db.execute(f"{query}, {stages} FROM results ORDER BY id"):
        number, case_json, target, outcome, reason, verdict_json, at, place, *seconds = row
        for stage, spent in zip(STAGES, seconds, strict=True):
            summary.seconds_over_time[stage][interval(at)] += spent or 0.0
        tally = summary.tallies.setdefault(target, Tally())
        setattr(tally, outcome, getattr(tally, outcome) + 1)
        if outcome == "skipped":
            summary.skips[target, reason] += 1
            continue
        summary.results_over_time[interval(at)] += 1
        summary.places[place] += 1
        tally.seconds += seconds[list(STAGES).index("target")] or 0.0
        for check in json.loads(verdict_json)["checks"]:
            counts = summary.checks.setdefault(check["name"], {}).setdefault(target, CheckTally())
            if check["passed"]:
                counts.passed += 1
            else:
                counts.failed += 1
            if check["name"] == "accuracy":
                errors, bounds = _numbers(check["errors"]), _numbers(check["bounds"])
                _note_worst(tally, errors, bounds)
                if _sampled(number, total):
                    case = json.loads(case_json)
                    families = {name: case[name] for name in FAMILIES}
                    tokens = max(case["seq_lens"])
                    summary.samples.append(Sample(target, tokens, families, check["passed"], errors, bounds))
    query = "SELECT min(at) FROM results WHERE outcome != 'skipped' GROUP BY case_id"
    for (at,) in db.execute(query):
        summary.cases_over_time[interval(at)] += 1
        summary.cases += 1


def _numbers(values: dict) -> dict[str, float]:
    """What JSON could not say as a number was not finite."""
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


def _note_worst(tally: Tally, errors: dict[str, float], bounds: dict[str, float]) -> None:
    for metric, error in errors.items():
        tally.worst[metric] = _greater(tally.worst.get(metric, 0.0), error)
        if metric in bounds:
            share = error / bounds[metric] if bounds[metric] else math.inf if error else 0.0
            tally.share[metric] = _greater(tally.share.get(metric, 0.0), share)


def _greater(a: float, b: float) -> float:
    """The greater of two, and NaN, the worst of all, if either is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _sampled(number: int, total: int) -> bool:
    """An even choice of results by their number, in no step with the targets that take turns."""
    return (number * 2654435761) % 2**32 < SAMPLES / max(total, 1) * 2**32


# ------------------------------------------------------------------------------------------------------------ coverage

LENGTHS = {"0": 0, "1": 1, "2 to 15": 15, "16": 16, "17 to 63": 63, "64": 64, "65 to 127": 127, "128 to 511": 511,
           "512 to 2047": 2047, "2048 and more": math.inf}  # fmt: skip
COUNTS = {"1": 1, "2 to 4": 4, "5 to 16": 16, "17 to 64": 64, "65 and more": math.inf}
DECAYS = {"-5": -5.0, "above -5, to -3": -3.0, "above -3, to -1": -1.0, "between -1 and 0": math.nextafter(0.0, -1.0),
          "0": 0.0}  # fmt: skip
TAILS = {0: "a multiple of 64", 1: "one more", 63: "one less", 16: "a multiple of 16", 32: "a multiple of 16",
         48: "a multiple of 16"}  # fmt: skip
STATES = ("none", "bf16", "fp32")

ASPECTS: dict[str, tuple[str, ...]] = {
    "Length of a sequence, tokens": tuple(LENGTHS),
    "Length against chunks of 64": (*dict.fromkeys(TAILS.values()), "another tail"),
    "Sequences": tuple(COUNTS),
    "Heads": tuple(COUNTS),
    "lower_bound": tuple(DECAYS),
    "Form": ("batch of one", "batch of several", "packed, int32", "packed, int64"),
    "Layout": ("contiguous", "strided"),
    "State, initial to final": (*(f"{a} to {b}" for a in STATES for b in STATES), "in place"),
    **{name.capitalize(): families for name, families in FAMILIES.items()},
}
"""What a case can have, and in which classes it is counted; a class that no case reached is shown too."""


def aspects(case: Case) -> Iterator[tuple[str, str]]:
    """Every (aspect, class) of a case, each once."""
    yield from {("Length of a sequence, tokens", _class(LENGTHS, length)) for length in case.seq_lens}
    yield from {("Length against chunks of 64", TAILS.get(length % 64, "another tail")) for length in case.seq_lens}
    yield "Sequences", _class(COUNTS, case.n_seqs)
    yield "Heads", _class(COUNTS, case.heads)
    yield "lower_bound", _class(DECAYS, case.lower_bound)
    if case.packed:
        yield "Form", f"packed, {case.cu_seqlens_dtype}"
    else:
        yield "Form", "batch of one" if case.n_seqs == 1 else "batch of several"
    yield "Layout", case.layout
    yield "State, initial to final", f"{case.initial_state or 'none'} to {case.final_state or 'none'}"
    if case.in_place:
        yield "State, initial to final", "in place"
    for name in FAMILIES:
        yield name.capitalize(), getattr(case, name)


def _class(classes: dict[str, float], value: float) -> str:
    """The name of the first class whose greatest value is not below `value`."""
    return next(name for name, greatest in classes.items() if value <= greatest)


def _gather_coverage(db: sqlite3.Connection, summary: Summary) -> None:
    summary.coverage = {aspect: dict.fromkeys(classes, 0) for aspect, classes in ASPECTS.items()}
    query = "SELECT case_json FROM results WHERE outcome != 'skipped' GROUP BY case_id"
    for (case_json,) in db.execute(query):
        for aspect, name in aspects(Case.from_dict(json.loads(case_json))):
            summary.coverage[aspect][name] += 1


# ------------------------------------------------------------------------------------------------------------ findings


def _findings(db: sqlite3.Connection, run_folder: Path) -> Iterator[dict]:
    """What the folders of findings say, with the counts of the store; the most frequent first."""
    counts = store.failures_by_finding(db)
    query = "SELECT finding, min(at) FROM results WHERE finding IS NOT NULL GROUP BY finding"
    first = dict(db.execute(query))
    replayed = dict(db.execute("SELECT path, at FROM replays"))
    found = []
    for folder in sorted((run_folder / "findings").glob("*/finding.json")):
        if is_smaller(folder.parent):
            continue
        try:
            found.append(_finding(folder.parent))
        except (OSError, ValueError, KeyError):  # somebody is just moving it
            continue
        finding = found[-1]
        finding["count"] = counts.get(finding["id"], 0) + len(finding["previous"])
        times = [first.get(finding["id"]), *(replayed.get(path) for path in finding["previous"])]
        finding["at"] = min((at for at in times if at is not None), default=None)
    yield from sorted(found, key=lambda finding: (-finding["count"], finding["at"] or math.inf))


def _finding(folder: Path) -> dict:
    saved = json.loads((folder / "finding.json").read_text())
    smallest, original = (json.loads((folder / name).read_text()) for name in ("case.json", "original.json"))
    state = saved.get("state") or ("shrunk" if saved["shrunk"] else "waiting")
    needed = findings.needs(Case.from_dict(smallest, inputs_saved=True)) if state == "shrunk" else {}
    return {
        "id": folder.name,
        "target": saved["target"],
        "check_name": saved["check"],
        "error_class": saved.get("error_class", ""),
        "detail": saved["detail"],
        "errors": _numbers(saved["errors"]),
        "bounds": _numbers(saved["bounds"]),
        "state": state,
        "family": findings.family(needed),
        "previous": saved.get("previous", []),
        "smaller": smallest != original,
        "replay": f"python -m fuzz replay {folder}",
        "smallest": describe(smallest),
        "smallest_text": json.dumps(smallest, indent=1),
        "original": describe(original),
        "error_map": saved.get("error_map"),
    }


def _replays(db: sqlite3.Connection, found: list[dict]) -> Iterator[dict]:
    """What became of findings of earlier campaigns, those that failed again first."""
    again = {path: finding["id"] for finding in found for path in finding["previous"]}
    query = "SELECT path, target, outcome, reason FROM replays ORDER BY outcome != 'failed', path"
    for path, target, outcome, reason in db.execute(query):
        yield {"path": path, "target": target, "outcome": outcome, "reason": reason, "finding": again.get(path)}


def describe(case: dict) -> list[tuple[str, str]]:
    """A case as a person would put it: pairs of a word and what it is."""
    lengths = case["seq_lens"]
    shown = ", ".join(map(str, lengths[:12])) + (f", ... ({len(lengths)} sequences)" if len(lengths) > 12 else "")
    states = f"{case['initial_state'] or 'none'} to {case['final_state'] or 'none'}"
    return [
        ("tokens", shown),
        ("form", f"packed, {case['cu_seqlens_dtype']}" if case["packed"] else f"batch of {len(lengths)}"),
        ("heads", str(case["heads"])),
        ("lower_bound", f"{case['lower_bound']:g}"),
        ("scale", f"{case['scale']:.6g}"),
        ("state", states + (", in place" if case["in_place"] else "")),
        ("layout", case["layout"]),
        *((name, case[name]) for name in FAMILIES),
        ("seed", str(case["seed"])),
    ]


# ----------------------------------------------------------------------------------------------------------- benchmark


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
    file = speed or run_folder / benchmark.FILE
    if speed is None and not file.exists():
        return None
    results = benchmark.load(file)
    rows = benchmark.rows(results)
    accuracy = list(_accuracy(file.with_name(benchmark.ACCURACY_FILE)))
    return Benchmark(file, results, rows, benchmark.goals(results), benchmark_plots.drawings(rows), accuracy)


def _accuracy(file: Path) -> Iterator[dict]:
    if not file.exists():
        return
    try:
        families = json.loads(file.read_text())["families"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the errors of a benchmark: {error}") from error
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


# ---------------------------------------------------------------------------------------------------------------- page


def render(summary: Summary, run_folder: Path, measured: Benchmark | None = None) -> str:
    palette = plots.colours(summary.tallies)
    judged = {target: palette[target] for target, tally in summary.tallies.items() if tally.judged}
    samples = summary.samples
    figures = {
        "by_target": [
            plots.errors_by_target(samples, metric, f"{metric}: {title}", judged)
            for metric, title in METRICS.items()
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
            plots.time_by_stage(summary.edges, summary.seconds_over_time),
        ]
        if summary.results
        else [],
    }
    for finding in summary.findings[:ERROR_MAPS]:
        if error_map := finding["error_map"]:
            finding["figure"] = _error_map(error_map, finding)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=_number, error=_error, share=_share, time=_time, duration=_duration, fixed=_fixed)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        summary=summary,
        campaign=summary.campaign,
        palette=palette,
        figures=figures,
        metrics=METRICS,
        environment=list(_flat(summary.campaign.get("environment") or {})),
        settings=list(_flat(summary.campaign.get("config") or {})),
        folder=str(run_folder),
        benchmark=measured,
        stages=STAGES,
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


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as pairs of a dotted name and its value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{key}", "not there" if value is None else str(value)


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

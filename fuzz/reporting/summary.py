"""The summary of a campaign: everything that the report shows, gathered from the run folder."""

from __future__ import annotations

import json
import math
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fuzz.campaign import findings, store
from fuzz.campaign.plan import DEFAULT_TARGET
from fuzz.campaign.replay import is_smaller
from fuzz.cases.case import Case
from fuzz.cases.families import FAMILIES
from fuzz.judging.verdict import shares_of_bounds
from fuzz.reporting.coverage import ASPECTS, aspects
from fuzz.reporting.plots import Sample

SAMPLES = 20_000

INTERVALS = 60  # of the plots over time

PHASE_TITLES = {
    "generate": "making the inputs",
    "oracle": "oracle",
    "target": "targets",
    "judge": "judging",
    "tune": "Triton's choice among configurations",
}


@dataclass
class TargetSummary:
    """What became of one target's cases."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    findings: int = 0
    seconds: float = 0.0
    worst: dict[str, float] = field(default_factory=dict)  # metric -> error of the accuracy check
    share: dict[str, float] = field(
        default_factory=dict
    )  # metric -> error over its bound, both beyond the last rounding

    @property
    def judged(self) -> int:
        return self.passed + self.failed

    @property
    def milliseconds(self) -> float:
        return 1e3 * self.seconds / max(self.judged, 1)


@dataclass
class CheckCounts:
    passed: int = 0
    failed: int = 0


@dataclass
class Summary:
    """Everything that the page shows, gathered in one pass over the results."""

    campaign: dict[str, object]
    by_target: dict[str, TargetSummary] = field(default_factory=dict)
    checks: dict[str, dict[str, CheckCounts]] = field(default_factory=dict)  # check -> target -> counts
    skips: Counter[tuple[str, str]] = field(default_factory=Counter)  # (target, reason)
    coverage: dict[str, dict[str, int]] = field(default_factory=dict)  # aspect -> class -> cases
    cases: int = 0
    samples: list[Sample] = field(default_factory=list)
    edges: np.ndarray = field(default_factory=lambda: np.zeros(2))  # of the intervals, seconds since the start
    cases_over_time: np.ndarray = field(default_factory=lambda: np.zeros(1))
    results_over_time: np.ndarray = field(default_factory=lambda: np.zeros(1))
    seconds_over_time: dict[str, np.ndarray] = field(default_factory=dict)  # phase -> seconds
    places: Counter[str] = field(default_factory=Counter)  # machine or device -> judgements
    findings: list[dict] = field(default_factory=list)
    replays: list[dict] = field(default_factory=list)  # of findings of earlier campaigns

    @property
    def tested(self) -> set[str]:
        """The targets under test; all others are references, which older campaigns do not have."""
        named = (self.campaign.get("config") or {}).get("targets") or [DEFAULT_TARGET]
        targets = self.campaign.get("targets", [])
        return {target["name"] for target in targets if target.get("spec", named[0]) in named}

    @property
    def verdict(self) -> list[dict]:
        """The findings that count: of targets under test, and not known."""
        return [one for one in self.findings if not one["known"] and one["target"] in self.tested]

    @property
    def of_references(self) -> list[dict]:
        return [one for one in self.findings if not one["known"] and one["target"] not in self.tested]

    @property
    def known(self) -> list[dict]:
        return [one for one in self.findings if one["known"]]

    @property
    def judged(self) -> int:
        """Cases judged on targets under test."""
        return sum(counts.judged for name, counts in self.by_target.items() if name in self.tested)

    @property
    def results(self) -> int:
        """Judged (case, target)."""
        return sum(counts.judged for counts in self.by_target.values())

    @property
    def failed(self) -> int:
        return sum(counts.failed for counts in self.by_target.values())

    @property
    def unsaved(self) -> int:
        """Failed cases of targets under test, where no finding holds any yet."""
        failed = sum(counts.failed for name, counts in self.by_target.items() if name in self.tested)
        return 0 if any(one["target"] in self.tested for one in self.findings) else failed

    @property
    def seconds(self) -> float:
        """That the campaign ran, without the pauses between an interruption and its resumption."""
        return float(self.campaign.get("elapsed") or self.edges[-1])

    @property
    def phase_seconds(self) -> dict[str, float]:
        return {phase: float(seconds.sum()) for phase, seconds in self.seconds_over_time.items() if seconds.any()}

    @property
    def unavailable(self) -> list[dict]:
        """Targets that could not run: name and reason."""
        every = [*self.campaign.get("targets", []), *self.campaign.get("unavailable", [])]
        return [target for target in every if target["unavailable"] is not None]


def gather(db: sqlite3.Connection, run_folder: Path) -> Summary:
    summary = Summary({key: json.loads(value) for key, value in db.execute("SELECT key, value FROM campaign")})
    _gather_results(db, summary)
    _gather_coverage(db, summary)
    summary.findings = list(_findings(db, run_folder))
    known = summary.campaign.get("known") or {}
    for finding in summary.findings:
        finding["known"] = known.get(finding["id"], "")
    summary.findings = [*summary.verdict, *summary.of_references, *summary.known]
    summary.replays = list(_replays(db, summary.findings))
    for finding in summary.findings:
        summary.by_target.setdefault(finding["target"], TargetSummary()).findings += 1
    return summary


def _gather_results(db: sqlite3.Connection, summary: Summary) -> None:
    total, first, last = db.execute("SELECT count(*), min(at), max(at) FROM results").fetchone()
    start = summary.campaign.get("started", first)
    span = max(last - start, 1e-3) if total else 1.0
    summary.edges = np.linspace(0.0, span, INTERVALS + 1)
    summary.cases_over_time = np.zeros(INTERVALS)
    summary.results_over_time = np.zeros(INTERVALS)
    summary.seconds_over_time = {phase: np.zeros(INTERVALS) for phase in PHASE_TITLES}
    for target in summary.campaign.get("targets", []):
        if target["unavailable"] is None:
            summary.by_target[target["name"]] = TargetSummary()

    def interval(at: float) -> int:
        return min(max(int((at - start) / span * INTERVALS), 0), INTERVALS - 1)

    phases = ", ".join(f"seconds_{phase}" for phase in PHASE_TITLES)
    query = "SELECT id, case_json, target, outcome, reason, verdict_json, at, place"
    for row in db.execute(f"{query}, {phases} FROM results ORDER BY id"):
        number, case_json, target, outcome, reason, verdict_json, at, place, *seconds = row
        spread(summary, dict(zip(PHASE_TITLES, seconds, strict=True)), at - start)
        counts = summary.by_target.setdefault(target, TargetSummary())
        setattr(counts, outcome, getattr(counts, outcome) + 1)
        if outcome == "skipped":
            summary.skips[target, reason] += 1
            continue
        summary.results_over_time[interval(at)] += 1
        summary.places[place] += 1
        counts.seconds += seconds[list(PHASE_TITLES).index("target")] or 0.0
        for check in json.loads(verdict_json)["checks"]:
            of_check = summary.checks.setdefault(check["name"], {}).setdefault(target, CheckCounts())
            if check["passed"]:
                of_check.passed += 1
            else:
                of_check.failed += 1
            if check["name"] == "accuracy":
                errors, bounds = _numbers(check["errors"]), _numbers(check["bounds"])
                _note_worst(counts, errors, shares_of_bounds({**check, "errors": errors, "bounds": bounds}))
                if _sampled(number, total):
                    case = json.loads(case_json)
                    families = {name: case[name] for name in FAMILIES}
                    tokens = max(case["seq_lens"])
                    summary.samples.append(Sample(target, tokens, families, check["passed"], errors, bounds))
    query = "SELECT min(at) FROM results WHERE outcome != 'skipped' GROUP BY case_id"
    for (at,) in db.execute(query):
        summary.cases_over_time[interval(at)] += 1
        summary.cases += 1


def spread(summary: Summary, seconds: dict[str, float | None], end: float) -> None:
    """Adds the time of a result to the intervals in which it was spent: the phases in turn, until the result came."""
    spent = {phase: value for phase, value in seconds.items() if value}
    begin = end - sum(spent.values())
    for phase, value in spent.items():
        for index, share in shares(summary.edges, begin, begin + value):
            summary.seconds_over_time[phase][index] += share
        begin += value


def shares(edges: np.ndarray, begin: float, end: float) -> Iterator[tuple[int, float]]:
    """Of each interval that [begin, end] meets: its index, and the seconds in it. What lies outside is in the ends."""
    last = len(edges) - 2
    first, final = (min(max(int(np.searchsorted(edges, at, "right")) - 1, 0), last) for at in (begin, end))
    for index in range(first, final + 1):
        low = begin if index == first else edges[index]
        high = end if index == final else edges[index + 1]
        yield index, high - low


def _numbers(values: dict) -> dict[str, float]:
    """What JSON could not say as a number was not finite."""
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


def _note_worst(counts: TargetSummary, errors: dict[str, float], shares: dict[str, float]) -> None:
    for metric, error in errors.items():
        counts.worst[metric] = _greater(counts.worst.get(metric, 0.0), error)
    for metric, share in shares.items():
        counts.share[metric] = max(counts.share.get(metric, 0.0), share)


def _greater(a: float, b: float) -> float:
    """The greater of two, and NaN, the worst of all, if either is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _sampled(number: int, total: int) -> bool:
    """An even choice of results by their number, in no step with the targets that take turns."""
    return (number * 2654435761) % 2**32 < SAMPLES / max(total, 1) * 2**32


def _gather_coverage(db: sqlite3.Connection, summary: Summary) -> None:
    summary.coverage = {aspect: dict.fromkeys(classes, 0) for aspect, classes in ASPECTS.items()}
    query = "SELECT case_json FROM results WHERE outcome != 'skipped' GROUP BY case_id"
    for (case_json,) in db.execute(query):
        for aspect, name in aspects(Case.from_dict(json.loads(case_json))):
            summary.coverage[aspect][name] += 1


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
        "error_map": findings.error_map_of(folder),
        "repeats": saved.get("repeats") if state == findings.INTERMITTENT else None,
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
